"""Steps with a NaN or an infinity: nothing changes, all are counted, and a limit raises."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding

import optimorph as om

PARAMS = {"w": jnp.linspace(0.1, 1.0, 6).reshape(2, 3), "b": jnp.ones(2)}
CONDITION = om.linalg.NewtonSchulz().table.slope
BAD = [np.nan, np.inf, -np.inf]
RECIPES = {
    "adamw": lambda: om.adamw(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1),
    "muon": lambda: om.muon(0.1, axes={"w": "io", "b": None}, weight_decay=0.1),
    "optax.adam": lambda: optax.adam(0.1),
}


def spoiled(bad, leaf="b", tree=PARAMS):
    return tree | {leaf: tree[leaf].at[0].set(bad)}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("make", RECIPES.values(), ids=RECIPES)
@rounding.in_float64
def test_a_skipped_step_never_was(make, bad):
    """Weights, moments and schedules go on as if the step had not been there."""
    tx, alone = om.skip_nonfinite(make()), make()
    sound = jax.tree.map(lambda x: x.astype(float), PARAMS)
    params, state = sound, tx.init(sound)
    expected, inner = sound, alone.init(sound)
    with jax.numpy_dtype_promotion("standard"):
        step, true = jax.jit(tx.update), jax.jit(alone.update)
        for g in (sound, spoiled(bad, "b", sound), spoiled(bad, "w", sound), sound):
            before = state.inner
            updates, state = step(g, state, params)
            if g is not sound:
                chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, sound))
                chex.assert_trees_all_equal(state.inner, before)
            else:
                u, inner = true(g, inner, expected)
                expected = optax.apply_updates(expected, u)
            params = optax.apply_updates(params, updates)
            rounding.close(params, expected, condition=CONDITION)
            rounding.close(state.inner, inner, condition=CONDITION)
    assert (state.skipped, state.consecutive) == (2, 0)


def test_finite_gradients_whose_square_is_not():
    """1e25 would leave an infinite second moment, and a weight that stands still for ever."""
    tx = om.skip_nonfinite(om.adam(0.1))
    updates, state = tx.update(PARAMS | {"b": jnp.full(2, 1e25)}, tx.init(PARAMS))
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    chex.assert_trees_all_equal(state.inner, om.adam(0.1).init(PARAMS))
    assert state.skipped == 1


def test_finite_gradients_whose_updates_are_not():
    tx = om.skip_nonfinite(optax.scale(1e30))
    updates, state = tx.update({"w": jnp.full(2, 1e20)}, tx.init(PARAMS))
    assert not updates["w"].any()
    assert state.skipped == 1


def test_a_state_that_begins_infinite():
    """As a best loss so far does; what is infinite before may be so after."""

    def update(updates, state, params=None):
        return updates, state

    tx = om.skip_nonfinite(optax.GradientTransformation(lambda params: jnp.float32(jnp.inf), update))
    updates, state = tx.update(PARAMS, tx.init(PARAMS))
    chex.assert_trees_all_equal(updates, PARAMS)
    assert state.skipped == 0


def test_integers_keys_and_no_leaves():
    for tree in ({"n": jnp.arange(3)}, {"w": None}, {}):
        tx = om.skip_nonfinite(optax.identity(), 1)
        updates, state = tx.update(tree, tx.init(tree))
        chex.assert_trees_all_equal(updates, tree)
        assert state.skipped == 0
    key = jax.random.key(0)
    tx = om.skip_nonfinite(
        optax.GradientTransformation(lambda _: key, lambda g, s, p=None: (g, jax.random.split(s)[0]))
    )
    for g, expected in ((PARAMS, jax.random.split(key)[0]), (spoiled(np.nan), key)):
        assert tx.update(g, tx.init(g))[1].inner == expected


def test_leaves_of_one_path():
    """A path is a name, and two leaves may have the same."""
    params = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    tx = om.skip_nonfinite(om.sgd(0.1))
    leaves, tree = jax.tree.flatten(params)
    for bad in range(2):
        grads = tree.unflatten([x * jnp.nan if k == bad else x for k, x in enumerate(leaves)])
        updates, state = tx.update(grads, tx.init(params), params)
        assert int(state.skipped) == 1
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))


def test_extra_arguments_and_no_params():
    seen = []

    def update(updates, state, params=None, *, loss):
        seen.append((params, loss))
        return updates, state

    tx = om.skip_nonfinite(optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update))
    tx.update(PARAMS, tx.init(PARAMS), loss=2.0)
    assert seen == [(None, 2.0)]


def test_in_a_scan_with_donation_and_for_every_run():
    tx = om.skip_nonfinite(om.ema(0.5))
    g = jnp.asarray([[1.0, np.nan, 1.0, 1.0], [1.0, 1.0, np.inf, np.nan]])

    @functools.partial(jax.jit, donate_argnums=0)
    @jax.vmap
    def run(state, gradients):
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], state, gradients)

    state, updates = run(jax.vmap(tx.init)(g[:, 0]), g)
    np.testing.assert_allclose(updates, [[0.5, 0, 0.75, 0.875], [0.5, 0.75, 0, 0]])
    np.testing.assert_array_equal(state.skipped, [1, 2])
    np.testing.assert_array_equal(state.consecutive, [0, 2])
    np.testing.assert_allclose(state.inner.average, [0.875, 0.75])


def test_no_branch():
    """Neither a conditional nor, without a limit, a callback is in the program."""

    def program(limit):
        tx = om.skip_nonfinite(om.adam(0.1), limit)
        return jax.jit(tx.update).lower(PARAMS, tx.init(PARAMS)).as_text()

    assert "callback" in program(3)
    assert "callback" not in program(None)
    assert "stablehlo.case" not in program(None)
    assert "stablehlo.if" not in program(None)


LIMITED = om.skip_nonfinite(om.adam(0.1), 2)
WORDS = ("skip_nonfinite: step 3 in a row was skipped", "max_consecutive is 2", "max_consecutive=None")


def raises(run, *words):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(run())
    for word in (*WORDS, *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: jax.jit(f, donate_argnums=1)])
def test_the_limit(wrap):
    """The step after the last that may be skipped raises, and no other."""
    step, state = wrap(LIMITED.update), LIMITED.init(PARAMS)
    for g in (spoiled(np.nan), spoiled(np.nan), PARAMS, spoiled(np.nan), spoiled(np.inf)):
        _, state = jax.block_until_ready(step(g, state))
    assert (state.skipped, state.consecutive) == (4, 2)
    raises(lambda: step(spoiled(np.nan), state), "the gradient of 'b'.")


def test_the_limit_in_a_scan_and_of_any_run():
    def run(first, length):
        g = jnp.where(first, jnp.nan, jnp.ones(2))
        return jax.lax.scan(
            lambda s, _: (LIMITED.update({"x": g}, s)[1], None), LIMITED.init({"x": g}), None, length
        )

    raises(lambda: jax.jit(lambda: run(True, 3))(), "the gradient of 'x'")
    runs = jax.jit(jax.vmap(run, (0, None)), static_argnums=1)
    jax.block_until_ready(runs(jnp.asarray([False, True]), 2))
    raises(lambda: runs(jnp.asarray([False, True]), 3), "the gradient of 'x'")


def test_the_limit_names_what_was_first():
    """Finite gradients are not blamed, and of many leaves eight are named."""
    tx = om.skip_nonfinite(optax.scale(1e30), 0)
    many = {f"w{k}": jnp.full(2, 1e20) for k in range(10)}
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"in it: the update of 'w0', .* and 2 more\."):
        jax.block_until_ready(tx.update(many, tx.init(many)))
    tx = om.skip_nonfinite(om.ema(0.0, dtype=jnp.float16), 0)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"in it: the state's 'average/w'\."):
        jax.block_until_ready(tx.update({"w": jnp.full(2, 1e20)}, tx.init({"w": jnp.ones(2)})))
