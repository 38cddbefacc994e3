"""Transformations and functions of others, inside those of this library."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimorph as om
from optimorph import codecs, probes

PARAMS = {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128)}
AROUND = {
    "compress_state": om.compress_state,
    "compress_state-elementwise": lambda tx: om.compress_state(tx, elementwise=True),
    "in_bfloat16": om.in_bfloat16,
    "in_float32": om.in_float32,
    "skip_nonfinite": om.skip_nonfinite,
    "multi_steps": lambda tx: om.multi_steps(tx, 2),
    "cautious": om.cautious,
    "probe": probes.probe,
    "partition": lambda tx: om.partition({"*": "all"}, {"all": tx}),
    "inject_hyperparams": lambda tx: om.inject_hyperparams(lambda learning_rate: tx)(0.1),
    "muon": lambda tx: om.muon(0.1, others=tx, axes={"*": None}),
    "divide": lambda tx: om.divide(om.ema(0.9), by=tx),
}
RUNS_WITHOUT = ("compress_state-elementwise", "multi_steps")
around = pytest.mark.parametrize("name", AROUND)


@pytest.fixture(autouse=True)
def _promotion():
    """As optax needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def missing(like):
    return {"None": None, "float0": np.zeros(like.shape, jax.dtypes.float0)}


IN_FLOAT32 = {
    "add": lambda tx: om.add(tx, om.sign()),
    "mix": lambda tx: om.mix(0.5, om.sign(), tx),
    "keep_norm": lambda tx: om.keep_norm(tx, axes={"*": None}),
    "route_matrices": lambda tx: om.route_matrices(tx, tx, axes={"kernel": "io", "bias": None}),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", [*AROUND, *IN_FLOAT32])
def test_dtypes_are_kept(name, dtype):
    """Of a state, as `lax.scan` needs it, though optax's moments have the dtypes of parameters and then of
    gradients. Updates look like gradients.
    """
    whole = [optax.apply_if_finite(optax.adam(0.1), 3), optax.adafactor(0.1, min_dim_size_to_factor=2)]
    whole = [] if name == "compress_state-elementwise" else whole
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    injected = [package.inject_hyperparams(optax.lion)(0.1) for package in (om, optax)]
    for inner in (optax.adamw(0.1), om.chain(optax.trace(0.9)), *injected, *whole):
        tx = (AROUND | IN_FLOAT32)[name](inner)
        state = jax.eval_shape(tx.init, params)
        for given in (state, jax.eval_shape(tx.update, params, state, params)[1]):
            updates, after = jax.eval_shape(tx.update, params, given, params)
            assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, params)
            assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


@pytest.mark.parametrize(
    "name", ["compress_state", "compress_state-elementwise", "in_float32", "multi_steps", *IN_FLOAT32]
)
def test_float8_runs_in_float32(name):
    """From the start: JAX promotes no float8, so moments in it could not be added to gradients."""
    params = jax.tree.map(lambda x: x.astype(jnp.float8_e4m3fn), PARAMS)
    tx = (AROUND | IN_FLOAT32)[name](optax.adamw(0.1))
    state = jax.eval_shape(tx.init, params)
    of_shapes = tx.init(jax.eval_shape(lambda: params))
    assert jax.tree.map(jnp.result_type, of_shapes) == jax.tree.map(jnp.result_type, state)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float8_e4m3fn)}
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


@pytest.mark.parametrize("name", [*AROUND, *IN_FLOAT32])
def test_parameters_that_are_python_numbers(name):
    """They are updated as arrays are, also outside of programs."""
    tx = (AROUND | IN_FLOAT32)[name](optax.lion(0.1, b1=0.5))
    numbers = {"kernel": jnp.ones((2, 2)), "bias": 2.0}
    arrays = jax.tree.map(jnp.asarray, numbers)
    updates, _ = tx.update(arrays, tx.init(numbers), numbers)
    expected, _ = tx.update(arrays, tx.init(arrays), arrays)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("dtype", [bool, jnp.uint8, jnp.int4, jnp.int32])
def test_leaves_that_do_not_train_are_no_codes(dtype, elementwise):
    """optax has moments of theirs, in their own dtypes."""
    params = {"kernel": jnp.ones((64, 128)), "table": jnp.ones(3, dtype)}
    gradients = params | {"table": None}
    tx = om.compress_state(optax.sgd(0.1, 0.9), elementwise=elementwise)
    updates, state = tx.update(gradients, tx.init(params), params)
    assert updates["table"] is None
    assert sorted(x.dtype.name for x in jax.tree.leaves(state.inner)) == sorted(
        ["int8", jnp.dtype(dtype).name]
    )
    if not elementwise:
        with pytest.raises(ValueError, match="compress_state: 'first/kernel' is stored in int8"):
            om.compress_state(optax.sgd(0.1, 0.9), {"*": None}).update(gradients, state, params)


@pytest.mark.parametrize("how", ["None", "float0"])
@pytest.mark.parametrize(
    "make", [lambda: optax.sgd(0.1, 0.9), lambda: optax.rmsprop(0.1)], ids=["sgd", "rms"]
)
@around
def test_missing_gradients(name, make, how):
    """A leaf without a gradient keeps its moments, where optax drops them; also if all leaves lack one."""
    tx = AROUND[name](make())
    begun = tx.init(PARAMS)
    _, before = tx.update(PARAMS, begun, PARAMS)
    for gone in (["bias"], [*PARAMS]):
        g = PARAMS | {path: missing(PARAMS[path])[how] for path in gone}
        _, after = tx.update(g, before, PARAMS)
        assert jax.tree.structure(after) == jax.tree.structure(begun)
        if name == "skip_nonfinite":
            kept = [x for x in jax.tree.leaves(after) if x.shape == (128,)]
            wanted = [x for x in jax.tree.leaves(before) if x.shape == (128,)]
            assert kept
            for x, y in zip(kept, wanted, strict=True):
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("how", ["None", "float0"])
@pytest.mark.parametrize("name", [name for name in AROUND if name not in RUNS_WITHOUT])
def test_missing_gradients_that_are_needed(name, how):
    who = name.split("-")[0]
    tx = AROUND[name](optax.adam(0.1))
    for gone in (["bias"], [*PARAMS]):
        g = PARAMS | {path: missing(PARAMS[path])[how] for path in gone}
        with pytest.raises(ValueError, match=r"no gradient of '(bias|kernel)'.*Give zeros") as caught:
            tx.update(g, tx.init(PARAMS), PARAMS)
        assert str(caught.value).startswith(f"{who}: ")


@pytest.mark.parametrize("name", ["in_float32", "skip_nonfinite", "multi_steps", "divide"])
def test_integers_that_need_gradients_are_left_out(name):
    """Zeros are refused where parameters are integers, so the error does not ask for them."""
    params = {"kernel": jnp.ones(3), "count": jnp.arange(3)}
    tx = AROUND[name](optax.adamw(0.1))
    g = params | {"count": None}
    with pytest.raises(ValueError, match=r"no gradient of 'count'.*Leave out these leaves by optimorph"):
        tx.update(g, tx.init(params), params)
    parts = om.partition({"count": "none", "*": "all"}, {"none": optax.set_to_zero(), "all": tx})
    parts.update(g, parts.init(params), params)


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, AttributeError])
@around
def test_what_fails_for_its_own_reasons_says_them(name, error):
    def update(updates, state, params=None):
        raise error("of my own")

    tx = AROUND[name](optax.GradientTransformation(lambda params: optax.EmptyState(), update))
    state = tx.init(PARAMS)
    with pytest.raises((error, ValueError)) as caught:
        tx.update(PARAMS, state, PARAMS)
    found = caught.value
    assert "of my own" in str(found) or "of my own" in str(found.__cause__)
    another = optax.LookaheadParams.init_synced(PARAMS)
    if name == "skip_nonfinite":  # which takes such parameters
        with pytest.raises(
            ValueError, match=f"The transformation inside raised {error.__name__}: .?of my own"
        ):
            tx.update(PARAMS, state, another)


INITS = {
    "of numbers": lambda params: {"count": int(jnp.sum(params["bias"]))},
    "of a mask": lambda params: {"positive": params["bias"][params["bias"] > 0]},
}


@pytest.mark.parametrize("init", INITS.values(), ids=INITS)
@pytest.mark.parametrize("name", ["skip_nonfinite", "muon"])
def test_an_init_that_cannot_be_traced_does_not_hide_an_error(name, init):
    def update(updates, state, params=None):
        raise TypeError("of my own")

    tx = AROUND[name](optax.GradientTransformation(init, update))
    with pytest.raises(TypeError, match="of my own"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("init", INITS.values(), ids=INITS)
@around
def test_an_init_that_cannot_be_traced_is_not_needed(name, init):
    """Also not to see in which dtypes a restored state was made."""
    tx = AROUND[name](optax.GradientTransformation(init, lambda g, state, params=None: (g, state)))
    state = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if jnp.result_type(x) == jnp.float32 else x, tx.init(PARAMS)
    )
    tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("error", [AssertionError, IndexError])
def test_a_leaf_without_a_gradient_may_be_refused_in_any_way(error):
    def update(updates, state, params=None):
        if updates["bias"] is None:
            raise error("needs every leaf")
        return updates, state

    tx = om.multi_steps(optax.GradientTransformation(lambda params: optax.EmptyState(), update), 2)
    tx.update(PARAMS | {"bias": None}, tx.init(PARAMS), PARAMS)


RETURNED = {
    "None": lambda x: None,
    "another shape": lambda x: x[..., :1],
    "transposed": lambda x: jnp.swapaxes(x, -1, -2),
    "one matrix": lambda x: x[0],
    "integers": lambda x: x.astype(int),
    "complex numbers": lambda x: x + 0j,
    "booleans": lambda x: x > 0,
    "a tuple": lambda x: (x, x),
    "a word": lambda x: "polar",
    "a decomposition": lambda x: jnp.linalg.svd(x, full_matrices=False),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", RETURNED)
def test_an_orthogonalizer_that_returns_something_else(name, jit):
    tx = om.muon(0.1, orthogonalizer=RETURNED[name], axes={"kernel": "io", "bias": None})
    update = jax.jit(tx.update) if jit else tx.update
    with pytest.raises(
        ValueError, match=r"muon: orthogonalizer must return real numbers of shape \(1, 64, 128\)"
    ):
        update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("jit", [False, True])
def test_an_orthogonalizer_in_its_own_precision(jit):
    tx = om.muon(0.1, orthogonalizer=lambda x: x.astype(jnp.float16), axes={"kernel": "io", "bias": None})
    updates, _ = (jax.jit(tx.update) if jit else tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    assert updates["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("make", [om.adamw, om.lion, om.muon, om.normuon], ids=lambda make: make.__name__)
def test_stored_state_is_an_argument_of_the_optimizer(make):
    """So errors and warnings name the optimizer, and the argument that the user typed."""
    name, params = make.__name__, {"kernel": PARAMS["kernel"]}
    given = {"axes": {"*": "io"}} if "axes" in make.__signature__.parameters else {}
    plain, coded = make(0.1, state={"*": None}, **given), make(0.1, state="int8", **given)
    with pytest.raises(
        ValueError, match=f"^{name}: 'first/kernel' is stored in float32, but the rules say .*carry_state"
    ):
        coded.update(params, plain.init(params), params)
    coded.update(params, om.carry_state(plain.init(params), coded, params)[0], params)
    with pytest.raises(ValueError, match=f"^{name}: the rules give 3 for 'first/kernel'"):
        make(0.1, state={"*": 3}, **given).init(params)
    with pytest.raises(ValueError, match=f"^{name}: state must say which moments"):
        make(0.1, state=codecs.Signed8(), **given)
    with pytest.warns(UserWarning, match=f"^{name}: no moment matches the rule 'frist/.' of state"):
        make(0.1, state={"frist/*": codecs.Signed8()}, **given).init(params)


def test_codes_are_not_compressed_again():
    tx = om.compress_state(om.adamw(0.1, state="int8"))
    alone = om.adamw(0.1, state="int8")
    found, wanted = (t.update(PARAMS, t.init(PARAMS), PARAMS)[0] for t in (tx, alone))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(x, y)


def test_filters_of_warnings_are_left_alone():
    """They are those of all threads: two threads that change them at once leave them changed for good."""
    inner, seen = optax.trace(0.9, accumulator_dtype=jnp.bfloat16), []

    def init(params):
        seen.append([*warnings.filters])
        return inner.init(params)

    tx = om.skip_nonfinite(optax.GradientTransformation(init, inner.update))
    params = {"kernel": jnp.ones((3, 4))}
    state = tx.init(params)
    for look in (
        lambda: tx.update(params, state, params),
        lambda: om.plan(params, tx),
        lambda: om.carry_state(state, tx, params, written_by=tx),
    ):
        before = len(seen)
        look()
        assert len(seen) > before
    assert all(filters == [*warnings.filters] for filters in seen)
