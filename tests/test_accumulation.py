"""Gradients of microbatches as one step: weights, windows that end early, missing leaves, maxima."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding

import optimorph as om

pytestmark = pytest.mark.usefixtures("float64")
SIZES = (5, 2, 9)
"""Tokens of each microbatch."""


def drawn(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def loss(params, inputs):
    """The mean over all tokens."""
    return jnp.mean((jnp.tanh(inputs @ params["up"]) @ params["down"] - 1) ** 2)


def begin():
    return {"up": drawn(0, 3, 4), "down": drawn(1, 4)}


def train(tx, params, gradients, **extra):
    """Parameters and state after these gradients, the nth with the nth of every extra argument."""
    state, update = tx.init(params), jax.jit(tx.update)
    for k, g in enumerate(gradients):
        updates, state = update(g, state, params, **{name: values[k] for name, values in extra.items()})
        params = om.apply_updates(params, updates)
    return params, state


def test_microbatches_of_unequal_size_are_the_whole_batch():
    """Weighted by their tokens; with equal weights they are not."""
    tx, params, state = om.adamw(0.1), begin(), None
    state = tx.init(params)
    accumulated, others, equal = params, om.multi_steps(tx, len(SIZES)), params
    states = [others.init(params)] * 2
    steps = [jax.jit(tx.update), jax.jit(others.update)]
    slope = jax.jit(jax.grad(loss))
    for seed in (2, 3):
        batch = drawn(seed, sum(SIZES), 3)
        updates, state = steps[0](slope(params, batch), state, params)
        params = optax.apply_updates(params, updates)
        for part in np.split(batch, np.cumsum(SIZES)[:-1]):
            updates, states[0] = steps[1](
                slope(accumulated, part), states[0], accumulated, weight=jnp.asarray(len(part))
            )
            accumulated = optax.apply_updates(accumulated, updates)
            updates, states[1] = steps[1](slope(equal, part), states[1], equal)
            equal = optax.apply_updates(equal, updates)
    rounding.close(accumulated, params, condition=100)
    assert float(np.max(np.abs(equal["up"] - params["up"]))) > 1e-3


def test_the_last_window_is_flushed():
    """By its last gradient, or by one of weight 0; an empty window takes no step."""
    tx = om.multi_steps(om.sgd(1.0, 0.5), 4)
    gs = [drawn(seed, 3) for seed in range(6)]
    inner = om.sgd(1.0, 0.5)
    means = [sum(gs[:4]) / 4, sum(gs[4:]) / 2]
    expected, _ = train(inner, jnp.zeros(3), means)
    last = np.arange(6) == 5
    found, state = train(tx, jnp.zeros(3), gs, weight=np.ones(6), flush=last)
    rounding.close(found, expected)
    assert (int(state.window_count), float(state.weight), int(state.steps)) == (0, 0, 2)
    more = [*gs, jnp.full(3, jnp.nan), gs[0]]
    weights, flushed = np.array([1.0] * 6 + [0.0] * 2), np.arange(8) >= 6
    found, after = train(tx, jnp.zeros(3), more, weight=weights, flush=flushed)
    rounding.close(found, expected)
    rounding.close(after.inner, state.inner)
    assert int(after.steps) == 2


def test_a_microbatch_of_weight_zero():
    """It counts among the k and is not looked at; where all are such, the step waits."""
    tx = om.multi_steps(om.sgd(1.0), 2)
    gs = [jnp.full(2, g) for g in (jnp.nan, 3.0, 7.0, jnp.inf, 1.0, 1.0, 5.0)]
    state, found = tx.init(jnp.zeros(2)), []
    for g, weight in zip(gs, (0.0, 2.0, 1.0, 0.0, 0.0, 0.0, 4.0), strict=True):
        updates, state = tx.update(g, state, weight=weight)
        found.append(float(updates[0]))
    assert found == [0, -3, 0, -7, 0, 0, -5]


def test_one_microbatch_may_have_a_weight():
    """With k = 1 it changes nothing, whatever transformations are inside."""
    tx = om.multi_steps(optax.chain(optax.scale(2.0), om.skip_nonfinite(om.sgd(1.0))), 1)
    updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), weight=3.0, flush=True)
    np.testing.assert_array_equal(updates, -2.0)


@pytest.mark.parametrize("weight", [0.0, np.float32(0), 2.0, np.float32(np.nan), np.float32(-1)])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_one_microbatch_of_weight_zero_takes_no_step(weight, compiled):
    """With k = 1 as with every k, whether `flush` is true or not; a schedule of k is the reference."""
    params = {"a": jnp.ones(3), "frozen": None, "half": jnp.ones(2, jnp.bfloat16)}
    gradients = params | {"a": jnp.array([1.0, 2.0, 3.0])}
    found = []
    for k in (1, lambda steps: 1):
        tx = om.multi_steps(om.adamw(0.1), k)
        update = jax.jit(tx.update) if compiled else tx.update
        _, state = update(gradients, tx.init(params), params)
        try:
            updates, state = update(gradients, state, params, weight=weight, flush=True)
        except ValueError as error:
            updates = str(error)
        found.append((updates, getattr(state, "inner", state)))
    (updates, state), (expected, after) = found
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    rounding.close(state, after)
    if isinstance(expected, str):
        assert updates == expected
    else:
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, expected)
        rounding.close(updates, expected)
        assert bool(jnp.any(updates["a"] != 0)) == bool(weight > 0)


def test_arguments_of_one_microbatch_are_checked():
    with pytest.warns(UserWarning, match=r"multi_steps: no leaf matches the rule '\*amax\*'"):
        om.multi_steps(om.sgd(0.1), 1, maximum={"*amax*": True, "*": False}).init({"w": jnp.ones(2)})
    tx = om.multi_steps(om.sgd(0.1), 1)
    with pytest.raises(ValueError, match="multi_steps: flush must be one boolean"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), flush="yes")


def test_missing_leaves_are_zeros():
    """A leaf that some microbatches lack, the last one too, has the mean of what there is and zeros."""
    tx = om.multi_steps(om.adamw(0.1, weight_decay=0.5), 3)
    params = {"a": drawn(0, 2), "b": drawn(1, 3), "none": None, "frozen": drawn(2, 2)}
    gs = [params | {"a": drawn(3 + k, 2), "b": drawn(6 + k, 3), "frozen": None} for k in range(3)]
    some = [g | missing for g, missing in zip(gs, ({"a": None}, {}, {"b": None}), strict=True)]
    zeros = [
        {k: jnp.zeros_like(w) if g[k] is None and w is not None else g[k] for k, w in params.items()}
        for g in some
    ]
    found, state = train(tx, params, some)
    expected, after = train(tx, params, zeros)
    np.testing.assert_array_equal(found["frozen"], params["frozen"])  # nor decayed
    rounding.close(found | {"frozen": None}, expected | {"frozen": None})
    rounding.close(state, after)
    assert state.mean["none"] is None


@pytest.mark.parametrize("inner", [om.adamw(0.1), optax.adamw(0.1)], ids=["ours", "optax"])
def test_a_leaf_without_any_gradient_in_a_window(inner):
    """It is as if a plain step had no gradient of it: its moments stay. optax's have to decay."""
    params = {"a": drawn(0, 2), "b": drawn(1, 3)}
    gs = [{"a": drawn(2 + k, 2), "b": None if k in (2, 3, 5, 6, 7) else drawn(9 + k, 3)} for k in range(8)]
    with jax.numpy_dtype_promotion("standard"):
        found, state = train(om.multi_steps(inner, 2), params, gs)
        missing = jnp.zeros(3) if isinstance(inner.init(params)[0], optax.ScaleByAdamState) else None
        means = [{"a": (x["a"] + y["a"]) / 2, "b": missing} for x, y in zip(gs[::2], gs[1::2], strict=True)]
        means[0]["b"], means[2]["b"] = (gs[0]["b"] + gs[1]["b"]) / 2, gs[4]["b"] / 2
        frozen, after = train(inner, params, means)
    rounding.close(state.inner, after)
    rounding.close(found["a"], frozen["a"])
    if missing is None:
        rounding.close(found["b"], frozen["b"])


def test_the_largest_magnitudes_of_float8():
    """They are overwritten, as Flax does it, by the largest of those that the microbatches saw."""
    overwrite = optax.stateless_with_tree_map(lambda new, old: new - old)
    tx = om.multi_steps(
        om.partition({"amax/*": "overwrite", "*": "train"}, {"overwrite": overwrite, "train": om.sgd(1.0)}),
        3,
        maximum={"amax/*": True, "*": False},
    )
    params = {"kernel": drawn(0, 2, 2), "amax": {"history": jnp.array([9.0, 9.0, 9.0])}}
    seen = np.array([[-4.0, 2.0, 0.0], [-3.0, 1.0, 5.0], [-6.0, 3.0, 4.0]])
    gs = [{"kernel": drawn(1 + k, 2, 2), "amax": {"history": jnp.asarray(seen[k])}} for k in range(3)]
    gs.insert(1, {"kernel": jnp.full((2, 2), jnp.nan), "amax": {"history": jnp.full(3, 1e9)}})
    found, _ = train(tx, params, gs)
    np.testing.assert_array_equal(found["amax"]["history"], [-3.0, 3.0, 5.0])
    mean = (gs[0]["kernel"] + gs[2]["kernel"] + gs[3]["kernel"]) / 3
    rounding.close(found["kernel"], params["kernel"] - mean)
    lacking = [g | {"amax": {"history": None}} for g in gs]
    found, _ = train(tx, params, [*gs[:1], *lacking[2:]])
    np.testing.assert_array_equal(found["amax"]["history"], seen[0])


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.ones(2), "3"], ids=str)
def test_weights_that_are_none(weight):
    tx = om.multi_steps(om.sgd(1.0), 2)
    with pytest.raises(ValueError, match="multi_steps: weight must be"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), weight=weight)


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_traced_weights_that_are_none(weight):
    """Of such a weight the gradient is left out, as one that is not finite."""
    tx = om.multi_steps(om.sgd(1.0), 2)
    gs = [jnp.full(2, g) for g in (1.0, 100.0, 3.0)]
    found, state = train(tx, jnp.zeros(2), gs, weight=np.array([1.0, weight, 1.0]))
    np.testing.assert_array_equal(found, -2.0)
    assert int(state.steps) == 1


def test_a_state_of_other_parameters_is_named():
    tx, params = om.multi_steps(om.sgd(0.1), 2), begin()
    state, more = tx.init(params), params | {"more": drawn(2, 3)}
    with pytest.raises(ValueError, match="multi_steps: the optimizer state does not match"):
        tx.update(more, state, more)
    with pytest.raises(ValueError, match=r"'more': a parameter of shape .3,., but no gradient"):
        tx.update(params, state, more)
