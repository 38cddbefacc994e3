"""What every public transform and recipe promises to the code around it."""

import inspect
import os
import re
import subprocess
import sys

import catalog
import chex
import cloudpickle
import formulas
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import rounding

import optimorph as om
from optimorph._core.checks import RANGES
from optimorph.linalg import NewtonSchulz

CONDITION = NewtonSchulz().table.slope
"""Of the worst, Muon; also 1 - 0.999 has one of a thousand."""

every, recipes = catalog.each(), catalog.each(catalog.RECIPES)


def parameters(entry, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        name: formulas.draw(rng, s, dtype, True) for name, s in formulas.shapes(entry, "bfloat16").items()
    }


def gradients(params, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: formulas.draw(rng, p.shape, p.dtype, True), params)


@pytest.mark.examples("*-bfloat16")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@every
def test_tree_and_dtype(entry, dtype):
    """Updates look like gradients; arrays of state are float32 or wider, whatever the gradients are."""
    tx, params = entry.build(), parameters(entry, dtype)
    first = tx.init(params)
    updates, state = jax.eval_shape(tx.update, params, first, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, first)
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.uint32)


@pytest.mark.examples("clip_by_global_norm-always", "skip_nonfinite", "multi_steps")
@every
def test_programs_grow_with_the_number_of_leaves(entry):
    """And not with its square: no leaf repeats what all leaves decide together."""

    def lines(count):
        tx, params = entry.build(), {f"kernel{k}": jnp.ones((4, 4)) for k in range(count)}
        program = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
        return program.as_text().count("\n")

    five, ten, twenty = lines(5), lines(10), lines(20)
    assert twenty - ten < 2.4 * (ten - five), (five, ten, twenty)


@every
def test_gradients_decide_the_dtype(entry):
    """bfloat16 parameters with float32 gradients, as mixed precision has them."""
    tx, params = entry.build(), parameters(entry, jnp.bfloat16)
    g = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    updates, _ = jax.eval_shape(tx.update, g, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, g)


@every
@rounding.in_float64
def test_missing_gradients(entry):
    """A None gradient gives a None update and leaves that leaf's state alone; the others do not notice.

    What all leaves decide together is decided as if it were zero. `multi_steps` takes it for a zero.
    """
    tx, params = entry.build(), parameters(entry, jnp.float64)
    g = gradients(params)
    gone = next(iter(params))
    state = tx.init(params)
    updates, after = tx.update(g | {gone: None}, state, params)
    nothing = jnp.zeros_like(g[gone]) if entry.together else g[gone]
    whole, _ = tx.update(g | {gone: nothing}, state, params)
    assert updates[gone] is None or (entry.name == "multi_steps" and not np.any(updates[gone]))
    rounding.close(updates | {gone: None}, whole | {gone: None}, condition=CONDITION)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@every
def test_absent_parameters(entry):
    """None in the parameters, as filtered modules have it."""
    tx, params = entry.build(), {**parameters(entry), "static": None}
    updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert updates["static"] is None


def changed_by_cloudpickle():
    """The entries whose optimizer, after its first use, makes another program when it was pickled."""

    def program(tx):
        state = jax.eval_shape(tx.init, params)
        return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(tx.update)(params, state, params)))

    changed = []
    for entry in catalog.ENTRIES:
        tx, params = entry.build(), parameters(entry)
        before = program(tx)
        if program(cloudpickle.loads(cloudpickle.dumps(tx))) != before:
            changed.append(entry.id)
    return changed


def test_cloudpickle():
    """In a process without the type checker of these tests, which cannot be pickled."""
    code = "import test_contract; print(test_contract.changed_by_cloudpickle())"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True) == "[]\n"


@every
def test_empty_tree(entry):
    tx = entry.build()
    updates, _ = jax.jit(tx.update)({}, tx.init({}), {})
    assert updates == {}


@every
def test_empty_leaves(entry):
    tx, params = entry.build(), {"none": jnp.zeros((0, 3)), "neither": jnp.zeros((3, 0))}
    updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.examples("*-float16")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@every
def test_zero_gradients(entry, dtype):
    """Finite in every dtype, also in float16, where 1e-8 is zero."""
    tx, params = entry.build(), parameters(entry, dtype)
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
    chex.assert_tree_all_finite((updates, state))


@pytest.mark.slow
def test_a_centered_variance_is_never_negative():
    """With a constant gradient it is 0 but for rounding, of either sign."""
    tx, g = om.rmsprop(0.1, 0.9, eps=1e-12, centered=True), jnp.linspace(-1.0, 1.0, 101)
    state = tx.init(g)
    for _ in range(200):
        updates, state = tx.update(g, state)
        assert bool(jnp.all(jnp.isfinite(updates)))


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-30, 1e-22, 1e-18])
def test_without_eps_squares_that_underflow_give_no_infinite_update(size):
    tx, g = om.adam(1.0, eps=0.0), jnp.full(3, size, jnp.float32)
    updates, _ = tx.update(g, tx.init(g))
    assert bool(jnp.all(jnp.abs(updates) <= 1.01))


@every
@rounding.in_float64
def test_masked(entry):
    """`optax.masked` hides leaves; what remains is updated as if alone."""
    tx, params = entry.build(), parameters(entry, jnp.float64)
    names = list(params)
    mask = {name: name != names[0] for name in names}
    masked = optax.masked(tx, mask)
    g = gradients(params)
    updates, _ = jax.jit(masked.update)(g, masked.init(params), params)
    np.testing.assert_array_equal(updates[names[0]], g[names[0]])
    rest = {name: g[name] for name in names[1:]}
    alone, _ = jax.jit(tx.update)(rest, tx.init(rest), {name: params[name] for name in names[1:]})
    rounding.close({name: updates[name] for name in names[1:]}, alone, condition=CONDITION)


@every
@rounding.in_float64
def test_one_trace_and_scan(entry):
    tx, params = entry.build(), parameters(entry, jnp.float64)
    traces = []

    @jax.jit
    def step(g, state):
        traces.append(1)
        return tx.update(g, state, params)

    state = tx.init(params)
    for seed in range(3):
        _, state = step(gradients(params, seed), state)
    assert len(traces) == 1
    many = jax.tree.map(lambda *x: jnp.stack(x), *[gradients(params, seed) for seed in range(3)])
    scanned, _ = jax.lax.scan(lambda s, g: step(g, s)[::-1], tx.init(params), many)
    rounding.close(scanned, state, condition=CONDITION)


@every
def test_donation(entry):
    """The new state takes the old one's place: every donated byte is reused."""
    tx, params = entry.build(), parameters(entry)
    state = tx.init(params)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p)[1], donate_argnums=1, keep_unused=True)
    analysis = step.lower(gradients(params), state, params).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@every
def test_init_from_shapes(entry):
    tx, params = entry.build(), parameters(entry)
    shapes = jax.eval_shape(tx.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, tx.init(params))
    of_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, tx.init(of_shapes))


@pytest.mark.examples("sgd*", "ada*", "rmsprop*", "nadam*", "muon*", "ema", "clip*", "debias")
@every
@rounding.in_float64
def test_in_a_chain(entry):
    """Between optax's transforms, with extra arguments passing through."""
    tx = optax.chain(optax.clip(1.0), entry.build(), optax.scale(2.0))
    params = parameters(entry, jnp.float64)
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(gradients(params), state, params, loss=1.0)
    alone = entry.build()
    clipped = jax.tree.map(lambda g: jnp.clip(g, -1, 1), gradients(params))
    expected, _ = jax.jit(alone.update)(clipped, alone.init(params), params)
    rounding.close(updates, jax.tree.map(lambda u: 2 * u, expected), condition=CONDITION)


@pytest.mark.examples("sgd-momentum", "adamw", "muon")
@recipes
def test_inside_optax_wrappers(entry):
    params = parameters(entry)
    with jax.numpy_dtype_promotion("standard"):  # optax's wrappers need it
        for wrap in (
            lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
            lambda tx: optax.apply_if_finite(tx, 2),
            lambda tx: optax.partition({"all": tx}, lambda tree: jax.tree.map(lambda _: "all", tree)),
            lambda tx: optax.with_extra_args_support(tx),
            lambda tx: optax.named_chain(("it", tx)),
        ):
            tx = wrap(entry.build())
            state = tx.init(params)
            for seed in range(2):
                updates, state = jax.jit(tx.update)(gradients(params, seed), state, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
            chex.assert_tree_all_finite(updates)


SCALARS = {
    field
    for name in om.__all__
    if inspect.isclass(state := getattr(om, name))
    for field, role in getattr(state, "roles", {}).items()
    if not role.tree
}
"""What states hold once, and not for each leaf."""


@catalog.each([entry for entry in catalog.ENTRIES if not entry.stacks])
def test_tree_map_params(entry):
    """optax finds the parameter-shaped arrays of a state, and no counts, seeds and readings."""
    tx, params = entry.build(), parameters(entry)
    state = tx.init(params)
    marked = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    before, after = (jax.tree_util.tree_leaves_with_path(tree) for tree in (state, marked))
    for (path, old), (_, new) in zip(before, after, strict=True):
        changed = old.dtype == jnp.float32 and jax.tree_util.keystr(path[-1:], simple=True) not in SCALARS
        np.testing.assert_array_equal(new, old + int(changed))


NUMBERS = [
    (name, argument)
    for name in om.__all__
    if name != "qk_clip"  # which is no factory
    and callable(factory := getattr(om, name))
    and not inspect.isclass(factory)
    for argument in inspect.signature(factory).parameters
    if argument in RANGES and (name, argument) != ("shampoo", "power")  # which is one of two
]


def required(factory):
    """Values for the arguments that a factory must be given."""
    return {
        key: om.ema(0.5) if p.annotation is optax.GradientTransformation else 0.5
        for key, p in inspect.signature(factory).parameters.items()
        if p.default is p.empty and p.kind != p.VAR_POSITIONAL
    }


EXTRA = {
    ("sgd", "dampening"): {"momentum": 0.9},
    ("muon", "others_learning_rate"): {},
}


RECIPES = sorted({entry.name for entry in catalog.RECIPES})
ALONE = [pair for pair in NUMBERS if pair[0] not in RECIPES or pair[0] in ("adamw", "muon")]
"""The numbers of the other recipes are traced all at once."""


@pytest.mark.examples("ema-decay", "clip_by_global_norm-*", "adamw-*", "muon-momentum")
@pytest.mark.parametrize(("name", "argument"), ALONE, ids=["-".join(pair) for pair in ALONE])
@rounding.in_float64
def test_every_number_may_be_traced(name, argument):
    """A vmap over any number equals a loop over it, with the values as arrays of one compiled program."""
    factory = getattr(om, name)
    needed = {key: value for key, value in required(factory).items() if key != argument}
    fixed = needed | EXTRA.get((name, argument), {})
    params = {"w": jnp.linspace(0.1, 1.0, 6).reshape(2, 3), "b": jnp.ones(2)}

    def two_steps(value):
        tx = factory(**fixed, **{argument: value})
        state = tx.init(params)
        for seed in range(2):
            updates, state = tx.update(gradients(params, seed), state, params)
        return updates

    values = jnp.asarray([0.3, 0.7])
    swept = jax.jit(jax.vmap(two_steps))(values)
    for k, value in enumerate(values.tolist()):
        rounding.close(jax.tree.map(lambda x, k=k: x[k], swept), two_steps(value), condition=CONDITION)


@pytest.mark.parametrize("name", RECIPES)
@rounding.in_float64
def test_a_sweep_is_one_program(name):
    """All numbers of a recipe at once: vmap equals separate runs, and new array values do not recompile."""
    numbers = [argument for recipe, argument in NUMBERS if recipe == name]
    params = {"w": jnp.linspace(0.1, 1.0, 6).reshape(2, 3), "b": jnp.ones(2)}
    gs = [gradients(params, seed) for seed in range(2)]
    traces = []

    def train(values):
        traces.append(1)
        tx, w = getattr(om, name)(**values), params
        state = tx.init(w)
        for g in gs:
            updates, state = tx.update(g, state, w)
            w = optax.apply_updates(w, updates)
        return w

    one, many = jax.jit(train), jax.jit(jax.vmap(train))
    for values in (
        {argument: jnp.asarray([0.5, 0.9]) for argument in numbers},
        {argument: jnp.asarray([0.4, 0.8]) for argument in numbers},
    ):
        swept = many(values)
        for k in range(2):
            alone = one(jax.tree.map(lambda value, k=k: value[k], values))
            rounding.close(jax.tree.map(lambda x, k=k: x[k], swept), alone, condition=CONDITION)
    assert len(traces) == 2


@pytest.mark.parametrize("name", ["adam", "nadam", "adamw"])
def test_hyperparameters_are_never_rounded(name):
    """With bfloat16 weights and gradients .999 stays .999; a bfloat16 array keeps its own value, widened."""
    params = {"w": jnp.linspace(0.1, 1.0, 5, dtype=jnp.bfloat16)}

    def fifth(**numbers):
        tx = getattr(om, name)(0.1, eps=0.0, **numbers)
        state = tx.init(params)
        for seed in range(5):
            g = jax.tree.map(lambda p, seed=seed: (seed + 1) * p, params)
            updates, state = tx.update(g, state, params)
        return np.asarray(updates["w"], np.float32)

    np.testing.assert_array_equal(fifth(b2=jnp.float32(0.999)), fifth(b2=0.999))
    half = jnp.bfloat16(0.75)
    np.testing.assert_array_equal(fifth(b1=half, b2=half), fifth(b1=0.75, b2=0.75))


def test_masks_of_recipes():
    """A masked leaf does not decay; the others do."""
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    mask = {"w": True, "b": False}
    for name in {*catalog.recipes_with("mask")} - {"muonh"}:  # whose matrices do not decay
        tx = getattr(om, name)(0.1, weight_decay=0.5, mask=mask)
        updates, _ = tx.update(zeros, tx.init(params), params)
        assert not np.any(updates["b"])
        assert np.all(updates["w"] < 0)


@pytest.mark.parametrize("name", catalog.recipes_with("mask"))
def test_masks_without_weight_decay(name):
    """They are looked at all the same."""
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}
    for decay in ({}, {"weight_decay": 0.0}):
        with pytest.raises(ValueError, match=r"'\*kernel'"):
            getattr(om, name)(0.1, **decay, mask="*kernel").init(params)
        with pytest.warns(UserWarning, match=r"no leaf matches the rule '\*kernel' of mask"):
            getattr(om, name)(0.1, **decay, mask={"*kernel": False, "*": True}).init(params)


def test_gradient_through_an_update():
    """Finite also where a matrix is zero, as in meta-learning; Adam wants eps_root > 0 there, as in optax."""
    params = {"w": jnp.zeros((2, 3))}
    for tx in (om.muon(0.1), om.adamw(0.1, eps_root=1e-8), om.rmsprop(0.1)):
        slope = jax.grad(lambda g, tx=tx: tx.update({"w": g}, tx.init(params), params)[0]["w"].sum())(
            params["w"]
        )
        assert bool(jnp.all(jnp.isfinite(slope)))


def test_injected_without_params():
    tx = optax.inject_hyperparams(om.sgd)(learning_rate=0.1)
    params = {"w": jnp.ones(3)}
    with jax.numpy_dtype_promotion("standard"):
        tx.update(params, tx.init(params))


@recipes
def test_injected_hyperparameters(entry):
    """`optax.inject_hyperparams` reads the recipes' signatures and the learning rate can be reset."""
    params = parameters(entry)
    factory = getattr(om, entry.name)
    static = {"axes", "every", "max_dim"} & {*inspect.signature(factory).parameters}
    tx = optax.inject_hyperparams(factory, static_args=tuple(sorted(static)))(learning_rate=0.1)
    with jax.numpy_dtype_promotion("standard"):
        state = tx.init(params)
        state.hyperparams["learning_rate"] = jnp.float32(0.0)
        updates, _ = tx.update(gradients(params), state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))


@pytest.mark.slow
def test_checkpoints(tmp_path):
    """Every state goes to disk and comes back the same to the bit."""
    states = {}
    for entry in catalog.ENTRIES:
        params = parameters(entry)
        tx = entry.build()
        _, states[entry.id] = tx.update(gradients(params), tx.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "states", states)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, states)
    chex.assert_trees_all_equal(restored, states)


@pytest.mark.parametrize(
    ("mu", "nu"), [("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "float32")]
)
def test_moment_dtypes_are_kept(mu, nu):
    params = {"w": jnp.ones((2, 3))}
    tx = om.adamw(0.1, mu_dtype=mu, nu_dtype=nu)
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 2]
    assert [leaf.dtype for leaf in moments] == [mu, nu]


def test_state_size():
    """Bytes per parameter: 0 for descent, 4 with one moment, 8 with two."""
    params = {"w": jnp.ones((100, 100), jnp.bfloat16)}

    def per_parameter(tx):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(params)) if leaf.ndim) / 10_000

    assert per_parameter(om.sgd(0.1)) == 0
    for tx in (om.sgd(0.1, 0.9), om.adagrad(0.1), om.rmsprop(0.1), om.muon(0.1)):
        assert per_parameter(tx) == 4
    for tx in (om.adam(0.1), om.adamw(0.1), om.nadam(0.1), om.nadamw(0.1)):
        assert per_parameter(tx) == 8


def test_fewer_microbatches_after_a_restart():
    """A state with three gradients of four is resumed with two of two: the step is due at once."""
    params = {"w": jnp.ones(3)}
    four, two = om.multi_steps(om.sgd(1.0), 4), om.multi_steps(om.sgd(1.0), 2)
    state = four.init(params)
    for size in (1.0, 2.0, 3.0):
        _, state = four.update({"w": jnp.full(3, size)}, state)
    updates, state = two.update({"w": jnp.full(3, 6.0)}, state)
    np.testing.assert_array_equal(updates["w"], -3.0)
    for expected in (0.0, -5.0):
        updates, state = two.update({"w": jnp.full(3, 5.0)}, state)
        np.testing.assert_array_equal(updates["w"], expected)


def test_counts_restored_as_integers():
    """As JSON or a dictionary of Python numbers restores them."""
    tx = om.skip_nonfinite(om.multi_steps(om.adamw(0.1), 2))
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(5):
        plain = jax.tree.map(lambda x: int(x) if x.dtype == jnp.int32 else x, state)
        updates, state = tx.update(params, state, params)
        again, _ = tx.update(params, plain, params)
        np.testing.assert_array_equal(again["w"], updates["w"])
