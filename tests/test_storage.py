"""What states are stored in: averages arrive in every dtype, and 0.999 stays what it is."""

import functools

import catalog
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding

import optimorph as om
from optimorph import probes

STEPS = 20_000
NUMBER = rounding.eps("float32") / (1 - 0.999)
"""0.999 and 0.001 are rounded apart, and so is every step of a sum of about a thousand."""


def long_run(tx, level, dtype=np.float32, size=64, seed=0):
    """The average of 20,000 noisy numbers around a level that falls to a tenth half-way, and the numbers."""
    rng = np.random.default_rng(seed)
    gs = level * (1 + 0.5 * rng.standard_normal((STEPS, size)))
    gs[STEPS // 2 :] /= 10
    gs = gs.astype(dtype)

    def step(state, g):
        return tx.update(g, state)[::-1][0], None

    state = jax.jit(lambda gs: jax.lax.scan(step, tx.init(gs[0]), gs)[0])(jnp.asarray(gs))
    updates, _ = tx.update(jnp.zeros(size, dtype), state)
    return np.asarray(updates, np.float64), gs.astype(np.float64)


def exact(gs, decay):
    average = np.zeros(gs.shape[1])
    for g in gs:
        average = decay * average + (1 - decay) * g
    return decay * average  # one more, of zero


@pytest.mark.parametrize("level", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(
    ("decay", "store", "tolerance"),
    [
        (0.999, lambda decay: om.ema(decay), NUMBER),
        (0.9, lambda decay: om.ema(decay, dtype="bfloat16"), 0.05),
        (0.999, lambda decay: om.in_bfloat16(om.ema(decay)), 0.2),
        (0.9, lambda decay: om.in_bfloat16(om.ema(decay)), 0.02),
    ],
    ids=["float32", "bfloat16-nearest", "bfloat16-by-chance", "bfloat16-by-chance-fast"],
)
def test_an_average_of_20_000_steps(decay, store, tolerance, level):
    """Against float64: every number of it, and their mean five times as well."""
    found, gs = long_run(store(decay), level)
    expected = exact(gs, decay)
    np.testing.assert_allclose(found, expected, rtol=tolerance)
    np.testing.assert_allclose(found.mean(), expected.mean(), rtol=max(NUMBER, tolerance / 5))


def test_an_average_of_20_000_steps_in_float16():
    """The nearest float16 number is good enough for a fast average within its range."""
    found, gs = long_run(om.ema(0.9, dtype="float16"), 1.0)
    np.testing.assert_allclose(found, exact(gs, 0.9), rtol=0.01)


def test_an_average_of_20_000_steps_in_float64():
    with jax.enable_x64(True):
        found, gs = long_run(om.ema(0.999, dtype="float64"), 1.0, np.float64)
    np.testing.assert_allclose(found, exact(gs, 0.999), rtol=1e-12)


def test_nearest_rounding_would_stand_still():
    """Why second moments are not stored so: the average of the docstring never comes to half of its fall."""
    found, gs = long_run(om.ema(0.999, dtype="bfloat16"), 1.0)
    assert np.all(found > 2 * exact(gs, 0.999))


def second_moments(state):
    """The arrays of a state that are not first moments, by the exact name of their place."""
    found = optax.tree.get_all_with_path(state, "average")
    return [value["w"] for path, value in found if "by" in str(path)]


@pytest.mark.parametrize("name", [n for n in catalog.recipes_with("nu_dtype") if n != "adamh"])
def test_second_moments_in_bfloat16(name):
    """`nu_dtype` of every recipe: two bytes, an update within 1 % of float32's, state and dtype kept.

    An update along the weights themselves, as here, is none on the sphere of `adamh`.
    """
    params = {"w": jnp.linspace(0.5, 1.0, 200)}
    full, half = (getattr(om, name)(0.1, **kwargs) for kwargs in ({}, {"nu_dtype": jnp.bfloat16}))
    states = [tx.init(params) for tx in (full, half)]
    sizes = [sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim) for state in states]
    assert sizes[0] - sizes[1] == 2 * 200
    for seed in range(50):
        g = {"w": 1 + 0.5 * jax.random.normal(jax.random.key(seed), (200,))}
        (a, states[0]), (b, after) = (
            jax.jit(tx.update)(g, state, params) for tx, state in zip((full, half), states, strict=True)
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(after, states[1])
        states[1] = after
    np.testing.assert_allclose(b["w"], a["w"], rtol=0.02)
    np.testing.assert_allclose(b["w"].mean(), a["w"].mean(), rtol=0.002)


@pytest.mark.parametrize("inner", [om.ema(0.9), optax.ema(0.9, debias=False)], ids=["om", "optax"])
def test_scalars_are_not_changed_in_bfloat16(inner):
    """Nor are they rounded to float32 on the way."""
    with jax.enable_x64(True):
        w = {"scale": jnp.float64(1 / 3)}
        found, wanted = om.in_bfloat16(inner), inner
        ours, theirs = found.init(w), wanted.init(w)
        for _ in range(3):
            (got, ours), (expected, theirs) = found.update(w, ours, w), wanted.update(w, theirs, w)
            assert got["scale"] == expected["scale"]


def test_rounding_repeats():
    """The same seed, step and path give the same bits: resumed, in other company, in another order."""
    tx = om.in_bfloat16(om.ema(0.99), seed=3)
    params = {"b": jnp.ones(50), "a": jnp.ones(60)}
    gs = [jax.tree.map(lambda p, k=k: (k + 1.1) * p, params) for k in range(4)]

    def run(gs, state):
        for g in gs:
            _, state = jax.jit(tx.update, compiler_options=rounding.EXACT)(g, state)
        return state

    whole = run(gs, tx.init(params))
    saved = jax.tree.map(np.asarray, run(gs[:2], tx.init(params)))
    chex.assert_trees_all_equal(run(gs[2:], jax.tree.map(jnp.asarray, saved)), whole)
    alone = run([{"b": g["b"]} for g in gs], tx.init({"b": params["b"]}))
    np.testing.assert_array_equal(alone.inner.average["b"], whole.inner.average["b"])
    other = om.in_bfloat16(om.ema(0.99), seed=4)
    _, different = other.update(gs[0], other.init(params))
    _, first = tx.update(gs[0], tx.init(params))
    assert np.any(different.inner.average["b"] != first.inner.average["b"])
    resumed_with_another_seed = other.update(gs[1], first)[1]
    chex.assert_trees_all_equal(resumed_with_another_seed, tx.update(gs[1], first)[1])


def test_what_is_stored_in_bfloat16():
    """Arrays of float32; not what optimizers count or let people read, nor complex numbers."""
    params = {"w": jnp.ones((2, 3)), "z": jnp.ones(3, jnp.complex64), "scalar": jnp.ones(())}
    state = om.in_bfloat16(optax.chain(om.momentum(0.9), om.sgd(0.1), om.clip_by_global_norm(1.0))).init(
        params
    )
    kinds = {jnp.dtype(x.dtype).name for x in jax.tree.leaves(state)}
    assert kinds == {"bfloat16", "complex64", "float32", "int32", "uint32"}
    assert state.inner[0].velocity["w"].dtype == jnp.bfloat16
    assert state.inner[0].velocity["scalar"].dtype == jnp.float32


def test_a_missing_gradient_leaves_its_moment_alone():
    tx, params = om.in_bfloat16(om.ema(0.9)), {"a": jnp.ones(9), "b": jnp.ones(9)}
    _, state = tx.update(params, tx.init(params))
    _, after = tx.update({"a": params["a"], "b": None}, state)
    np.testing.assert_array_equal(after.inner.average["b"], state.inner.average["b"])


WRAPPERS = {
    "alone": lambda make: make(b2=0.999),
    "MultiSteps": lambda make: optax.MultiSteps(make(b2=0.999), 1).gradient_transformation(),
    "multi_steps": lambda make: om.multi_steps(make(b2=0.999), 1),
    "masked": lambda make: optax.masked(make(b2=0.999), lambda tree: jax.tree.map(lambda _: True, tree)),
    "partition": lambda make: om.partition({"*": "all"}, {"all": make(b2=0.999)}),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(b2=0.999), 1),
    "skip_nonfinite": lambda make: om.skip_nonfinite(make(b2=0.999)),
    "in_float32": lambda make: om.in_float32(make(b2=0.999)),
    "inject_hyperparams": lambda make: om.inject_hyperparams(make)(b2=0.999),
    "vmap": lambda make: make(b2=jnp.float32(0.999)),
    "optax's injection": lambda make: optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(b2=0.999),
}


@pytest.mark.examples("alone-*")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_b2_survives(wrap, dtype):
    """Of a gradient of one the second moment is 0.001 after a step, and the update is a number."""
    params = {"w": jnp.ones(4, dtype)}
    for name in ("adam", "nadam", "adamw", "nadamw"):
        tx = wrap(functools.partial(getattr(om, name), 1.0))
        with jax.numpy_dtype_promotion("standard"):
            updates, state = jax.jit(tx.update)(params, tx.init(params), params)
        (moment,) = second_moments(state)
        rounding.close(moment, 0.001, units=1, condition=1 / 0.001)
        assert np.all(np.isfinite(np.asarray(updates["w"], np.float32)))


def test_a_partial_of_an_optimizer_is_injected_as_the_optimizer():
    """Its arguments that cannot be arrays, such as the power of `shampoo`, stay static."""
    for make in (functools.partial(om.shampoo, b1=0.8), functools.partial(functools.partial(om.soap))):
        state = om.inject_hyperparams(make)(learning_rate=0.1).init({"kernel": jnp.ones((3, 4))})
        assert "learning_rate" in state.hyperparams
        assert "power" not in state.hyperparams


@pytest.mark.parametrize(
    "mask",
    [om.decay_mask, om.roles("dense"), lambda p: jax.tree.map(lambda w: w.ndim > 1, p)],
    ids=["decay_mask", "roles", "function"],
)
def test_masks_of_functions_without_annotations_are_no_schedules(mask):
    def mine(learning_rate, weight_decay, mask=None):
        return om.adamw(learning_rate, weight_decay=weight_decay, mask=mask)

    params = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
    tx = om.inject_hyperparams(mine)(lambda count: jnp.float32(0.1), 0.5, mask=mask)
    gradients = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(gradients, tx.init(params), params)
    assert {*state.hyperparams} == {"learning_rate", "weight_decay"}
    np.testing.assert_array_equal(updates["dense"]["bias"], 0)
    rounding.close(updates["dense"]["kernel"], -0.05)


def test_injected_numbers_can_be_read_and_set():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = om.inject_hyperparams(om.adamw)(
        lambda count: 0.1 / (1 + count), weight_decay=0.5, mask=lambda p: jax.tree.map(lambda _: True, p)
    )
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
        assert {x.dtype for x in state.hyperparams.values()} == {jnp.dtype("float32")}
        assert float(state.hyperparams["b2"]) == np.float32(0.999)
        _, state = jax.jit(tx.update)(params, state, params)
        state.hyperparams["weight_decay"] = jnp.float32(0.25)
        _, after = jax.jit(tx.update)(params, state, params)
    assert float(after.hyperparams["learning_rate"]) == np.float32(0.05)
    assert float(optax.tree.get(after, "last_weight_decay")) == 0.25


@pytest.mark.parametrize("name", catalog.recipes_with("learning_rate"))
def test_numbers_by_name(name):
    """What optax's tools find under a name is one number; what has no effect cannot be set."""
    params = {"w": jnp.ones((3, 4))}
    recipe = getattr(om, name)
    plain, injected = recipe(0.125), om.inject_hyperparams(recipe)(learning_rate=0.125)
    state = plain.init(params)
    if getattr(plain, "routes", None) is None:  # or its two sides count their own steps, as optax's do
        assert optax.tree.get(state, "count") == 0
    with pytest.raises(KeyError):
        optax.tree.set(state, learning_rate=0.0)
    state = injected.init(params)
    assert optax.tree.get(state, "learning_rate") == 0.125
    still = optax.tree.set(state, learning_rate=jnp.float32(0))
    updates, _ = injected.update(params, still, params)
    np.testing.assert_array_equal(updates["w"], 0)


@pytest.mark.parametrize(
    "wrap",
    [
        om.skip_nonfinite,
        probes.probe,
        om.compress_state,
        om.in_bfloat16,
        lambda tx: om.multi_steps(tx, 2),
        lambda tx: om.adamw(0.1, state="int8"),
        lambda tx: om.adamw(0.1, nu_dtype="bfloat16"),
    ],
)
def test_a_wrapper_hides_no_number(wrap):
    """The count of steps is one value, whatever else a wrapper counts."""
    state = wrap(om.adamw(0.1)).init({"w": jnp.ones((3, 4))})
    for name in ("count", "debias_count", "last_learning_rate"):
        assert len({float(value) for _, value in optax.tree.get_all_with_path(state, name)}) == 1
    assert optax.tree.get(state, "count") == 0


RELATIVES = [entry for entry in catalog.MORE if entry.id in ("klsoap", "shampoo", "soap_muon")]


@pytest.mark.examples("adamw*", "muon*", "sgd*")
@pytest.mark.parametrize("entry", catalog.RECIPES + RELATIVES, ids=lambda entry: entry.id)
def test_every_recipe_can_be_injected(entry):
    """By its name alone: no argument has to be called static."""
    params = {"kernel": jnp.ones((3, 4), jnp.bfloat16)}
    tx = om.inject_hyperparams(getattr(om, entry.name))(learning_rate=0.125)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    alone = getattr(om, entry.name)(0.125)
    expected, _ = jax.jit(alone.update)(params, alone.init(params), params)
    np.testing.assert_allclose(
        np.asarray(updates["kernel"], np.float32), np.asarray(expected["kernel"], np.float32), rtol=2**-7
    )


def test_rules_are_no_schedules():
    """An argument may be a number or rules: of these a function has two arguments. Numbers are traced."""
    params = {"kernel": jnp.ones((3, 4))}
    for make, numbers, name in (
        (om.scion, {"learning_rate": 0.5, "radius": lambda path, shape: 2.0}, "learning_rate"),
        (om.scion, {"learning_rate": 0.5, "radius": 2.0}, "radius"),
        (om.normuon, {"learning_rate": 0.5, "average": "shorter"}, "eps"),
        (om.in_eigenbasis, {"inner": om.ema(0.9), "decay": 0.9, "kl": True, "largest_inverse_root": 9.0},
         "largest_inverse_root"),
    ):  # fmt: skip
        with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
            tx = om.inject_hyperparams(make)(**numbers)
            state = jax.eval_shape(tx.init, params)
            assert name in state.hyperparams
            jax.eval_shape(tx.update, params, state, params)


@pytest.mark.parametrize("rate", [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), jnp.bfloat16(0.5)])
@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "scheduled"])
def test_an_injected_number_is_one_value(rate, scheduled):
    """Of every kind, read by optax from the state; what is no schedule is set so too."""
    params = {"w": jnp.ones((4, 4))}
    tx = om.inject_hyperparams(om.adamw)(learning_rate=(lambda count: rate) if scheduled else rate)
    state = tx.init(params)
    for _ in range(2):
        assert optax.tree.get(state, "learning_rate") == 0.5
        _, state = jax.jit(tx.update)(params, state, params)
    state = optax.tree.set(state, learning_rate=jnp.float32(0.25))
    _, state = jax.jit(tx.update)(params, state, params)
    assert optax.tree.get(state, "learning_rate") == (0.5 if scheduled else 0.25)
    assert optax.tree.get(state, "last_learning_rate") == (0.5 if scheduled else 0.25)


def test_a_state_that_optax_injected_goes_on():
    params, schedule = {"w": jnp.ones((4, 4))}, optax.linear_schedule(0.5, 0.0, 4)
    ours, theirs = (
        inject(om.adamw)(learning_rate=schedule)
        for inject in (om.inject_hyperparams, functools.partial(optax.inject_hyperparams, static_args="mask"))
    )
    _, state = theirs.update(params, theirs.init(params), params)
    _, state = ours.update(params, state, params)
    assert optax.tree.get(state, "learning_rate") == 0.375


def test_arguments_without_names_may_be_left_out():
    def with_more(learning_rate, **more):
        return om.adam(learning_rate, **more)

    state = om.inject_hyperparams(with_more)(0.1).init({"w": jnp.ones(3)})
    assert [*state.hyperparams] == ["learning_rate"]


def test_injection_refuses():
    with pytest.raises(ValueError, match=r"inject_hyperparams: static_args has \['rule'\]"):
        om.inject_hyperparams(om.adam, static_args="rule")
    with pytest.raises(ValueError, match=r"hyperparam_dtype must be float32 or float64, but is bfloat16"):
        om.inject_hyperparams(om.adam, hyperparam_dtype=jnp.bfloat16)


@pytest.mark.parametrize("name", catalog.recipes_with("nu_dtype"))
def test_float16_holds_no_squares(name):
    with pytest.raises(ValueError, match=rf"{name}: nu_dtype must not be float16.*Type nu_dtype='bfloat16'"):
        getattr(om, name)(0.1, nu_dtype="float16")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "complex64", "nonsense"])
def test_dtypes_of_moments_are_those_of_real_numbers(dtype):
    for name, argument in (("sgd", "accumulator_dtype"), ("adam", "mu_dtype"), ("rmsprop", "nu_dtype")):
        with pytest.raises(ValueError, match=rf"{name}: {argument} must be one of bfloat16, .*{dtype}"):
            getattr(om, name)(0.1, **{argument: dtype})
    for make in (om.ema, om.momentum, om.accumulate):
        with pytest.raises(ValueError, match=rf"{make.__name__}: dtype must be one of"):
            make(0.5, dtype=dtype)
    with pytest.raises(ValueError, match="multi_steps: accumulator_dtype must be one of"):
        om.multi_steps(om.sgd(0.1), 2, accumulator_dtype=dtype)


def test_a_centered_variance_is_not_narrow():
    with pytest.raises(ValueError, match="rmsprop: centered=True needs nu_dtype"):
        om.rmsprop(0.1, centered=True, nu_dtype="bfloat16")
    om.rmsprop(0.1, centered=True, nu_dtype="float32")


def test_dtypes_of_what_others_replaces():
    with pytest.raises(ValueError, match="muon: nu_dtype is for the AdamW that others replaces"):
        om.muon(0.1, others=om.adam(0.1), nu_dtype="bfloat16")


@pytest.mark.parametrize("seed", [-1, 2**32, True])
def test_seeds(seed):
    with pytest.raises(ValueError, match="in_bfloat16: seed must be an integer in"):
        om.in_bfloat16(om.ema(0.9), seed=seed)


def test_float64_and_narrow_moments_of_optax_in_bfloat16():
    with jax.enable_x64(True):
        params = {"w": jnp.linspace(0.5, 1, 9)}
        tx = om.adam(0.1, nu_dtype="bfloat16")
        updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates["w"].dtype == jnp.float64
    assert second_moments(state)[0].dtype == jnp.bfloat16
    tx = om.in_bfloat16(optax.adam(0.1, mu_dtype=jnp.bfloat16))
    params = {"w": jnp.ones(9)}
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update(params, tx.init(params), params)
    assert {state.inner[0].mu["w"].dtype, state.inner[0].nu["w"].dtype} == {jnp.dtype("bfloat16")}


def test_whole_numbers_are_injected_as_real_ones():
    params = {"w": jnp.ones(3)}
    state = om.inject_hyperparams(om.adamw)(1, weight_decay=0).init(params)
    assert {x.dtype for x in state.hyperparams.values()} == {jnp.dtype("float32")}


READ = {
    "sgd": {},
    "adamw": {"weight_decay": catalog.linear(0.5, 0.5)},
    "muon": {"weight_decay": 0.25, "axes": {"*": "io"}},
    "nadamw": {"weight_decay": 0.25, "weight_decay_form": "independent"},
}


@pytest.mark.parametrize(("name", "arguments"), READ.items(), ids=READ)
def test_rates_are_read_from_the_state(name, arguments):
    """Of the last step, whether it is a schedule, a number or an array."""
    params = {"w": jnp.ones((2, 3))}
    for rate in (lambda count: 1 / (5.0 + count.astype(float)), 0.125, jnp.float32(0.125)):
        tx = getattr(om, name)(rate, **arguments)
        state = tx.init(params)
        for _ in range(4):
            _, state = jax.jit(tx.update)(params, state, params)
        part = state.inner_states["matrix"] if name == "muon" else state
        assert float(optax.tree.get(part, "last_learning_rate")) == 0.125
        decay = arguments.get("weight_decay")
        if decay is not None:
            read = float(optax.tree.get(part, "last_weight_decay"))
            assert read == (decay(3) if callable(decay) else decay)


def test_one_microbatch_needs_no_buffer():
    params = {"w": jnp.ones((2, 3))}
    tx = om.adam(0.1)
    assert jax.tree.structure(om.multi_steps(tx, 1).init(params)) == jax.tree.structure(tx.init(params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accumulator_dtype(dtype):
    params = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    state = om.multi_steps(om.sgd(0.1), 4, accumulator_dtype=dtype).init(params)
    assert state.mean["w"].dtype == jnp.dtype(dtype)


def test_the_mean_of_microbatches_is_not_rounded():
    """256 bfloat16 gradients, 1 + 1/128 and then ones: their mean is no bfloat16 number."""
    tx = om.multi_steps(optax.chain(om.accumulate()), 256)
    params = jnp.ones((), jnp.bfloat16)
    gs = jnp.ones(256, jnp.bfloat16).at[0].set(1 + 2**-7)
    state, _ = jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(params), gs)
    rounding.close(state.inner[0].total, 1 + 2**-15, units=2, condition=np.sqrt(256))


@pytest.mark.parametrize("sick", [np.nan, np.inf])
def test_a_broken_microbatch(sick):
    """It is as if it had never come; optax's own keeps it for ever."""
    params = jnp.ones(3)
    gs = [jnp.full(3, g) for g in (1.0, sick, 3.0, 5.0, 7.0)]

    def steps(tx):
        state, found = tx.init(params), []
        for g in gs:
            updates, state = jax.jit(tx.update)(g, state, params)
            found.append(float(updates[0]))
        return found, state

    found, _ = steps(om.multi_steps(om.sgd(1.0), 2))
    counted, state = steps(om.skip_nonfinite(om.multi_steps(om.sgd(1.0), 2)))
    with jax.numpy_dtype_promotion("standard"):
        theirs, _ = steps(optax.MultiSteps(om.sgd(1.0), 2).gradient_transformation())
    assert found == counted == [0, 0, -2, 0, -6]
    assert int(state.skipped) == 1
    assert np.isnan(theirs[-1])  # if this fails, optax has mended it


def test_the_inner_update_is_computed_at_every_kth_gradient_alone():
    """A branch, not a select: Muon's products would cost k times as much."""
    params = {"kernel": jnp.ones((4, 4))}
    tx = om.multi_steps(om.muon(0.1), 3)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr
    assert [eqn.primitive.name for eqn in jaxpr.eqns].count("cond") == 1
    assert "custom_partitioning" not in {eqn.primitive.name for eqn in jaxpr.eqns}


def test_each_mean_begins_anew():
    """Of numbers as far apart as float32 has digits, nothing of the mean before is left."""
    tx = om.multi_steps(om.sgd(1.0), 2)
    state, found = tx.init(jnp.zeros(())), []
    for g in (1e20, 1e20, 1.0, 3.0):
        update, state = tx.update(jnp.float32(g), state)
        found.append(float(update))
    assert found == [0, -np.float32(1e20), 0, -2]


def test_a_mean_of_large_numbers():
    tx, state = om.multi_steps(om.sgd(1.0), 2), None
    state = tx.init(jnp.zeros(()))
    for g in (3e38, -3e38):
        update, state = tx.update(jnp.float32(g), state)
    assert float(update) == 0


def test_a_state_can_be_donated():
    """Also one that was not made under jit: no two of its arrays are the same."""
    params = {"w": jnp.ones(3)}
    tx = om.multi_steps(om.adamw(0.1), 2)
    jax.jit(tx.update, donate_argnums=1)(params, tx.init(params), params)


def test_k_may_grow():
    """As a function of the steps taken: 1, then 2."""
    tx, state = om.multi_steps(om.sgd(1.0), lambda steps: 1 + steps), None
    state, found = tx.init(jnp.zeros(())), []
    for g in (1.0, 2.0, 4.0, 3.0, 3.0, 3.0):
        update, state = tx.update(jnp.float32(g), state)
        found.append(float(update))
    assert found == [-1, 0, -3, 0, 0, -3]


@pytest.mark.parametrize("every", [0, -1, True])
def test_multi_steps_refuses(every):
    with pytest.raises(ValueError, match="multi_steps: every_k must be an integer of at least 1"):
        om.multi_steps(om.sgd(0.1), every)


def test_complex_numbers_stay_complex_in_any_dtype():
    for dtype, stored in (("bfloat16", "complex64"), ("float64", "complex128")):
        with jax.enable_x64(True):
            state = om.ema(0.9, dtype=dtype).init(jnp.ones(3, jnp.complex64))
        assert [x.dtype.name for x in jax.tree.leaves(state) if x.ndim] == [stored]


def test_forms_of_decay_are_refused_by_name():
    for name in catalog.recipes_with("weight_decay_form"):
        with pytest.raises(ValueError, match=rf"{name}: weight_decay_form .* is 'decoupled'"):
            getattr(om, name)(0.1, weight_decay_form="decoupled")


def test_cautious_decay_sees_the_smallest_numbers():
    """The product of both would be zero, or infinite."""
    tx = om.add_decayed_weights(0.5, cautious=True)
    for size in (1e-30, 1e30):
        w, g = jnp.float32([size, -size]), jnp.float32([size, size])
        updates, _ = tx.update(g, tx.init(w), w)
        rounding.close_each(updates, jnp.float32([1.5 * size, size]), units=2)


def test_independent_decay_does_not_know_the_learning_rate():
    params, nothing = {"w": jnp.ones(3)}, {"w": jnp.zeros(3)}
    for rate in (0.0, 1e-3, 1.0):
        tx = om.adamw(rate, weight_decay=0.25, weight_decay_form="independent")
        updates, _ = tx.update(nothing, tx.init(params), params)
        np.testing.assert_array_equal(updates["w"], -0.25)
