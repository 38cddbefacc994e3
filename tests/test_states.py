"""States are plain arrays of their own: donated, saved by any library, and made under any flag."""

import contextlib
import copy
import itertools
import pickle
import warnings

import catalog
import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_contract import gradients, parameters

import optimorph as om
from optimorph import probes

ENTRIES = [
    *(entry for entry in catalog.ENTRIES if entry.id not in catalog.LIKE or entry.id == "klsoap"),
    catalog.Entry("probe", lambda om: probes.probe(om.adamw(0.1), every=2), None),
    catalog.Entry("int8", lambda om: om.adamw(0.1, state="int8"), None),
    catalog.Entry("muon-int8", lambda om: om.muon(0.1, state="int8"), None),
    catalog.Entry("nu_dtype", lambda om: om.adamw(0.1, nu_dtype="bfloat16"), None),
    catalog.Entry("in_bfloat16-optax", lambda om: om.in_bfloat16(optax.scale_by_adam()), None),
]
IN_FEWER_BITS = ("int8", "muon-int8", "nu_dtype", "in_bfloat16-optax")
every = pytest.mark.parametrize("entry", ENTRIES, ids=[entry.id for entry in ENTRIES])
FEW = (
    "adamw",
    "muon",
    "sgd-momentum",
    "probe",
    "int8",
    "clip_by_global_norm-always",
    "multi_steps",
    "skip_nonfinite",
)

WRAPPERS = {
    "alone": lambda tx: tx,
    "skip_nonfinite": om.skip_nonfinite,
    "multi_steps": lambda tx: om.multi_steps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "probe": lambda tx: probes.probe(tx, every=2),
    "masked": lambda tx: optax.masked(tx, lambda tree: jax.tree.map(lambda x: x.ndim > 0, tree)),
    "partition": lambda tx: om.partition({"*": "all"}, {"all": tx}),
    "compress_state": om.compress_state,
}
INJECTED = {
    "adamw": (om.adamw, {"learning_rate": 0.1}),
    "adamw of an array": (om.adamw, {"learning_rate": jnp.float32(0.1), "weight_decay": jnp.float32(0.2)}),
    "muon": (om.muon, {"learning_rate": jnp.float32(0.1)}),
}


@pytest.fixture(autouse=True)
def _promotion():
    """As optax's wrappers need it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def pointers(tree):
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and x.size]


def all_wrapped(wrappers, tx):
    """One transformation that updates by each of the wrapped ones alone: one program for them all."""
    wrapped = {name: WRAPPERS[name](tx) for name in wrappers}

    def init(params):
        return {name: own.init(params) for name, own in wrapped.items()}

    def update(g, states, params):
        results = {name: own.update(g, states[name], params) for name, own in wrapped.items()}
        return tuple({name: result[i] for name, result in results.items()} for i in range(2))

    return optax.GradientTransformation(init, update)


def fresh(tx, params, *held):
    """States made eagerly and by a program, of which no buffer is shared."""
    for init in (tx.init, jax.jit(tx.init)):
        state = init(params)
        own = pointers(state)
        assert len(set(own)) == len(own)
        assert not {*own} & {*pointers((params, held))}
        yield state


def check_donation(tx, params, *held):
    """No buffer of a fresh state is shared, and three steps may donate the state; `held` stays alive."""
    step = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=1)
    for state in fresh(tx, params, *held):
        for seed in range(3):
            g = jax.tree.map(lambda p, seed=seed: (p * (0.1 + seed)).astype(p.dtype), params)
            _, state = step(g, state, params)
    for x in held:
        np.asarray(x)


@pytest.mark.examples("adamw", "muon", "clip*always")
@pytest.mark.parametrize(("k", "entry"), [*enumerate(ENTRIES)], ids=[entry.id for entry in ENTRIES])
def test_fresh_states_can_be_donated(k, entry):
    """No buffer is shared inside any wrapper; three steps are donated alone and inside wrappers in turn."""
    coded = entry.stacks or entry.id.startswith(("compress_state", "int8", "muon-int8"))
    wrappers = [name for name in WRAPPERS if not (coded and name == "compress_state")]
    params = parameters(entry)
    assert len([*fresh(all_wrapped(wrappers, entry.build()), params)]) == 2
    trained = wrappers if entry.id in FEW else [wrappers[0], *wrappers[1 + k % 4 :: 4]]
    check_donation(all_wrapped(trained, entry.build()), params)


@pytest.mark.examples(*FEW, "extrapolate*", "mars_adamw*")
@every
def test_states_after_eager_updates_have_their_own_buffers(entry):
    tx, params = entry.build(), parameters(entry)
    g = gradients(params)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(g, state, params)
        own = pointers(state)
        assert len(set(own)) == len(own)
        assert not {*own} & {*pointers((params, g, updates))}


@pytest.mark.examples("adamw of an array")
@pytest.mark.parametrize("name", INJECTED)
def test_the_callers_numbers_stay_alive(name):
    """In the state of `inject_hyperparams` and, as readings, in that of the optimizer itself."""
    make, numbers = INJECTED[name]
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    arrays = [x for x in numbers.values() if isinstance(x, jax.Array)]
    for tx in (om.inject_hyperparams(make)(**numbers), make(**numbers)):
        check_donation(all_wrapped(WRAPPERS, tx), params, *arrays)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("make", [om.adamw, optax.adamw, optax.adafactor])
def test_integers_that_are_set_are_real_numbers(make, jit):
    """A number that was real stays so, and one that was an integer too."""
    tx, params = om.inject_hyperparams(make)(learning_rate=0.1), {"kernel": jnp.ones((4, 3))}
    update = jax.jit(tx.update) if jit else tx.update
    state = tx.init(params)
    own = ("learning_rate", "clipping_threshold", "weight_decay", "decay_offset")
    with jax.numpy_dtype_promotion("standard"):
        for number in (1, np.int64(1), jnp.int32(1)):
            changed = {name: number for name in own if name in state.hyperparams}
            after = update(params, state._replace(hyperparams=state.hyperparams | changed), params)[1]
            assert {name: float(after.hyperparams[name]) for name in changed} == dict.fromkeys(changed, 1.0)
            assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


def test_what_functions_return_is_not_what_they_took():
    """Leaves that do not change have their own buffers too, so the arguments may be donated or kept."""
    params = {
        "attn": {"q": {"kernel": jnp.ones((8, 2, 4))}, "k": {"kernel": jnp.ones((8, 2, 4))}},
        "narrow": jnp.ones((4, 4), jnp.bfloat16),
        "count": jnp.arange(3),
        "key": jax.random.key(0),
    }
    weights, residuals = om.split_weights(params)
    joined = om.join_weights(weights, residuals)
    stepped = om.apply_updates(params, jax.tree.map(lambda _: None, params))
    clipped = om.qk_clip(params, {})
    held = [params, weights, residuals, joined, stepped, clipped]
    buffers = [pointer for tree in held for pointer in pointers(tree | {"key": None})]
    assert len(set(buffers)) == len(buffers)
    for tree in (joined, stepped, clipped):
        for new, old in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
            assert (new.dtype, new.shape) == (old.dtype, old.shape)
            assert jnp.all(new == old)


FLAGS = {
    "of numbers": [
        lambda: jax.enable_x64(True),
        lambda: jax.debug_nans(True),
        lambda: jax.debug_infs(True),
    ],
    "of programs": [
        lambda: jax.numpy_dtype_promotion("strict"),
        lambda: jax.numpy_rank_promotion("raise"),
    ],
}


@pytest.mark.parametrize("flag", FLAGS["of programs"])
def test_eight_bits_of_leaves_in_blocks(flag):
    """The programs of all platforms; leaves of the catalog are too small for blocks."""
    params = {"kernel": jnp.ones((64, 128))}
    with flag():
        tx = om.adamw(0.1, state="int8")
        jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params)


@pytest.mark.parametrize("flag", FLAGS["of numbers"])
def test_eight_bits_of_zeros(flag):
    """Leaves that are encoded at once, outside of a program: one of zeros has scales of zero."""
    with flag():
        params = {"kernel": jnp.zeros((2, 5)), "scalar": jnp.zeros([])}
        codes = {"first/*": om.codecs.Signed8(), "second/*": om.codecs.Nonneg8()}
        for tx in (om.adamw(0.1, state=codes), om.compress_state(optax.adamw(0.1), codes)):
            _, state = tx.update(params, tx.init(params), params)
            tx.update(params, state, params)


def two_updates(tx, update, params):
    state = tx.init(params)
    for seed in range(2):
        updates, state = update(gradients(params, seed), state, params)
    return updates, state


@pytest.mark.examples("*-adamw", *(f"of numbers-{name}" for name in FEW))
@every
@pytest.mark.parametrize("flags", FLAGS)
def test_flags(flags, entry):
    """Two updates, jitted and not, give finite numbers under every flag that finds faults in programs."""
    if entry.id == "skip_nonfinite-each-third" and flags == "of numbers":
        return  # it is given a NaN
    if entry.id == "in_bfloat16-optax" and flags == "of programs":
        return  # optax's own rule is not written for it
    with contextlib.ExitStack() as stack:
        for flag in FLAGS[flags]:
            stack.enter_context(flag())
        tx, params = entry.make(om), parameters(entry, jnp.bfloat16)
        for update in (tx.update, jax.jit(tx.update)):
            two_updates(tx, update, params)


@pytest.mark.parametrize("flag", FLAGS["of numbers"])
@pytest.mark.parametrize("programs", [True, False])
def test_no_constant_is_nan(flag, programs):
    """Numbers are rounded and encoded under flags that refuse NaN, in programs and without."""
    params = {"kernel": jnp.ones((4, 128)).at[0].set(0), "in_16": jnp.ones((4, 128), jnp.bfloat16)}
    codes = {"first/*": om.codecs.Signed8(), "second/*": om.codecs.Nonneg8()}
    with flag(), contextlib.nullcontext() if programs else jax.disable_jit():
        for tx in (om.adamw(0.1, state=codes), om.adamw(0.1, nu_dtype="bfloat16")):
            updates, state = tx.update(params, tx.init(params), params)
            tx.update(params, state, params)
            om.apply_updates(params, updates, jax.random.key(0))
        for bits in (8, 16):
            om.join_weights(*om.split_weights(params, bits))


@pytest.mark.examples("adamw", "muon", "probe")
@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES if e.id not in IN_FEWER_BITS], ids=lambda entry: entry.id
)
def test_without_programs(entry):
    """Under `jax.disable_jit`, in which people look for faults, updates are those of the program."""
    with jax.enable_x64(True):
        tx, params = entry.make(om), parameters(entry, jnp.float64)
        expected, _ = two_updates(tx, jax.jit(tx.update), params)
        with jax.disable_jit():
            updates, _ = two_updates(tx, tx.update, params)
        for u, v in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(u, v, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if not e.real], ids=lambda entry: entry.id)
def test_complex_leaves_in_strict_dtypes(entry):
    """Two updates of complex numbers are traced; matrices are real."""
    if entry.id == "in_bfloat16-optax":
        return  # optax's own rule is not written for it
    with jax.numpy_dtype_promotion("strict"):
        tx, params = entry.make(om), parameters(entry, jnp.complex64)
        jax.eval_shape(lambda params: two_updates(tx, tx.update, params), params)


@pytest.mark.examples(*FEW)
@every
def test_no_tracer_leaks(entry):
    tx, params = entry.make(om), parameters(entry)
    with jax.checking_leaks():
        for update in (tx.update, jax.jit(tx.update)):
            jax.eval_shape(lambda params, update=update: two_updates(tx, update, params), params)


@pytest.mark.examples(*FEW)
@every
def test_saved_and_restored(entry):
    """By Flax, Equinox, pickle and NumPy: to the bit, and in the same structure."""
    tx, params = entry.build(), parameters(entry)
    blank = tx.init(params)
    update = jax.jit(tx.update)
    _, state = update(gradients(params), blank, params)
    leaves, structure = jax.tree.flatten(state)
    for restored in (
        flax.serialization.from_bytes(blank, flax.serialization.to_bytes(state)),
        flax.serialization.from_state_dict(blank, flax.serialization.to_state_dict(state)),
        pickle.loads(pickle.dumps(state)),
        copy.deepcopy(state),
        jax.tree.map(np.asarray, state),
        structure.unflatten(leaves),
        with_equinox(blank, state),
    ):
        assert jax.tree.structure(restored) == structure
        for x, y in zip(jax.tree.leaves(restored), leaves, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        update(gradients(params), restored, params)


def with_equinox(blank, state):
    import io

    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, state)
    file.seek(0)
    return eqx.tree_deserialise_leaves(file, blank)


@pytest.mark.examples(*FEW)
@every
def test_restored_as_other_numbers(entry):
    """Python's numbers and NumPy's float64, as JSON restores them, are as good as the arrays that were."""

    def restored(x):
        wide = np.asarray(x, np.float64 if x.dtype == jnp.float32 else x.dtype)
        return wide if x.ndim else wide.item()

    tx, params = entry.build(), parameters(entry)
    _, state = tx.update(gradients(params), tx.init(params), params)
    wanted = tx.update(gradients(params, 2), state, params)
    found = tx.update(gradients(params, 2), jax.tree.map(restored, state), params)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (x.dtype, jnp.asarray(x).weak_type) == (y.dtype, False)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


NARROW = catalog.Entry(
    "narrow",
    lambda om: om.soap(0.1, mu_dtype="bfloat16", nu_dtype="bfloat16", factor_dtype="bfloat16"),
    None,
    matrices=True,
    real=True,
)


CODES = {"first/*": om.codecs.Float8(scale_dtype="bfloat16"), "second/*": om.codecs.BFloat16()}
ADAMW = om.inject_hyperparams(om.adamw)
RESTORED = [
    *ENTRIES,
    NARROW,
    catalog.Entry("codes", lambda om: om.adamw(0.1, state=CODES), None),
    catalog.Entry("optax", lambda om: om.compress_state(optax.amsgrad(0.1)), None),
    catalog.Entry("bfloat16", lambda om: om.in_bfloat16(optax.adam(0.1)), None),
    catalog.Entry("optax-each", lambda om: om.compress_state(optax.nadamw(0.1), elementwise=True), None),
    catalog.Entry("injected", lambda om: ADAMW(0.1, 0.8, 0.9), None),
    catalog.Entry("injected-schedule", lambda om: ADAMW(optax.linear_schedule(0.1, 0.0, 9), 0.8, 0.9), None),
]
OPTAX_REFUSES = ("apply_if_finite", "MultiSteps")


def attention():
    """What every entry has state of: an attention module, and leaves that are large enough for codes."""
    heads = {f"attn/{name}/kernel": (64, 4, 16) for name in ("query", "key")}
    rng = np.random.default_rng(0)
    shapes = {**heads, "kernel": (64, 128), "bias": (8,)}
    return {path: jnp.asarray(rng.standard_normal(shape), jnp.float32) for path, shape in shapes.items()}


def stored_in(dtype, state):
    """The state after a library has restored it that has real numbers, or integers, in one dtype alone.

    Codes of one and two bytes are unchanged.
    """
    kind, least = (jnp.floating, 2) if jnp.issubdtype(dtype, jnp.floating) else (jnp.integer, 4)

    def cast(x):
        changes = jnp.issubdtype(x.dtype, kind) and x.dtype.itemsize >= least
        return x.astype(dtype) if changes else x

    return jax.tree.map(cast, state)


@pytest.mark.examples("adamw", "narrow", "multi_steps", "codes", "injected", "clip_attention_logits")
@pytest.mark.parametrize(("k", "entry"), [*enumerate(RESTORED)], ids=[entry.id for entry in RESTORED])
def test_restored_in_another_dtype(k, entry):
    """After one update the state has the dtypes that the arguments say, also through wrappers in turn."""
    names = [name for name in WRAPPERS if name not in OPTAX_REFUSES]
    if entry.id not in ("adamw", "multi_steps", "injected"):  # which meet all of them
        names = [names[0], names[k % len(names)]] if "-" not in entry.id else names[:1]
    with jax.enable_x64(True):
        for params, name in itertools.product((parameters(entry), attention()), names):
            tx = WRAPPERS[name](entry.make(om))
            try:
                with warnings.catch_warnings(action="ignore"):  # of moments that are not compressed
                    blank = jax.eval_shape(tx.init, params)
                    jax.eval_shape(tx.update, params, blank, params)
            except ValueError:  # it has answers for other leaves, or is not inside this wrapper
                continue
            for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64, jnp.int64):

                def after(state, dtype=dtype, tx=tx, params=params):
                    return tx.update(params, stored_in(dtype, state), params)[1]

                found = jax.eval_shape(after, blank)
                assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, blank)


@pytest.mark.examples("adamw", "narrow", "codes", "multi_steps", "skip_nonfinite")
@pytest.mark.parametrize("entry", RESTORED, ids=[entry.id for entry in RESTORED])
def test_counts_in_half_precision(entry):
    """As `optax.tree.cast` makes them of a state; 256 + 1 is 256 then. An update makes them integers."""
    params, tx = parameters(entry), entry.make(om)
    blank = jax.eval_shape(tx.init, params)

    def after(state, dtype):
        cast = jax.tree.map(lambda x: x.astype(dtype) if x.dtype.itemsize == 4 else x, state)
        return tx.update(params, cast, params)[1]

    for dtype in (jnp.bfloat16, jnp.float16):
        found = jax.eval_shape(lambda state, dtype=dtype: after(state, dtype), blank)
        assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, blank)


@pytest.mark.examples("adamw", "narrow", "codes")
@pytest.mark.parametrize("entry", RESTORED, ids=[entry.id for entry in RESTORED])
def test_restored_numbers_are_the_numbers(entry):
    """What was rounded on the way is used as it is, and what was not gives the same run to the bit."""
    params = parameters(entry)
    tx = entry.make(om)
    _, state = tx.update(gradients(params), tx.init(params), params)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        restored = stored_in(dtype, state)
        rounded = jax.tree.map(lambda x, like: x.astype(like.dtype), restored, state)
        results = [tx.update(gradients(params, 2), s, params) for s in (restored, rounded)]
        for x, y in zip(*map(jax.tree.leaves, results), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
