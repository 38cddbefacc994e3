"""Moments in codes: float32 changes nothing, slabs have the same codes, nothing large is made on the way."""

import functools
import re
import warnings
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
import rounding
from flax import nnx
from float32 import Float32
from jax.sharding import PartitionSpec as P

import optimorph as om
from optimorph._core.moments import OPTAX_FIELDS, moments_of
from optimorph._core.target import Target
from optimorph._storage import slabs
from optimorph.codecs import BFloat16, Float8, Nonneg8, Signed8, Split16

SHAPES = {"kernel": (37, 256), "bias": (130,)}
STACK = {"heads": (3, 32, 130)}
WIDE = {"*": Float32()}
CODES = {"first/*": Signed8(), "second/*": Nonneg8()}
CHANCE = {"*": BFloat16(stochastic=True)}


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    monkeypatch.setitem(slabs.SIZES, "cpu", (1 << 10, 1 << 11))


@pytest.fixture(autouse=True)
def promotion():
    """As optax's transformations need it; the others have tests of their own for that."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def drawn(seed=0, shapes=None, dtype=jnp.float32, size=1.0):
    rng = np.random.default_rng(seed)
    shapes = SHAPES if shapes is None else shapes
    return {name: jnp.asarray(size * rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def stacked(steps, **options):
    return jax.tree.map(lambda *g: jnp.stack(g), *[drawn(10 + k, **options) for k in range(steps)])


def follow(tx, params, gradients):
    """Every update and the last state; the parameters stay where they are."""

    def step(state, g):
        updates, state = tx.update(g, state, params)
        return state, updates

    state, updates = jax.lax.scan(step, tx.init(params), gradients)
    return updates, state


def together(transforms, params, gradients, options=rounding.EXACT):
    """`follow` of several, in one program."""

    @functools.partial(jax.jit, compiler_options=options)
    def run(params, gradients):
        return [follow(tx, params, gradients) for tx in transforms]

    return run(params, gradients)


def apart(a, b):
    """How many steps of float32 two arrays differ by at most."""
    a, b = (np.asarray(x, np.float32).view(np.int32).astype(np.int64) for x in (a, b))
    return np.abs(np.where(a < 0, -(2**31) - a, a) - np.where(b < 0, -(2**31) - b, b)).max(initial=0)


# 1. Float32 changes nothing

RECIPES = {
    "sgd": om.sgd(0.1, 0.9),
    "adagrad": om.adagrad(0.1),
    "rmsprop": om.rmsprop(0.1, momentum=0.9),
    "adam": om.adam(0.1),
    "adamw-masked": om.adamw(0.1, weight_decay=0.1, mask={"kernel": False, "*": True}),
    "cautious": om.adamw(0.1, weight_decay=0.1, weight_decay_form="cautious"),
    "mask by shape": om.adamw(0.1, weight_decay=0.1, mask=lambda path, shape: shape[0] in (37, 130)),
    "optax.adamw": optax.adamw(0.1, weight_decay=0.1, mask=lambda t: jax.tree.map(lambda x: x.ndim > 1, t)),
    "optax.sgd": optax.sgd(0.1, 0.9, nesterov=True),
    "optax.rmsprop": optax.rmsprop(0.1, initial_scale=0.5),
    "optax.adagrad": optax.adagrad(0.1),
    "optax.lion": optax.lion(0.1),
    "optax.amsgrad": optax.amsgrad(0.1),
    "optax.adabelief": optax.adabelief(0.1),
    "partition": optax.partition(
        {"m": om.adam(0.1), "v": optax.sgd(0.1, 0.9)},
        lambda t: jax.tree.map(lambda x: "m" if x.ndim > 1 else "v", t),
    ),
    "masked": optax.masked(om.adam(0.1), lambda t: jax.tree.map(lambda x: x.shape[0] == 37, t)),
    "schedule": optax.adam(optax.piecewise_interpolate_schedule("linear", 0.1, {2: 0.5, 4: 0.1})),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "one after the other": optax.named_chain(("a", om.ema(0.9)), ("b", optax.scale_by_adam())),
}

ROOTS = ("optax.rmsprop", "optax.adagrad")
"""Of 1 / root(v), which processors only approximate, one number at a time and four at a time differ."""


@pytest.mark.examples("adam", "optax.adamw", "muon")
@pytest.mark.parametrize("name", RECIPES)
def test_float32_changes_nothing(name):
    """Whole leaves and slabs, with a tail: every update and the state, to the bit."""
    tx = RECIPES[name]
    both = [om.compress_state(tx, WIDE, elementwise=elementwise) for elementwise in (False, True)]
    params, gradients = drawn(), stacked(3)
    (updates, state), *others = together([tx, *both], params, gradients)
    for found, after in others:
        chex.assert_trees_all_equal(after.inner, state)
        for leaf in SHAPES:
            assert apart(found[leaf], updates[leaf]) <= 4 * (name in ROOTS)
        assert after.noise_count == 3


def test_float32_changes_nothing_of_matrices():
    tx = optax.contrib.muon(0.1)
    params, gradients = (
        drawn(shapes={"w": (64, 80), "b": (80,)}),
        stacked(2, shapes={"w": (64, 80), "b": (80,)}),
    )
    (updates, state), (found, after) = together([tx, om.compress_state(tx, WIDE)], params, gradients)
    chex.assert_trees_all_equal(found, updates)
    chex.assert_trees_all_equal(after.inner, state)


@pytest.mark.examples("float32-bfloat16-tx1")
@pytest.mark.parametrize(
    ("weights", "gradients", "tx"),
    [
        ("bfloat16", "bfloat16", om.adamw(0.1)),
        ("float32", "bfloat16", om.sgd(0.1, 0.9)),
        ("float32", "bfloat16", optax.adamw(0.1)),
        ("bfloat16", "float32", om.adam(0.1)),
    ],
)
def test_float32_changes_nothing_of_narrow_ones(weights, gradients, tx):
    """Also where an update is wider than its gradient, whose place it cannot take. All run in float32."""
    both = [om.compress_state(tx, WIDE, elementwise=elementwise) for elementwise in (False, True)]
    (updates, state), *others = together(
        [om.in_float32(tx), *both], drawn(dtype=weights), stacked(2, dtype=gradients)
    )
    for found, after in others:
        chex.assert_trees_all_equal_dtypes(found, updates)
        chex.assert_trees_all_equal(found, updates)
        chex.assert_trees_all_equal(after.inner, state)


# 2. Slabs or not

RULES = {
    "default": (None, om.adam(0.1), SHAPES),
    "a stack": (None, optax.lion(0.1), STACK),
    "linear": ({"*": Signed8(48, mapping="linear", scale_dtype="bfloat16")}, om.ema(0.9), SHAPES),
    "by chance": (CHANCE, om.adam(0.1), SHAPES),
    "split": ({"first/*": Split16(), "second/*": Float32()}, optax.amsgrad(0.1), SHAPES),
}


@pytest.mark.examples("default")
@pytest.mark.parametrize(("rules", "tx", "shapes"), RULES.values(), ids=RULES)
def test_codes_are_the_same_slab_by_slab(rules, tx, shapes):
    both = [om.compress_state(tx, rules, elementwise=elementwise) for elementwise in (False, True)]
    (updates, state), (found, after) = together(both, drawn(shapes=shapes), stacked(3, shapes=shapes))
    chex.assert_trees_all_equal(after, state)
    chex.assert_trees_all_equal(found, updates)


def test_an_update_is_of_what_has_not_been_encoded():
    tx = om.compress_state(om.momentum(0.0), {"*": Signed8()}, elementwise=True)
    params = {"kernel": drawn()["kernel"]}
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    chex.assert_trees_all_equal(updates, params)
    assert state.inner.velocity["kernel"].dtype == jnp.int8


# 3. Which are moments, and what they become


def kinds(tx, params=None):
    state = tx.init(drawn(shapes={"w": (2, 3)}) if params is None else params)
    return [kind for kind, _ in moments_of(state)]


def sure(transform):
    """An optax wrapper of a transformation."""
    return transform.gradient_transformation() if isinstance(transform, optax.MultiSteps) else transform


MOMENTS = [
    (om.sgd(0.1), []),
    (om.sgd(0.1, 0.9), ["first"]),
    (om.ema(0.9), ["first"]),
    (om.adagrad(0.1), ["second"]),
    (om.rmsprop(0.1), ["second"]),
    (om.rmsprop(0.1, momentum=0.9), ["second", "first"]),
    (om.rmsprop(0.1, centered=True), []),
    (om.rmsprop(0.1, centered=True, momentum=0.9), ["first"]),
    (om.adamw(0.1), ["first", "second"]),
    (om.ademamix(0.1), ["first", "slow", "second"]),
    (om.add(om.ema(0.9), om.ema(0.99)), ["first", "first"]),
    (om.divide(om.ema(0.9), by=om.add(om.ema(0.9), om.ema(0.99))), ["first"]),
    (om.nadamw(0.1), ["first", "second"]),
    (om.divide(om.momentum(0.9), by=om.ema(0.9)), ["first", "second"]),
    (om.skip_nonfinite(om.adam(0.1)), ["first", "second"]),
    (om.multi_steps(om.adam(0.1), 2), ["first", "second"]),
    (om.inject_hyperparams(om.adam)(0.1), ["first", "second"]),
    (om.in_float32(om.ema(0.9)), ["first"]),
    (om.partition({"*": "a"}, {"a": om.adam(0.1), "b": om.sgd(0.1, 0.9)}), ["first", "second", "first"]),
    (optax.sgd(0.1, 0.9), ["first"]),
    (optax.ema(0.9), ["first"]),
    (optax.adam(0.1), ["first", "second"]),
    (optax.nadam(0.1), ["first", "second"]),
    (optax.adamax(0.1), ["first", "second"]),
    (optax.yogi(0.1), ["first", "second"]),
    (optax.amsgrad(0.1), ["first", "second", "second"]),
    (optax.adabelief(0.1), ["first", "second"]),
    (optax.lion(0.1), ["first"]),
    (optax.rmsprop(0.1), ["second"]),
    (optax.rmsprop(0.1, bias_correction=True), ["second"]),
    (optax.rmsprop(0.1, centered=True), []),
    (optax.adagrad(0.1), ["second"]),
    (optax.contrib.muon(0.1), ["first", "second", "first"]),
    (optax.adafactor(0.1), []),
    (optax.masked(optax.adam(0.1), True), ["first", "second"]),
    (optax.named_chain(("a", optax.trace(0.9)), ("b", optax.scale_by_rms())), ["first", "second"]),
    (optax.MultiSteps(optax.adam(0.1), 2), ["first", "second"]),
    (optax.apply_if_finite(optax.adam(0.1), 2), ["first", "second"]),
    (optax.inject_hyperparams(optax.adam)(0.1), ["first", "second"]),
]


def test_every_moment_is_known():
    for k, (tx, expected) in enumerate(MOMENTS):
        assert kinds(sure(tx)) == expected, k


def test_every_name_is_one_of_a_state():
    """Of this library or of optax, with those fields."""
    known = {}
    for tx, _ in MOMENTS:
        found = sure(tx).init(drawn(shapes={"w": (2, 3)}))
        nodes = [found]
        while nodes:
            node = nodes.pop()
            if hasattr(node, "_fields"):
                known.setdefault(type(node).__name__, set()).update(node._fields)
            nodes += (
                (node.values() if isinstance(node, dict) else node) if isinstance(node, tuple | dict) else ()
            )
    for name, fields in OPTAX_FIELDS.items():
        assert fields.keys() <= known[name], name


NAMED = {
    "kernel": (64, 64),
    "token_embedding": (64, 64),
    "bias": (64, 64),
    "small": (63, 65),
    "vector": (5000,),
    "stack": (2, 2048),
    "norm/scale": (64, 64),
    "scalar": (),
    "empty": (0, 64),
}


def test_defaults():
    """Codes for large leaves of two axes at least; the other roles stay in float32."""
    state = om.compress_state(om.adam(0.1)).init(drawn(shapes=NAMED))
    first, second = (moment for _, moment in moments_of(state.inner))
    for name, shape in NAMED.items():
        narrow = name in ("kernel", "stack")
        assert first[name].dtype == (jnp.int8 if narrow else jnp.float32), name
        assert second[name].dtype == (jnp.uint8 if narrow else jnp.float32), name
        for scales in state.scales:
            assert scales[name].ndim == len(shape)
    assert state.scales[0]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(first["kernel"], 0)


def test_rules():
    """The first that matches, by moment and path; `...` is as by default, None as it is."""
    tree = drawn(shapes={"kernel": (64, 64), "token_embedding": (64, 64), "head": (64, 64)})
    rules = {
        "first/head": None,
        "first/*embed*": Float8(),
        "second/kernel": BFloat16(stochastic=True),
        "second/head": ...,
        "first/*": Signed8(mapping="linear"),
    }
    functions = [
        lambda path, shape: {"first/head": None, "second/kernel": BFloat16(True)}.get(
            path,
            ... if path.startswith("second") else Float8() if "embed" in path else Signed8(),
        )
    ]
    for each in (rules, *functions):
        state = om.compress_state(om.adam(0.1), each).init(tree)
        first, second = (moment for _, moment in moments_of(state.inner))
        assert [first[n].dtype for n in sorted(tree)] == [jnp.float32, jnp.int8, jnp.float8_e4m3fn]
        assert [second[n].dtype for n in sorted(tree)] == [jnp.uint8, jnp.bfloat16, jnp.float32]


def test_rules_that_say_nothing_right():
    tree = drawn(shapes={"w": (64, 64)})
    with pytest.raises(ValueError, match="the rules give 'int8' for 'first/w', which is not a codec"):
        om.compress_state(om.adam(0.1), {"first/*": "int8"}).init(tree)
    with pytest.raises(ValueError, match=r"rules must say which moments .* Type {'first'"):
        om.compress_state(om.ema(0.9), Signed8())
    with pytest.raises(ValueError, match=r"give Nonneg8.* for 'first/w', whose numbers have signs"):
        om.compress_state(om.adam(0.1), {"*": Nonneg8()}).init(tree)
    for codec in (Signed8(), Float8()):
        with pytest.raises(ValueError, match="for 'second/w', which can round to 0"):
            om.compress_state(om.adam(0.1), {"second/*": codec}).init(tree)
    with pytest.raises(ValueError, match="which is not a codec"):
        om.compress_state(om.adam(0.1), lambda path, shape: Signed8).init(tree)
    with pytest.warns(UserWarning, match="no moment matches the rule 'frist/w'"):
        om.compress_state(om.adam(0.1), {"frist/w": Signed8(), "first/w": None}).init(tree)
    with pytest.raises(ValueError, match="several leaves have the path 'a/b'"):
        om.compress_state(om.adam(0.1)).init({"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}})
    for seed in (-1, 2**32, True):
        with pytest.raises(ValueError, match="seed must be an integer"):
            om.compress_state(om.adam(0.1), seed=seed)


@pytest.mark.parametrize(
    "rules", [{"*": None}, {"first/*": Float8()}, {"first/*": BFloat16()}], ids=["none", "float8", "bfloat16"]
)
def test_a_state_of_other_rules(rules):
    tree = drawn(shapes={"w": (64, 64)})
    state = om.adam(0.1, state="int8").init(tree)
    with pytest.raises(ValueError, match="'first/w' is stored in int8 with 2 scales a row, but the rules"):
        om.adam(0.1, state=rules).update(tree, state, tree)


@pytest.mark.parametrize("inner", [om.ema(0.9), optax.ema(0.9)], ids=["om", "optax"])
def test_a_state_in_float8_of_other_rules(inner):
    """Its codes are floats too, but not the moments."""
    tree = drawn(shapes={"w": (64, 64)})
    state = om.compress_state(inner, {"first/*": Float8()}).init(tree)
    with pytest.raises(ValueError, match="'first/w' is stored in float8_e4m3fn with 2 scales a row, but the"):
        om.compress_state(inner, {"*": None}).update(tree, state, tree)


def test_a_state_of_other_blocks():
    tree = drawn(shapes={"w": (64, 256)})
    state = om.adam(0.1, state={"first/*": Signed8(64), "second/*": Nonneg8()}).init(tree)
    with pytest.raises(
        ValueError, match="'first/w' is stored in int8 with 16 scales a row, but the rules say"
    ):
        om.adam(0.1, state="int8").update(tree, state, tree)


@pytest.mark.parametrize("elementwise", [False, True])
def test_a_state_in_float32(elementwise):
    tree, tx = drawn(shapes={"w": (64, 64)}), om.adam(0.1)
    wrapped = om.compress_state(tx, elementwise=elementwise)
    with pytest.raises(ValueError, match=r"state.* Type state = tx\.init"):
        wrapped.update(tree, tx.init(tree), tree)


@pytest.mark.parametrize("state", ["int4", jnp.int8, True, ["int8"]], ids=str)
@pytest.mark.parametrize("recipe", [om.adam, om.muon])
def test_what_state_may_not_be(recipe, state):
    with pytest.raises(ValueError, match=rf"{recipe.__name__}: state must be .int8., the rules of"):
        recipe(0.1, state=state)


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [(om.sgd, "accumulator_dtype"), (om.adagrad, "nu_dtype"), (om.adamw, "mu_dtype"), (om.muon, "mu_dtype")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_moments_are_stored_in_one_way(recipe, dtype):
    with pytest.raises(ValueError, match=rf"{recipe.__name__}: state and {dtype}='bfloat16' both say"):
        recipe(0.1, state="int8", **{dtype: "bfloat16"})
    recipe(0.1, state="int8", **{dtype: "float32"})


def test_rules_of_muon_that_mean_nothing():
    tree = drawn(shapes={"up/kernel": (64, 64), "embed": (64, 64)})
    rules = {"first/up*": Signed8(64), "second/embed": Nonneg8()}
    om.muon(0.1, state=rules).init(tree)
    with pytest.warns(UserWarning, match=r"muon: no moment matches the rule 'frist/\*' of state"):
        om.muon(0.1, state=rules | {"frist/*": None}).init(tree)


def test_numbers_of_python_in_a_state():
    class Odd(NamedTuple):
        steps: int
        velocity: Any

    odd = optax.GradientTransformation(
        lambda params: Odd(0, jax.tree.map(jnp.zeros_like, params)), lambda g, state, params=None: (g, state)
    )
    fields = {"Odd": {"velocity": "first"}}
    tree = drawn(shapes={"w": (64, 64)})
    state = om.compress_state(odd, fields=fields).init(tree)
    assert (state.inner.steps, state.inner.velocity["w"].dtype) == (0, jnp.int8)


def test_moments_of_a_difference():
    """They stay as they are, which is said."""
    with pytest.warns(UserWarning, match=r"average is not compressed, .* or it is a term of a difference"):
        om.rmsprop(0.1, centered=True, state="int8").init(drawn(shapes={"w": (64, 64)}))


def test_other_states():
    """Of which nothing is known they stay as they are, unless `fields` says what they hold."""
    tree, tx = drawn(shapes={"w": (64, 64)}), optax.contrib.ademamix(0.1)
    own = {"ScaleByAdemamixState": {"m1": "first", "nu": "second", "m2": "other"}}
    bare = tx.init(tree)
    with pytest.warns(UserWarning, match=r"ScaleByAdemamixState\.(m1|m2|nu) is not compressed"):
        chex.assert_trees_all_equal(om.compress_state(tx).init(tree).inner, bare)
    known = om.compress_state(tx, {"other/*": BFloat16(), "*": ...}, fields=own, elementwise=True)
    state = known.init(tree)
    dtypes = {str(x.dtype) for x in jax.tree.leaves(state.inner) if x.ndim}
    assert dtypes == {"int8", "uint8", "bfloat16"}
    _, state = jax.jit(known.update)(tree, state, tree)
    assert {str(x.dtype) for x in jax.tree.leaves(state.inner) if x.ndim} == dtypes


def test_a_moment_that_begins_elsewhere():
    """At the number that it has everywhere, to the bit."""
    tree = drawn(shapes={"w": (64, 64)})
    state = om.compress_state(om.adagrad(0.1, 0.3)).init(tree)
    assert state.inner[1].by[1].total["w"].dtype == jnp.uint8
    decoded = Nonneg8().decode(om.codecs.Encoded(state.inner[1].by[1].total["w"], state.scales[0]["w"]))
    np.testing.assert_array_equal(decoded, np.float32(0.3))


@pytest.mark.examples("none-True")
@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("missing", [None, np.zeros((37, 256), jax.dtypes.float0)], ids=["none", "float0"])
def test_where_gradients_are_missing_so_is_the_step(elementwise, missing):
    """The state stays to the bit; that of integers is none of anything."""
    tx = om.compress_state(
        om.adam(0.1),
        {"first/*": Signed8(mapping="linear", scale_dtype="bfloat16"), "second/*": Nonneg8()},
        elementwise=elementwise,
    )
    params = drawn(shapes=SHAPES | {"other": (37, 256)}) | {"steps": jnp.arange(3)}
    fresh = tx.init(params)

    @jax.jit
    def run(g, state):
        _, state = tx.update({**g, "steps": None}, state, params)
        return state, tx.update({**g, "steps": None, "kernel": missing}, state, params)

    state, (updates, after) = run(drawn(1, shapes=SHAPES | {"other": (37, 256)}), fresh)
    assert updates["kernel"] is None
    assert updates["steps"] is None
    chex.assert_trees_all_equal_structs(after, state, fresh)
    for (_, old), (_, new) in zip(moments_of(state.inner), moments_of(after.inner), strict=True):
        np.testing.assert_array_equal(new["kernel"], old["kernel"])
        for name in ("other", "bias"):
            assert np.any(new[name] != old[name])
    for old, new in zip(state.scales, after.scales, strict=True):
        np.testing.assert_array_equal(new["kernel"], old["kernel"])


def test_moments_that_are_no_tree_of_the_parameters():
    """A flat vector of all moves on, whatever it is stored by."""
    tx = om.compress_state(optax.flatten(optax.sgd(1.0, 0.9)), {"*": BFloat16()})
    params = drawn(shapes={"a": (64, 64), "b": (3,)})
    (updates, _), (found, after) = together(
        [optax.sgd(1.0, 0.9), tx], params, jax.tree.map(lambda x: jnp.ones((3, *x.shape)), params)
    )
    rounding.close(found, updates, units=2, dtype="bfloat16")  # two velocities are stored
    assert after.inner[0].trace.dtype == jnp.bfloat16


@pytest.mark.parametrize("elementwise", [False, True])
def test_complex_and_float64_stay_as_they_are(elementwise):
    with jax.enable_x64():
        shapes = {"w": (64, 64), "z": (64, 64), "d": (64, 64)}
        params = drawn(shapes=shapes)
        params |= {"z": params["z"] + 1j * params["w"], "d": params["d"].astype(jnp.float64)}
        params = {
            k: jnp.asarray(v, {"w": "float32", "z": "complex64", "d": "float64"}[k])
            for k, v in params.items()
        }
        tx = om.sgd(0.1, 0.9)
        state = (wrapped := om.compress_state(tx, elementwise=elementwise)).init(params)
        velocity = moments_of(state.inner)[0][1]
        assert [velocity[k].dtype for k in ("w", "z", "d")] == [jnp.int8, jnp.complex64, jnp.float64]
        updates, state = jax.jit(wrapped.update)(params, state, params)
        whole, bare = jax.jit(tx.update)(params, tx.init(params), params)
        chex.assert_trees_all_equal(updates, whole)
        for name in ("z", "d"):
            np.testing.assert_array_equal(moments_of(state.inner)[0][1][name], moments_of(bare)[0][1][name])


# 4. What is element-wise


def made(f):
    return optax.stateless(lambda updates, _: jax.tree.map(f, updates))


def scanned(x):
    return jax.lax.scan(lambda c, row: (c + row, c + row), jnp.zeros(x.shape[-1]), x)[1]


WINDOW = -jnp.inf, jax.lax.max, (3, 3), (1, 1), "SAME"
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])

MIXING = {
    "clip_by_global_norm": (om.clip_by_global_norm(1.0), "reduce_"),
    "optax.clip_by_global_norm": (optax.clip_by_global_norm(1.0), "reduce_sum"),
    "skip_nonfinite": (om.skip_nonfinite(om.ema(0.9)), "reduce_and"),
    "add_noise": (optax.add_noise(0.1, 0.5, jax.random.key(0)), ""),
    "cumsum": (made(lambda x: jnp.cumsum(x, -1)), "cumsum"),
    "scan": (made(scanned), "scan"),
    "roll": (made(lambda x: jnp.roll(x, 1, 0)), "slice"),
    "shift": (made(lambda x: jax.lax.pad(x, jnp.float32(0), [(1, -1, 0), (0, 0, 0)])), "pad"),
    "transpose": (made(jnp.transpose), "transpose"),
    "cholesky": (made(jnp.linalg.cholesky), "cholesky|transpose"),
    "product": (made(lambda x: x @ x), "dot_general"),
    "sort": (made(jnp.sort), "sort"),
    "reversed": (made(lambda x: jax.lax.rev(x, (0,))), "rev"),
    "fft": (made(lambda x: jnp.fft.fft(x).real), "fft"),
    "window": (made(lambda x: jax.lax.cummax(x) - jax.lax.reduce_window(x, *WINDOW)), "cummax"),
    "largest in a window": (made(lambda x: jax.lax.reduce_window(x, *WINDOW)), "reduce_window"),
    "row by row": (made(lambda x: x[jnp.arange(x.shape[0])[::-1]]), "gather|rev|iota"),
    "set": (made(lambda x: x.at[0].set(0.0)), "scatter|dynamic_update"),
    "while": (made(lambda x: jax.lax.fori_loop(0, 3, lambda k, y: y + y, x)), "scan|while"),
    "constrained": (made(lambda x: jax.lax.with_sharding_constraint(x, HERE)), "sharding_constraint"),
    "places": (made(lambda x: x * jax.lax.broadcasted_iota(jnp.float32, x.shape, 0)), "iota"),
    "a table": (made(lambda x: x * jnp.asarray(np.linspace(0, 1, x.size).reshape(x.shape), x.dtype)), ""),
    "its mean": (made(lambda x: x - x.mean()), "reduce_sum"),
    "rows": (made(lambda x: x * jnp.arange(x.shape[0], dtype=x.dtype)[:, None]), "iota"),
    "centered": (optax.scale_by_stddev(), "neither scalars nor known moments"),
    "factored": (optax.scale_by_factored_rms(min_dim_size_to_factor=2), "neither scalars nor known moments"),
    "a second average": (optax.contrib.scale_by_ademamix(), "neither scalars nor known moments"),
    "flags of leaves": (optax.zero_nans(), "neither scalars nor known moments"),
    "muon": (om.muon(0.1, axes={"*": "io"}), "'"),
}


@pytest.mark.filterwarnings("ignore:compress_state. (ScaleByRStdDev|Factored|ScaleByAdemamix)State")
@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_places_is_refused(name):
    """Naming what does so; where the word is not given it goes."""
    tx, primitive = MIXING[name]
    params = drawn(shapes={"kernel": (128, 128), "other": (128, 128)})
    chained = optax.chain(om.momentum(0.9), tx)
    wrapped = om.compress_state(chained, elementwise=True)
    with pytest.raises(
        ValueError, match=f"the update of 'kernel' uses .*({primitive}).*, which mixes elements"
    ):
        jax.eval_shape(wrapped.update, params, wrapped.init(params), params)
    whole = om.compress_state(chained)
    jax.eval_shape(whole.update, params, whole.init(params), params)


@pytest.mark.filterwarnings("ignore:compress_state. no moment is compressed")
@pytest.mark.parametrize("rules", [None, {"*kernel": Signed8(), "*": None}, {"*": None}])
def test_small_leaves_are_updated_together(rules):
    """Where no leaf is large, nothing is checked, so all moments are decoded at once."""
    params = drawn(shapes={"kernel": (64, 96), "other": (12, 8)})
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, 0.9))
    compressed = om.compress_state(tx, rules, elementwise=True)
    updates, _ = compressed.update(params, compressed.init(params), params)
    rounding.close(updates, tx.update(params, tx.init(params), params)[0])


def test_fields_make_unknown_moments_known():
    """As the error says."""
    tx = optax.chain(optax.trace(0.9), optax.contrib.ademamix(0.1))
    params = drawn(shapes={"kernel": (128, 128)})
    fields = {"ScaleByAdemamixState": {"m1": "first", "m2": "slow", "nu": "second"}}
    with pytest.warns(UserWarning, match="is not compressed"):
        state = om.compress_state(tx, elementwise=True).init(params)
    with pytest.raises(ValueError, match=r"not known, type fields=\{'MyState'"):
        om.compress_state(tx, elementwise=True).update(params, state, params)
    known = om.compress_state(tx, elementwise=True, fields=fields)
    updates, _ = known.update(params, known.init(params), params)
    assert updates["kernel"].any()


def test_leaves_that_know_of_each_other_are_refused():
    def update(updates, state, params=None):
        return updates | {"kernel": updates["kernel"] * updates["other"]}, state

    params = drawn(shapes={"kernel": (128, 128), "other": (128, 128)})
    both = optax.chain(om.momentum(0.9), optax.GradientTransformation(lambda params: (), update))
    tx = om.compress_state(both, elementwise=True)
    with pytest.raises(ValueError, match="the update of 'kernel' uses other leaves"):
        jax.eval_shape(tx.update, params, tx.init(params), params)


def test_moments_of_another_shape_are_refused():
    params = drawn(shapes={"kernel": (128, 128), "other": (128, 128)})
    tx = om.compress_state(optax.flatten(optax.adam(0.1)), elementwise=True)
    with pytest.raises(ValueError, match="the moments are not trees like the parameters"):
        jax.eval_shape(tx.update, params, tx.init(params), params)


def test_what_fails_for_its_own_reasons_is_not_called_a_mixture():
    def update(updates, state, params=None):
        raise TypeError("of my own")

    params = drawn(shapes={"kernel": (128, 128), "other": (128, 128)})
    own = optax.chain(om.momentum(0.9), optax.GradientTransformation(lambda params: (), update))
    tx = om.compress_state(own, elementwise=True)
    with pytest.raises(TypeError, match="of my own"):
        jax.eval_shape(tx.update, params, tx.init(params), params)


def test_a_state_that_gathers_is_refused():
    def update(updates, state, params=None):
        return updates, optax.tree.norm(updates)

    params = drawn(shapes={"kernel": (128, 128)})
    both = optax.chain(om.momentum(0.9), optax.GradientTransformation(lambda params: jnp.float32(0), update))
    tx = om.compress_state(both, elementwise=True)
    with pytest.raises(ValueError, match="uses a 'reduce_sum'"):
        jax.eval_shape(tx.update, params, tx.init(params), params)


def test_rounding_by_chance_is_refused():
    """Of a state that stays in bfloat16: its bits are those of places; with a codec it rounds for itself."""
    tx, params = om.adam(0.1, nu_dtype="bfloat16"), drawn()
    refused = om.compress_state(tx, {"second/*": None, "*": ...}, elementwise=True)
    with pytest.raises(ValueError, match=r"^compress_state: a moment without a codec is in bfloat16"):
        jax.eval_shape(refused.update, params, refused.init(params), params)
    fine = om.compress_state(tx, CHANCE, elementwise=True)
    assert jax.eval_shape(fine.update, params, fine.init(params), params)


ELEMENTWISE = {
    "nadamw": om.nadamw(0.1, weight_decay_form="independent"),
    "mu_dtype": om.adamw(0.1, mu_dtype="bfloat16"),
    "dampened": om.sgd(0.1, 0.9, dampening=0.5),
    "injected": om.inject_hyperparams(om.adam)(learning_rate=optax.linear_schedule(0.1, 0.0, 10)),
    "clip": optax.chain(optax.clip(1.0), om.adam(0.1)),
    "optax.nadam": optax.nadam(0.1),
    "optax.radam": optax.radam(0.1),
    "optax.yogi": optax.yogi(0.1),
    "optax.adamax": optax.adamax(0.1),
    "warm-up": optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 100)),
    "leaf by leaf": optax.chain(
        om.adam(0.1),
        optax.stateless(
            lambda u, _: jax.tree.unflatten(
                jax.tree.structure(u), [(k + 1.0) * x for k, x in enumerate(jax.tree.leaves(u))]
            )
        ),
    ),
    "conjugate": optax.chain(om.adam(0.1), made(jnp.conj), made(jax.nn.relu), made(jax.nn.gelu)),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_what_is_elementwise_passes(name):
    tx, params = om.compress_state(ELEMENTWISE[name], elementwise=True), drawn()
    chex.assert_trees_all_equal_shapes(jax.eval_shape(tx.update, params, tx.init(params), params)[0], params)


def test_a_primitive_of_tomorrow_is_elementwise():
    """Nothing is known of it but that its result has the shape of its argument."""
    twice = jax.extend.core.Primitive("twice_of_tomorrow")
    twice.def_abstract_eval(lambda x: x)
    twice.def_impl(lambda x: x + x)
    jax.interpreters.mlir.register_lowering(
        twice, jax.interpreters.mlir.lower_fun(lambda x: x + x, multiple_results=False)
    )
    tx = optax.chain(om.adam(0.1), made(twice.bind))
    params = drawn()
    wrapped = {e: om.compress_state(tx, elementwise=e) for e in (True, False)}
    by_slab, whole = (jax.jit(t.update)(params, t.init(params), params)[0] for t in wrapped.values())
    chex.assert_trees_all_equal_shapes_and_dtypes(by_slab, whole)


def test_a_call_of_several_leaves_is_looked_into():
    """A jitted function of the whole tree keeps leaves apart, as optax's bias correction does."""
    together = jax.jit(lambda tree: jax.tree.map(lambda x: x / 2, tree))
    tx = optax.chain(om.adam(0.1), optax.stateless(lambda u, _: together(together(u))))
    params = drawn()
    wrapped = om.compress_state(tx, elementwise=True)
    updates, _ = jax.eval_shape(wrapped.update, params, wrapped.init(params), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


# 5. Programs

LAYERS = {f"layer_{k}": (512, 2048) for k in range(4)}


@pytest.fixture
def full_slabs(monkeypatch, small_slabs):
    monkeypatch.setitem(slabs.SIZES, "cpu", (1 << 12, 1 << 15))


@pytest.mark.usefixtures("full_slabs")
def test_memory():
    """2.1 bytes a parameter, every byte that is given back used again, and nothing large on the way."""
    tx = om.compress_state(om.adamw(0.1), elementwise=True)
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in LAYERS.items()}
    state = jax.eval_shape(tx.init, shapes)
    size = sum(x.size for x in jax.tree.leaves(shapes))
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert stored <= 2.1 * size
    update = jax.jit(tx.update, donate_argnums=(0, 1))
    memory = update.lower(shapes, state, shapes).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= stored + 4 * size - 64  # but for counts, several of which are one
    assert memory.temp_size_in_bytes <= 0.3 * size
    assert memory.output_size_in_bytes <= stored + 4 * size + 256


def test_the_order_of_leaves():
    """An update waits for the codes of its moments: GPUs and TPUs would keep all of them otherwise."""
    tx = om.compress_state(om.ema(0.9), {"first/*": Signed8()})
    params = {"kernel": jax.ShapeDtypeStruct((64, 256), jnp.float32)}
    update = jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params))
    for platform in ("cpu", "cuda", "tpu"):
        text = update.lower(lowering_platforms=(platform,)).as_text()
        assert ("optimization_barrier" in text) == (platform != "cpu")


def test_slabs_of_tpus():
    """Leaves of moderate size are updated whole; stacks of layers in slabs, as large on each device."""
    stack = (12, 768, 3072)
    assert slabs.slab_shape(stack[1:], Target("tpu")) is None
    assert slabs.slab_shape(stack, Target("tpu")) == (12, 96, 3072)
    assert slabs.slab_shape(stack, Target("tpu", devices=8)) is None
    assert slabs.slab_shape((8, *stack), Target("tpu", devices=8)) == (8, 12, 96, 3072)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_slabs_are_the_whole(platform, monkeypatch):
    """What is read is that of before the update, also where it is written; the last slab is shorter."""
    target, shape = Target(platform), (3, 53, 8)
    monkeypatch.setitem(slabs.SIZES, platform, (3 * 8 * 7, 3 * 8 * 7))
    monkeypatch.setattr(slabs, "ON_TPU", 3 * 8 * 7)
    assert slabs.slab_shape(shape, target) == (3, 7, 8)
    a, b, c = (jax.random.normal(jax.random.key(k), shape) for k in range(3))

    def make(written, read):
        a, b = written
        return b - read, a + 2 * b

    def store(place, made, before):
        return made[0], made[1] * place.astype(jnp.float32)

    found = jax.jit(lambda a, b, c: slabs.in_slabs(make, store, shape, target, (a, b), c))(a, b, c)
    place = jnp.arange(a.size, dtype=jnp.float32).reshape(shape)
    chex.assert_trees_all_equal(found, (b - c, (a + 2 * b) * place))


def test_one_program_for_leaves_alike():
    """Of six and one other leaf there are two."""
    tx = om.compress_state(om.sgd(0.1, 0.9), elementwise=True)
    params = drawn(shapes={f"layer_{k}/kernel": (64, 256) for k in range(6)} | {"odd": (97, 256)})
    text = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
    assert len(re.findall(r"func private @update_leaf", text)) == 2


def test_the_state_keeps_its_form():
    """The same state however it is made; its tree and dtypes stay, so that one program does for all steps."""
    tx = om.compress_state(om.sgd(0.1, 0.9), {"first/bias": BFloat16(True), "*": ...}, elementwise=True)
    params = drawn()
    state = tx.init(params)
    chex.assert_trees_all_equal(jax.jit(tx.init)(params), state)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params), state)
    traces = []

    def update(g, state):
        traces.append(1)
        return tx.update(g, state, params)

    step = jax.jit(update)
    _, after = step(params, state)
    step(params, after)
    assert len(traces) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.update, params, state, params)[1], state)


@pytest.mark.parametrize("inner", [om.sgd(0.1, 0.9), optax.sgd(0.1, 0.9)], ids=["rule", "optax"])
@pytest.mark.parametrize("name", ["TraceState.trac", "MomentumState.velocity"])
def test_fields_of_no_state(inner, name):
    state, field = name.split(".")
    with pytest.warns(UserWarning, match=f"no state has the field '{name}'"):
        om.compress_state(inner, fields={state: {field: "first"}}).init({"w": jnp.ones((2, 3))})


def test_lowered_where_x64_is_off():
    """What was traced in x64 mode, as a caller's context may end before the program is compiled."""
    tx, params = om.adamw(0.1, state="int8"), {"w": jnp.ones((2, 64, 256))}
    with jax.enable_x64(True):
        traced = jax.jit(jax.vmap(tx.update)).trace(params, jax.vmap(tx.init)(params), params)
    traced.lower()


@pytest.mark.slow
def test_vmap():
    """Over learning rates and over models, each as by itself."""
    params, rates = drawn(shapes={"w": (64, 128)}), jnp.asarray([0.1, 0.2])
    models = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)

    def run(rate, params):
        tx = om.compress_state(om.sgd(rate, 0.9), elementwise=True)
        return follow(tx, params, jax.tree.map(lambda x: jnp.stack([x, -0.5 * x]), params))

    one = jax.jit(run, compiler_options=rounding.EXACT)
    found, after = jax.jit(jax.vmap(run), compiler_options=rounding.EXACT)(rates, models)
    for k, rate in enumerate(rates):
        updates, state = one(rate, jax.tree.map(lambda x, k=k: x[k], models))
        chex.assert_trees_all_equal(jax.tree.map(lambda x, k=k: x[k], after), state)
        rounding.close(found["w"][k], updates["w"])


@pytest.mark.slow
def test_wrappers_around():
    """Accumulation, masks, partitions and chains hold the state like any other."""

    def wrapped(rate=0.1):
        return om.compress_state(om.sgd(rate, 0.9), elementwise=True)

    def matrices(t):
        return jax.tree.map(lambda x: x.ndim > 1, t)

    around = {
        "multi_steps": om.multi_steps(wrapped(), 2),
        "MultiSteps": optax.MultiSteps(wrapped(), 2).gradient_transformation(),
        "masked": optax.masked(wrapped(), matrices),
        "skip": om.skip_nonfinite(wrapped()),
        "partition": om.partition({"bias": "v", "*": "m"}, {"m": wrapped(), "v": om.sgd(0.1)}),
        "clipped": optax.chain(om.clip_by_global_norm(1.0), wrapped()),
        "injected": om.inject_hyperparams(wrapped)(rate=0.1),
    }
    for name, (updates, state) in zip(around, together([*around.values()], drawn(), stacked(2)), strict=True):
        assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(updates)), name
        assert any(x.dtype == jnp.int8 and jnp.any(x != 0) for x in jax.tree.leaves(state)), name


def test_inside_multi_steps_and_lookahead():
    """A wrapper's own averages stay as they are; its inner state is compressed."""
    tx = om.compress_state(optax.MultiSteps(om.sgd(0.1, 0.9), 2).gradient_transformation())
    params = drawn()
    ((_, state),) = together([tx], params, stacked(2))
    assert {x.dtype for x in jax.tree.leaves(state.inner.acc_grads)} == {jnp.dtype("float32")}
    assert moments_of(state.inner)[0][1]["kernel"].dtype == jnp.int8
    pair = optax.LookaheadParams(params, params)
    look = om.compress_state(optax.lookahead(om.adam(0.1), 2, 0.5))
    _, state = jax.jit(look.update)(params, look.init(pair), pair)
    assert moments_of(state.inner)[1][1]["kernel"].dtype == jnp.uint8


def test_nnx():
    model = nnx.Linear(128, 64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, om.compress_state(om.adam(0.1), elementwise=True), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda m: (m(x) ** 2).mean())(model))

    before = np.asarray(model.kernel[...])
    for _ in range(2):
        step(model, optimizer, jnp.ones((4, 128)))
    leaves = jax.tree.leaves(nnx.state(optimizer))
    assert [x.shape for x in leaves if x.dtype in (jnp.int8, jnp.uint8)] == [(128, 64)] * 2
    assert np.all(np.abs(np.asarray(model.kernel[...]) - before) > 0.01)


def test_orbax(tmp_path):
    """To disk and back: the same bits, and the same afterwards."""
    tx = om.compress_state(om.adam(0.1), elementwise=True)
    params = drawn()
    update = jax.jit(tx.update)
    _, state = update(drawn(1), tx.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal(update(drawn(2), restored, params), update(drawn(2), state, params))


def test_map_params():
    """Codes and scales are the parameters', with as many axes; counts and the seed are not."""
    tx = om.compress_state(om.adamw(0.1))
    params = drawn()
    specs = {name: P(*"abc"[: len(shape)]) for name, shape in SHAPES.items()}
    state = tx.init(params)
    marked = optax.tree.map_params(tx, lambda x: x.ndim, state, transform_non_params=lambda x: None)
    assert sorted(jax.tree.leaves(marked)) == sorted(4 * [len(shape) for shape in SHAPES.values()])
    placed = optax.tree.map_params(
        tx, lambda x, spec: spec, state, specs, transform_non_params=lambda x: P(), is_leaf=None
    )
    pairs = zip(
        jax.tree.leaves(state), jax.tree.leaves(placed, is_leaf=lambda x: isinstance(x, P)), strict=True
    )
    assert all(len(spec) == x.ndim for x, spec in pairs)


# 6. Noise


def test_a_seed_repeats_and_another_differs():
    """A state that is restored goes on with its own."""
    params = {"kernel": drawn()["kernel"]}

    def after(seed, state=None):
        tx = om.compress_state(om.ema(0.9), CHANCE, elementwise=True, seed=seed)
        return jax.jit(tx.update)(params, tx.init(params) if state is None else state, params)[1]

    one, other = after(7), after(8)
    chex.assert_trees_all_equal(one, after(7))
    assert np.mean(np.asarray(one.inner.average["kernel"] != other.inner.average["kernel"])) > 0.2
    chex.assert_trees_all_equal(after(7, one), after(8, one))


@pytest.mark.slow
def test_the_noise_of_a_leaf_is_its_own():
    """Of its path and place, whoever is beside it; other steps, leaves and moments have others."""
    shapes = {"kernel": (64, 128), "other": (64, 128)}
    same = lambda tree: tree | {"other": tree["kernel"]}  # noqa: E731
    tx = om.compress_state(om.adam(0.1, b1=0.9, b2=0.9), CHANCE, elementwise=True)
    params = same(drawn(shapes=shapes))
    update = jax.jit(tx.update, compiler_options=rounding.EXACT)
    _, both = update(params, tx.init(params), params)
    alone = {"kernel": params["kernel"]}
    _, one = update(alone, tx.init(alone), alone)
    (_, first), (_, second) = moments_of(both.inner)
    for (_, a), (_, b) in zip(moments_of(one.inner), moments_of(both.inner), strict=True):
        np.testing.assert_array_equal(a["kernel"], b["kernel"])
    assert np.mean(np.asarray(first["kernel"] != first["other"])) > 0.2
    up = np.asarray(jnp.abs(first["kernel"].astype(jnp.float32)) > jnp.abs(0.1 * params["kernel"]))
    over = np.asarray(second["kernel"].astype(jnp.float32) > 0.1 * params["kernel"] ** 2)
    assert abs(np.corrcoef(up.ravel(), over.ravel())[0, 1]) < 0.05


def test_second_moments_keep_their_mean():
    """Rounded by chance 300 times; to the nearest they would stand still."""
    tx = om.divide(optax.identity(), by=om.ema(0.999))
    tx = om.compress_state(tx, {"*": Nonneg8()}, elementwise=True)
    params = {"w": jnp.ones((64, 256))}

    def step(state, g):
        return tx.update(g, state, params)[1], None

    rng = np.random.default_rng(0)
    g = jnp.asarray(rng.uniform(0.2, 1.8, (64, 256)), jnp.float32)
    state = jax.jit(lambda s: jax.lax.scan(lambda s, _: step(s, {"w": g}), s, None, 300)[0])(tx.init(params))
    v = Nonneg8().decode(om.codecs.Encoded(state.inner.by.average["w"], state.scales[0]["w"]))
    ratio = np.asarray(v, np.float64) / (np.asarray(g, np.float64) * (1 - 0.999**300))
    assert abs(ratio.mean() - 1) < 2e-3
    assert ratio.std() < 0.1


# 7. Training


def trained(tx, gradients):
    """max |update| over the steps, and the state."""
    params = {"w": jnp.zeros(gradients.shape[1:])}

    def step(carry, g):
        state, largest = carry
        updates, state = tx.update({"w": g}, state, params)
        return (state, jnp.maximum(largest, jnp.max(jnp.abs(updates["w"])))), None

    return jax.jit(lambda gs: jax.lax.scan(step, (tx.init(params), jnp.float32(0)), gs)[0])(gradients)


def test_decay():
    """Half of each block falls to 1 % of its gradient: its second moment follows within 10 %."""
    half = np.arange(256) % 2 == 0
    gradients = np.ones((4000, 4, 256), np.float32)
    gradients[200:, :, half] = 0.01
    (state, _), (true, _) = (
        trained(tx, jnp.asarray(gradients))
        for tx in (om.compress_state(om.adam(1.0), CODES, elementwise=True), om.adam(1.0))
    )
    codes = state.inner[1].by[1].average["w"]
    v = np.asarray(Nonneg8().decode(om.codecs.Encoded(codes, state.scales[1]["w"])))[:, half]
    ratio = v.mean() / np.asarray(true[1].by[1].average["w"])[:, half].mean()
    assert 0.9 < ratio < 1.1


@pytest.mark.parametrize("kind", ["sparse", "heavy tails"])
def test_no_update_explodes(kind):
    """Where a block has nothing but 5 % of its numbers, or nearly nothing but one."""
    rng = np.random.default_rng(0)
    g = rng.standard_normal((300, 16, 256))
    if kind == "sparse":
        g *= rng.random(g.shape) < 0.05
    else:
        g *= np.exp(2 * rng.standard_normal(g.shape[1:]))
    _, largest = trained(
        om.compress_state(om.adam(1.0), CODES, elementwise=True), jnp.asarray(g, jnp.float32)
    )
    assert largest <= 4  # of twelve draws 2.2 to 3.3; a code for zero has above 1000


def test_gradients_of_any_size():
    """Updates are near those of float32."""
    sizes = {f"{size:g}/kernel": size for size in (1e-2, 1e-4, 1e-6, 1e-8)}
    params = drawn(shapes=dict.fromkeys(sizes, (32, 256)))
    gradients = {
        name: size * jnp.stack([drawn(k)["kernel"][:32] for k in range(20)]) for name, size in sizes.items()
    }
    tx = om.adam(1.0, eps=1e-12)
    (updates, _), (found, _) = together(
        [tx, om.compress_state(tx, elementwise=True)], params, gradients, None
    )
    for name in sizes:
        last, error = updates[name][-1], (found[name] - updates[name])[-1]
        assert jnp.linalg.norm(error) < 0.05 * jnp.linalg.norm(last), name


@pytest.mark.parametrize(
    "make",
    [
        lambda **rules: om.adamw(0.1, **({"state": rules["rules"]} if rules else {"state": "int8"})),
        lambda **rules: om.compress_state(om.adam(0.1), **rules),
        lambda **rules: om.compress_state(optax.adam(0.1), **rules),
        lambda **rules: om.muon(0.1, axes={"kernel": "io", "*": None}, state=rules.get("rules", "int8")),
        lambda **rules: om.scion(0.1, axes={"kernel": "io"}, state=rules.get("rules", "int8")),
    ],
    ids=["adamw", "rule", "optax", "muon", "scion"],
)
def test_nothing_that_is_compressed_is_said_aloud(make):
    """Once, where it is all; small leaves beside large ones stay in float32, as the docstring says."""
    small, large = {"bias": jnp.ones(8), "kernel": jnp.ones((4, 4))}, {"kernel": jnp.ones((64, 64))}
    with pytest.warns(UserWarning, match="no moment is compressed") as caught:
        make().init(small)
    assert len(caught) == 1
    with warnings.catch_warnings(action="error"):
        make().init(small | large)
        make().init({})
        make(rules={"*": None}).init(small)


@pytest.mark.parametrize("rules", ["int8", {"first": om.codecs.Signed8()}], ids=["default", "typed"])
def test_a_state_without_moments_cannot_be_compressed(rules):
    with pytest.warns(UserWarning, match="sgd: no moment is compressed, because .* Leave state out."):
        om.sgd(0.1, state=rules).init({"kernel": jnp.ones((64, 64))})
    with pytest.warns(UserWarning, match="compress_state: no moment is compressed, .* Leave it out."):
        om.compress_state(om.sgd(0.1), None if rules == "int8" else rules).init(
            {"kernel": jnp.ones((64, 64))}
        )


@pytest.mark.parametrize("params", [{"w": jnp.ones((64, 64))}, {"params": {"kernel": jnp.ones((64, 64))}}])
def test_other_parameters_are_no_reason_to_leave_elementwise_out(params):
    gradients = {"kernel": jnp.ones((64, 64))}
    tx = om.compress_state(optax.adam(0.1), elementwise=True)
    with pytest.raises(ValueError, match="compress_state: the gradients do not match the parameters"):
        tx.update(gradients, tx.init(gradients), params)


def test_what_the_warning_says_to_type_compresses():
    """Also of parameters that are one array, whose moments have the paths "first" and "second"."""
    for params in (jnp.ones(64), {"bias": jnp.ones(64)}):
        with pytest.warns(UserWarning, match="no moment is compressed") as caught:
            om.compress_state(om.adam(0.1)).init(params)
        rules = re.search(r"rules=({.*?})", str(caught[0].message))
        state = om.compress_state(om.adam(0.1), eval(rules[1], vars(om.codecs))).init(params)
        assert [x.dtype.itemsize for x in jax.tree.leaves(state.inner) if x.ndim] == [1, 1]


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint32"])
@pytest.mark.parametrize("elementwise", [True, False])
def test_codes_that_come_back_as_other_integers_are_refused(dtype, elementwise):
    """As from JSON, which has one type of integer: they are no moments."""
    tx, params = om.compress_state(om.adam(0.1), elementwise=elementwise), {"w": jnp.ones((64, 64))}
    _, state = tx.update(params, tx.init(params), params)
    restored = jax.tree.map(lambda x: x.astype(dtype) if x.dtype.itemsize == 1 else x, state)
    with pytest.raises(ValueError, match=f"'first/w' is stored in {dtype} .* but the rules say Signed8"):
        tx.update(params, restored, params)
