"""Trees that nobody thought of, and arguments that nobody should give: a right result or one of our errors.

What is right is simple: every leaf is updated as if it were alone, and a leaf that is not trained, without a
gradient or of integers, is left as it is. Trees are drawn as descriptions of leaves, and made of arrays
later: the type checker of these tests draws random numbers too.
"""

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
import zlib
from typing import Any, NamedTuple

import catalog
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import optimorph as om

FLOATS = ("float32", "bfloat16", "float16", "complex64", "numpy", "python")
INTEGERS = ("int32", "uint8", "bool", "python int", "python bool")
SHAPES = ((), (3,), (2, 3), (0, 3))
OURS = (*om.__all__, "init")


def fuzzed(examples):
    checks = (HealthCheck.too_slow, HealthCheck.filter_too_much)
    phases = (Phase.generate,)  # trees are small as they are
    return settings(
        max_examples=max(4, examples // 2),
        deadline=None,
        derandomize=True,
        suppress_health_check=checks,
        phases=phases,
    )


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What becomes an array, or a number; jax takes it for a leaf."""

    kind: str
    shape: tuple[int, ...]
    trained: bool = True

    @property
    def moves(self):
        return self.trained and self.kind in FLOATS


class Pair(NamedTuple):
    left: Any
    right: Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["inside"], meta_fields=["name"])
@dataclasses.dataclass
class Box:
    inside: Any
    name: str = "box"


def numbers(leaf, seed=0):
    """The leaf's own, above 0."""
    rng = np.random.default_rng([zlib.crc32(repr((leaf.kind, leaf.shape)).encode()), seed])
    x = rng.uniform(0.1, 2.0, leaf.shape)
    if leaf.kind.startswith("python"):
        return {"python": float, "python int": lambda x: int(4 * x), "python bool": lambda x: x > 1}[
            leaf.kind
        ](float(x))
    if leaf.kind == "numpy":
        return x
    if leaf.kind == "complex64":
        x = x + 1j * rng.uniform(0.1, 2.0, leaf.shape)
    return jnp.asarray(x if leaf.kind in FLOATS else 4 * x, leaf.kind)


def gradient(leaf, seed=1):
    """As `jax.grad` and `eqx.filter_grad` give it: of integers float0 or None."""
    if leaf.trained and leaf.kind in INTEGERS:
        return np.zeros(leaf.shape, jax.dtypes.float0)
    return numbers(leaf, seed) if leaf.trained else None


def parameters(tree):
    return jax.tree.map(numbers, tree)


def gradients(tree, seed=1):
    return jax.tree.map(lambda leaf: gradient(leaf, seed), tree)


leaves = st.builds(
    lambda kind, shape, trained: Leaf(kind, () if kind.startswith("python") else shape, trained),
    st.sampled_from(FLOATS + INTEGERS[::2]) | st.sampled_from(FLOATS + INTEGERS),
    st.sampled_from(SHAPES),
    st.sampled_from((True, True, True, False)),
)
names = st.sampled_from(("", "a", "b/c", "Größe", "kernel", "bias", "0", "*", "a b"))
trees = st.recursive(
    leaves | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(names, inner, max_size=3)
        | st.dictionaries(st.integers(-1, 2), inner, max_size=3)
        | st.builds(Pair, inner, inner)
        | st.builds(Box, inner)
    ),
    max_leaves=8,
)


def by_shape(path, shape):
    return "io" if len(shape) == 2 else None


SHAPED = {
    "orthogonalize": lambda: om.orthogonalize(axes=by_shape),
    "scale_by_shape": lambda: om.scale_by_shape(axes=by_shape),
    "muon": lambda: om.muon(0.1, axes=by_shape, weight_decay=0.2),
}
EACH = {
    entry.id: entry.build
    for entry in catalog.ENTRIES
    if not (entry.matrices or entry.together or entry.id == "skip_nonfinite-each-third")
} | SHAPED
RECIPES = [name for name in EACH if name in {entry.id for entry in catalog.RECIPES}]


def is_none(x):
    return x is None


def follow(tx, tree, steps=2):
    """The updates of every step, and the state."""
    params = parameters(tree)
    state, found = tx.init(params), []
    for step in range(steps):
        updates, state = tx.update(gradients(tree, 1 + step), state, params)
        found.append(updates)
    return found, state


@functools.cache
def alone(name, leaf):
    found, _ = follow(EACH[name](), {"only": leaf})
    return [updates["only"] for updates in found]


def check_updates(name, tree, found):
    """Of the tree's structure, and every leaf's as if it were alone."""
    for step, updates in enumerate(found):
        assert jax.tree.structure(updates, is_leaf=is_none) == jax.tree.structure(tree, is_leaf=is_none)
        for leaf, update in zip(jax.tree.leaves(tree), standing(updates, tree), strict=True):
            if not leaf.moves:
                assert update is None
                continue
            own = alone(name, leaf)[step]
            dtype = jnp.result_type(own)  # numpy arrays may pass as they are
            assert (np.shape(update), jnp.result_type(update)) == (leaf.shape, dtype)
            assert dtype == jnp.result_type(gradient(leaf)) or name == "square"  # which is real
            expected = np.asarray(own, complex)
            assert np.all(np.isfinite(expected))
            rtol = 2.0**-7 if name in SHAPED else 0  # matrices go in stacks
            np.testing.assert_allclose(np.asarray(update, complex), expected, rtol, rtol, err_msg=name)


def standing(updates, tree):
    """What stands where the tree has a leaf."""
    found = []
    jax.tree.map(lambda leaf, update: found.append(update), tree, updates)
    return found


@pytest.mark.slow
@fuzzed(60)
@given(st.sampled_from(sorted(EACH)), trees)
def test_every_leaf_as_if_alone(name, tree):
    assume(tree is not None)
    tx = EACH[name]()
    found, state = follow(tx, tree)
    check_updates(name, tree, found)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(parameters(tree)))
    chex.assert_tree_all_finite(state)


def nested(depth):
    """Every kind of container, one in the other."""
    tree = {"kernel": Leaf("float32", (2, 3)), "n": Leaf("int32", (3,))}
    for level in range(depth):
        bias = Leaf("bfloat16", (3,))
        tree = [
            {"": tree, "größe/0": bias},
            [bias, None, tree],
            (tree, ()),
            Pair(tree, {}),
            Box({level: tree, -1: bias}),
        ][level % 5]
    return tree


@pytest.mark.examples("adamw", "muon*", "accumulate")
@pytest.mark.parametrize("name", sorted(EACH))
def test_fifty_levels(name):
    found, _ = follow(EACH[name](), nested(50))
    check_updates(name, nested(50), found)


def refuses(call):
    """Whether the call is refused, and in our words: the message begins with the name of what was called."""
    found = None
    try:
        call()
    except (ValueError, TypeError) as error:
        found = error
    assert found is None or str(found).startswith(tuple(f"{name}: " for name in OURS)), repr(found)
    return found is not None


OTHERS = {
    "another shape": lambda leaf: Leaf(leaf.kind, (4, *leaf.shape)),
    "one axis more": lambda leaf: Leaf(leaf.kind, (*leaf.shape, 1)),
    "a list": lambda leaf: [leaf, leaf, leaf],
    "a list of one": lambda leaf: [leaf],
    "a dictionary": lambda leaf: {"a": leaf},
    "nothing": lambda leaf: {},
    "a number": lambda leaf: "text",
    "integers": lambda leaf: Leaf("int32", leaf.shape),
    "complex numbers": lambda leaf: Leaf("float32" if leaf.kind == "complex64" else "complex64", leaf.shape),
}


def changed(tree, where, what):
    """The tree with one of its trained leaves made another; None if there is none."""
    leaves, structure = jax.tree.flatten(tree)
    moving = [k for k, leaf in enumerate(leaves) if leaf.moves and not leaf.kind.startswith("python")]
    assume(moving)
    chosen = moving[where % len(moving)]
    leaves[chosen] = OTHERS[what](leaves[chosen])
    return jax.tree.unflatten(structure, leaves)


def made(tree, make):
    return jax.tree.map(lambda leaf: make(leaf) if isinstance(leaf, Leaf) else leaf, tree)


def hand_made(leaf):
    """A gradient that is one also of integers."""
    return numbers(leaf, 1) if leaf.trained else None


@fuzzed(50)
@given(st.sampled_from(RECIPES), trees, st.integers(0, 7), st.sampled_from(sorted(OTHERS)))
def test_gradients_of_another_tree(name, tree, where, what):
    tx, params = EACH[name](), parameters(tree)
    wrong = made(changed(tree, where, what), hand_made)
    state = tx.init(params)
    assert refuses(lambda: tx.update(wrong, state, params))


@fuzzed(50)
@given(st.sampled_from(sorted(EACH)), trees, st.integers(0, 7), st.sampled_from(sorted(OTHERS)))
def test_gradients_of_another_state(name, tree, where, what):
    """Without parameters to compare: refused, or no state minds, and the update is right."""
    tx = EACH[name]()
    other = changed(tree, where, what)
    state = tx.init(parameters(tree))

    def update():
        updates, after = tx.update(made(other, hand_made), state)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
        check_updates(name, other, [updates])

    if what in ("a number", "integers"):
        assert refuses(update)
    else:
        refuses(update)


@fuzzed(50)
@given(st.sampled_from(sorted(EACH)), trees, st.integers(0, 7), st.sampled_from(sorted(OTHERS)))
def test_a_state_of_other_parameters(name, tree, where, what):
    tx, params, g = EACH[name](), parameters(tree), gradients(tree)
    other = made(changed(tree, where, what), numbers)
    states = []
    if refuses(lambda: states.append(tx.init(other))):
        assert what == "a number" or name == "muon"
        return

    def update():
        updates, after = tx.update(g, states[0], params)
        assert jax.tree.structure(after) == jax.tree.structure(states[0])
        if what != "complex numbers":
            check_updates(name, tree, [updates])

    refused = refuses(update)
    right = jax.tree.map(jnp.shape, tx.init(params))
    assert refused or jax.tree.map(jnp.shape, states[0]) == right


PARAMS = {"w": np.ones((2, 3), np.float32), "b": np.ones(3, np.float32)}


@functools.cache
def kinds_of_states():
    """Of every structure that a recipe's state has, one."""
    states = [EACH[name]().init(PARAMS) for name in RECIPES]
    return {jax.tree.structure(state): state for state in states}.values()


@pytest.mark.examples("adamw", "muon", "sgd")
@pytest.mark.parametrize("name", RECIPES)
def test_a_state_of_another_recipe(name):
    """Refused, or taken for what it is: a velocity that nobody wants has no part in an update."""
    tx, found = EACH[name](), []
    for state in kinds_of_states():
        refuses(lambda state=state: found.append(tx.update(PARAMS, state, PARAMS)))
    for updates, _ in found:
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)
        chex.assert_tree_all_finite(updates)
    assert 0 < len(found) < len(kinds_of_states())


def test_what_is_no_array_is_named():
    for leaf in ("float32", "text", object(), float, np.array(["a"]), np.array([None])):
        for name in RECIPES:
            with pytest.raises(ValueError, match=r": 'x/1' is .*, which is not an array"):
                EACH[name]().init({"x": [1.0, leaf]})


@fuzzed(40)
@given(trees, st.integers(0, 3))
def test_weights_and_updates_added(tree, seed):
    """In float32 or wider, rounded once; with a key, to one of the two neighbours."""
    params, updates = parameters(tree), gradients(tree)
    for key in (None, jax.random.key(seed)):
        found = om.apply_updates(params, updates, key)
        assert jax.tree.structure(found) == jax.tree.structure(params)
        for leaf, w in zip(jax.tree.leaves(tree), jax.tree.leaves(found), strict=True):
            before = numbers(leaf)
            assert jnp.result_type(w) == jnp.result_type(before)
            if not leaf.moves:
                np.testing.assert_array_equal(jnp.asarray(w), jnp.asarray(before))
                continue
            exact = np.asarray(before, complex) + np.asarray(gradient(leaf), complex)
            rtol = {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(leaf.kind, 2.0**-23)
            rtol = rtol if key is None else 2 * rtol
            np.testing.assert_allclose(np.asarray(w, complex), exact, rtol=rtol)


@fuzzed(40)
@given(trees, st.integers(0, 7), st.sampled_from(sorted(OTHERS)))
def test_updates_of_another_tree(tree, where, what):
    """Integers take no others, and a real leaf takes integers."""
    updates = made(changed(tree, where, what), hand_made)
    if what == "integers" or what == "complex numbers":
        assert not refuses(lambda: om.apply_updates(parameters(tree), updates))
        params = made(changed(tree, where, "integers"), numbers)
        assert refuses(lambda: om.apply_updates(params, made(tree, hand_made)))
    else:
        assert refuses(lambda: om.apply_updates(parameters(tree), updates))


@fuzzed(40)
@given(trees)
def test_the_norm_of_any_tree(tree):
    g = gradients(tree)
    tx = om.clip_by_global_norm(0.5)
    updates, state = tx.update(g, tx.init(parameters(tree)))
    exact = [np.asarray(gradient(leaf), complex) for leaf in jax.tree.leaves(tree) if leaf.moves]
    norm = np.sqrt(sum(np.sum(np.abs(x) ** 2) for x in exact))
    rounding.close(state.norm, norm)
    kept = iter(exact)
    for leaf, u in zip(jax.tree.leaves(tree), standing(updates, tree), strict=True):
        if leaf.moves:
            assert jnp.result_type(u) == jnp.result_type(gradient(leaf))
            expected = next(kept) * min(1, 0.5 / (norm or 1))
            np.testing.assert_allclose(np.asarray(u, complex), expected, rtol=2.0**-8)
        else:
            assert u is None


@fuzzed(20)
@given(trees, st.integers(0, 7), st.sampled_from((np.nan, np.inf)))
def test_one_bad_number_in_any_tree(tree, where, bad):
    tx, inner = om.skip_nonfinite(om.ema(0.5)), om.ema(0.5)
    params, g = parameters(tree), gradients(tree)
    moving = [k for k, leaf in enumerate(jax.tree.leaves(tree)) if leaf.moves and 0 not in leaf.shape]
    assume(moving)
    place, chosen = itertools.count(), moving[where % len(moving)]
    bad_g = jax.tree.map(lambda leaf, x: bad * x if next(place) == chosen else x, tree, g)
    state = tx.init(params)
    updates, state = tx.update(bad_g, state, params)
    assert state.skipped == 1
    chex.assert_trees_all_equal(state.inner, inner.init(params))
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    good, state = tx.update(g, state, params)
    right, _ = inner.update(g, inner.init(params), params)
    chex.assert_trees_all_equal(good, right)


@fuzzed(20)
@given(trees)
def test_what_the_plan_says_muon_does(tree):
    """A row for every leaf; where it asks nothing muon begins, where it asks muon refuses."""
    assume(tree is not None)
    params, plans = parameters(tree), []
    if refuses(lambda: plans.append(om.plan(params))):  # two leaves of one name
        return
    rows = [*plans[0]]
    assert [row.shape for row in rows] == [leaf.shape for leaf in jax.tree.leaves(tree)]
    for row, leaf in zip(rows, jax.tree.leaves(tree), strict=True):
        assert (row.transform == "none") == (leaf.kind in INTEGERS)
        assert leaf.kind not in INTEGERS or row.state_bytes == 0
    asked = any(row.unresolved for row in rows)
    states = []
    assert refuses(lambda: states.append(om.muon(0.1).init(params))) == asked
    if not asked:
        held = sum(x.nbytes for x in jax.tree.leaves(states[0]) if x.shape)
        scalars = [row for row in rows if row.shape == ()]
        assert held == sum(row.state_bytes for row in rows if row not in scalars)
    assert str(plans[0])


@fuzzed(40)
@given(trees)
def test_labels_of_any_tree(tree):
    """By path, by shape, and by a tree of labels: each leaf has its own."""
    params = parameters(tree)
    shapes = om.labels(lambda path, shape: str(shape))(params)
    assert shapes == jax.tree.map(lambda leaf: str(leaf.shape), tree)
    both = om.partition(lambda path, shape: str(len(shape)), {str(k): om.ema(0.5) for k in range(3)})
    updates, _ = both.update(gradients(tree), both.init(params), params)
    alone, _ = om.ema(0.5).update(gradients(tree), om.ema(0.5).init(params))
    chex.assert_trees_all_equal(updates, alone)
    if not isinstance(tree, Leaf) and not (isinstance(tree, dict) and "*" in tree):  # no tree, and patterns
        assert om.labels(shapes)(params) == shapes


@pytest.mark.slow
def test_two_leaves_of_one_name():
    """Each has its own update; where paths must tell them apart they are refused."""
    tree = {"a/b": Leaf("float32", (2, 3)), "a": {"b": Leaf("float32", (3,))}}
    params = parameters(tree)
    for name in EACH:
        if name.startswith("compress_state"):
            assert refuses(lambda name=name: EACH[name]().init(params))
            continue
        found, _ = follow(EACH[name](), tree)
        check_updates(name, tree, found)
    assert refuses(lambda: om.plan(params))
    assert refuses(lambda: om.labels({"a/b": 1, "a": {"b": 2}})(params))
    assert om.labels({"a/b": 1, "a": {"b": 1}})(params) == {"a/b": 1, "a": {"b": 1}}


def test_a_star_in_a_name_is_no_number():
    params = {"0": jnp.ones(3), "*": jnp.ones(3), "7": jnp.ones(3)}
    lines = str(om.plan(params, axes=lambda path, shape: None)).splitlines()[2:]
    assert [line.split()[:2] for line in lines[:2]] == [["*", "1"], ["*", "2"]]
    with pytest.raises(ValueError, match=r"muon: '\*' has .*\n(.|\n)*muon: '\*' \(2 leaves\) has"):
        om.muon(0.1, axes=lambda path, shape: "io").init(params)


@fuzzed(40)
@given(trees)
def test_an_optax_state_of_any_tree(tree):
    """Its moments where they belong; integers, of which there are none here, have none."""
    params = parameters(tree)
    assume(tree is not None)
    state = jax.tree.map(lambda x: np.full(x.shape, 3, x.dtype), jax.eval_shape(optax.adam(0.1).init, params))
    tx, found = om.adam(0.1), []
    if refuses(
        lambda: found.append(om.carry_state(state, tx, params, strict=True)[0])
    ):  # two leaves of one name
        return
    chex.assert_trees_all_equal_shapes_and_dtypes(found[0], tx.init(params))
    for moment in jax.tree.leaves(found[0][1].signal[0]):
        np.testing.assert_array_equal(moment, 3)


SENT = """
import inspect, json, sys
import jax, jax.numpy as jnp, numpy as np, optax
import optimorph as om
from optimorph._core.checks import RANGES, SCHEDULED

BAD = {
    "text": "0.1", "dtype": "float32", "nan": float("nan"), "negative": -1e-3, "inf": float("inf"),
    "huge": 10**400, "complex": 1j, "bool": True, "object": object(), "type": dict(a=1), "vector": np.ones(2),
    "one in a list": [0.5], "ragged": [[1.0], 2.0], "jax vector": jnp.ones(3), "no numbers": np.array(["a"]),
    "negative array": jnp.float32(-1.0), "empty": (), "large": 1e300,
}
NEEDED = {
    "learning_rate": 0.1, "decay": 0.9, "dampening": 0.1, "max_norm": 1.0, "momentum": 0.9,
    "first": om.ema(0.5), "second": optax.scale(2.0), "initial_value": 0.1, "smoothness": 2.0,
    "strong_convexity": 1.0, "gamma": 0.025, "b1": 0.9, "b3": 0.99, "alpha": 5.0, "steps": 10,
    "inner": om.ema(0.5),
}
found = {}
for module in (om, om.schedules, om.theory):
    for name in module.__all__:
        make = getattr(module, name)
        if not inspect.isfunction(make):
            continue
        signature = inspect.signature(make).parameters
        if "params" in signature:  # no factory
            continue
        for number in signature:
            if number not in RANGES:
                continue
            fixed = {k: NEEDED[k] for k, p in signature.items() if p.default is p.empty and k != number}
            fixed |= {"momentum": 0.9} if (name, number) == ("sgd", "dampening") else {}
            missing = {} if signature[number].default is None else {"missing": None}
            for kind, value in (BAD | missing).items():
                try:
                    tx = make(**fixed, **{number: value})
                    said = "accepted"
                except BaseException as error:
                    said = f"{type(error).__name__}: {error}"
                found[f"{name} {number} {kind}"] = said
            def traced(value):
                make(**fixed, **{number: value})
                return value
            try:
                if module is om:
                    jax.jit(traced)(jnp.full(2, 0.5))
                    found[f"{name} {number} traced vector"] = "accepted"
            except BaseException as error:
                found[f"{name} {number} traced vector"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""
FINE = ("max_norm inf", "max_rms inf", "large")


def test_numbers_that_are_none():
    """Refused where they are given, by name, in a process without the type checker of these tests."""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", SENT], capture_output=True, text=True, check=True
    )
    found = json.loads(process.stdout)
    assert len(found) > 600
    for call, said in found.items():
        name, number, *_ = call.split(" ")
        if not (call.endswith(FINE) and said == "accepted"):
            assert said.startswith(f"ValueError: {name}: {number} "), f"{call}: {said}"


@pytest.mark.parametrize("make", [om.scale_by_learning_rate, om.add_decayed_weights, om.sgd, om.muon])
def test_a_schedule_of_arrays(make):
    """It would be broadcast against the gradients, or not."""
    for shape in ((1,), (3,)):
        tx, params = make(lambda count, shape=shape: jnp.full(shape, 0.1)), {"w": jnp.ones((2, 3))}
        with pytest.raises(ValueError, match=r": a schedule must return one number, but .* shape \((1|3),\)"):
            tx.update(params, tx.init(params), params)


def test_integers_beyond_int32_are_numbers():
    tx, params = om.sgd(10**12), {"w": jnp.ones(3)}
    rounding.close(tx.update(params, tx.init(params))[0]["w"], -1e12, units=1)
