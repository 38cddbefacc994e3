"""An optimizer that is written here alone: everything finds it, and no list in the package names it."""

from typing import Any, NamedTuple

import catalog
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
import test_contract

import optimorph as om
from optimorph import probes
from optimorph._core.types import Numeric, ScalarOrSchedule
from optimorph.rules import (
    AVERAGE,
    Role,
    Rule,
    as_float32,
    as_scalar,
    as_schedule,
    full_like,
    holds,
    increment,
    roles_of,
    scalar,
    transform,
)


class SlowState(NamedTuple):
    """Two averages, a count and a reading."""

    slow: Any
    spread: Any
    count: Any
    temperature: Any
    roles = holds(
        slow=Role("slow average", "first", tree=True),
        spread=Role("mean absolute gradient", "second", tree=True),
        count=scalar("count of a temperature"),
        temperature=scalar("", "temperature"),
    )


def scale_by_slow(decay: Numeric, temperature: ScalarOrSchedule):
    """u = a m / (s + 1e-3): m and s average g and |g|, a is a schedule."""
    at = as_schedule(temperature)

    def begin(leaves):
        count = jnp.zeros([], jnp.int32)
        return SlowState(None, None, count, as_float32(at(count)))

    def init(leaf):
        return SlowState(full_like(leaf.weight), full_like(leaf.weight), None, None)

    def advance(shared, leaves):
        a = at(shared.count)
        return a, SlowState(None, None, increment(shared.count), as_float32(a))

    def update(g, s, leaf, a):
        b = as_scalar(decay, g)
        m = (1 - b) * g + b * s.slow
        v = (1 - b) * jnp.abs(g).astype(g.dtype) + b * s.spread
        return as_scalar(a, g) * m / (v + 1e-3), SlowState(m, v, None, None)

    return transform("scale_by_slow", Rule(roles_of(SlowState), update, init, begin, advance))


def toy(
    learning_rate: ScalarOrSchedule,
    decay: Numeric = 0.9,
    state: Any = None,
    temperature: ScalarOrSchedule = 1.0,
):
    """An optimizer of one new transform and one of the package."""
    tx = om.chain(scale_by_slow(decay, temperature), om.scale_by_learning_rate(learning_rate))
    return tx if state is None else om.compress_state(tx, None if state == "int8" else state)


PARAMS = {"kernel": jnp.ones((64, 128)), "bias": jnp.zeros(128)}


def paper():
    m = s = 0.0

    def step(g, w):
        nonlocal m, s
        m, s = 0.1 * g + 0.9 * m, 0.1 * np.abs(g) + 0.9 * s
        return -0.1 * m / (s + 1e-3)

    return step


ENTRY = catalog.Entry("toy", lambda om: toy(0.1), paper)
CONTRACT = [
    "programs_grow_with_the_number_of_leaves",
    "gradients_decide_the_dtype",
    "missing_gradients",
    "absent_parameters",
    "empty_tree",
    "empty_leaves",
    "zero_gradients",
    "masked",
    "one_trace_and_scan",
    "donation",
    "init_from_shapes",
    "in_a_chain",
]


@pytest.mark.parametrize("name", CONTRACT)
def test_contract_holds(name):
    arguments = {"dtype": jnp.float16} if name == "zero_gradients" else {}
    getattr(test_contract, f"test_{name}")(ENTRY, **arguments)


def test_a_state_without_roles():
    class Bare(NamedTuple):
        average: Any

    with pytest.raises(ValueError, match=r"Bare: .* Type roles = holds\(average=\.\.\.\) in it"):
        roles_of(Bare)


@rounding.in_float64
def test_rule():
    tx, rule = toy(0.1), paper()
    state, w = tx.init({"w": jnp.ones(3)}), np.ones(3)
    for seed in range(5):
        g = np.random.default_rng(seed).standard_normal(3)
        u, state = tx.update({"w": jnp.asarray(g)}, state)
        rounding.close(u["w"], rule(g, w), condition=1000)


def test_it_is_one_rule():
    """The chain is one rule for one leaf, so that a step of it is one pass over a leaf."""
    assert toy(0.1).rule is not None


def test_plan_counts_its_bytes():
    assert {row.path: row.state_bytes for row in om.plan(PARAMS, toy(0.1))} == {
        "bias": 128 * 8,
        "kernel": 64 * 128 * 8,
    }


def test_its_moments_are_stored_in_8_bits():
    """By their kinds: the first with a sign, the second without a zero."""
    tx = toy(0.1, state="int8")
    state = tx.init(PARAMS)
    slow = state.inner[0]
    assert (slow.slow["kernel"].dtype, slow.spread["kernel"].dtype) == (jnp.int8, jnp.uint8)
    assert slow.slow["bias"].dtype == jnp.float32
    g = jax.tree.map(lambda w: 0.1 + w, PARAMS)
    u, after = jax.jit(tx.update)(g, state, PARAMS)
    expected, _ = toy(0.1).update(g, toy(0.1).init(PARAMS), PARAMS)
    rounding.close(u, expected, condition=2**20)  # what is stored later was exact in this step
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert om.plan(PARAMS, tx)["kernel"].state_bytes == 64 * (128 * 2 + 16 * 2)


def test_probes_see_its_moment_and_its_reading():
    tx = probes.probe(toy(0.1, temperature=lambda count: jnp.where(count == 0, 2.0, 3.0)), ("cosine",), 1)
    state = tx.init(PARAMS)
    _, state = tx.update(jax.tree.map(lambda w: 1.0 + w, PARAMS), state, PARAMS)
    values = probes.read(state)
    rounding.close(values["kernel/cosine"], 1.0)
    assert (values["learning_rate"], values["temperature"]) == (np.float32(0.1), 2.0)


def test_its_numbers_are_injected():
    """The rules of its state are no schedule, though they are a function."""
    tx = om.inject_hyperparams(toy)(learning_rate=lambda count: 0.5, state=lambda path, shape: ...)
    state = tx.init(PARAMS)
    assert {*state.hyperparams} == {"learning_rate", "decay", "temperature"}
    tx.update(PARAMS, state, PARAMS)


def test_it_races():
    x = np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)

    def loss(params, batch):
        return jnp.mean((batch @ params["kernel"] - 1) ** 2)

    with jax.numpy_dtype_promotion("standard"):
        result = om.race(
            loss=loss,
            params={"kernel": np.zeros((4, 1), np.float32)},
            batches=[x[:16]],
            held_out=[x[16:]],
            steps=5,
            optimizers={"toy": toy(0.1), "adam": om.adam(0.1)},
            progress=False,
        )
    assert {row.name for row in result.rows} == {"toy", "adam"}


class Kept(NamedTuple):
    """A moment and a count."""

    mean: Any
    count: Any
    roles = holds(mean=AVERAGE, count=scalar("count"))


KEPT = {
    "init": lambda leaf: Kept(full_like(leaf.weight), None),
    "begin": lambda leaves: Kept(None, jnp.zeros([], jnp.int32)),
    "advance": lambda shared, leaves: (None, Kept(None, increment(shared.count))),
    "update": lambda g, s, leaf, now: (g, Kept(s.mean, None)),
}
WRONG = {
    "update: no pair": (lambda g, s, leaf, now: g, r"float32\[2,3\], but a pair, \(update, Kept\), was"),
    "update: nothing": (lambda g, s, leaf, now: None, "None, but a pair"),
    "update: a state first": (lambda g, s, leaf, now: (s, g), "Kept.*, but an update"),
    "update: another shape": (
        lambda g, s, leaf, now: (g.sum(), s),
        r"float32\[\], but .* of shape \(2, 3\)",
    ),
    "update: integers": (lambda g, s, leaf, now: (jnp.ones(g.shape, int), s), r"int32\[2,3\], but .* real"),
    "update: complex": (lambda g, s, leaf, now: (g * 1j, s), "complex64.*, but .* real"),
    "update: no state": (lambda g, s, leaf, now: (g, None), "None, but .* the average of Kept"),
    "update: a bare state": (lambda g, s, leaf, now: (g, s.mean), "but a state Kept"),
    "update: a moment's shape": (lambda g, s, leaf, now: (g, Kept(s.mean[0], None)), r"float32\[3\], but"),
    "update: arguments": (lambda g, s: (g, s), "takes other arguments.* Type def update"),
    "init: a bare moment": (lambda leaf: full_like(leaf.weight), "but a state Kept"),
    "init: a number": (lambda leaf: Kept(0.0, None), r"0.0, but real or complex numbers of shape \(2, 3\)"),
    "begin: several numbers": (
        lambda leaves: Kept(None, jnp.zeros(3)),
        r"\[3\], but any numbers of shape",
    ),
    "advance: no pair": (lambda shared, leaves: shared, "Kept.*, but a pair"),
    "advance: a float": (lambda shared, leaves: (0, Kept(None, shared.count * 0.5)), "integer numbers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_rule_returns_is_checked(name):
    """Also in a chain, which merges rules; the error names the transform, the function and the leaf."""
    function, message = WRONG[name]
    part, params = name.split(":")[0], {"a": {"w": jnp.ones((2, 3))}}
    where = "of 'a/w' returned .*" if part in ("init", "update") and "arguments" not in name else ".*"

    def use():
        own = transform("mine", Rule(roles_of(Kept), **(KEPT | {part: function})))
        tx = om.chain(own, om.scale_by_learning_rate(0.1))
        tx.update(params, tx.init(params), params)

    match = f"mine: {part} {where}{message}"
    with jax.numpy_dtype_promotion("standard"), pytest.raises(ValueError, match=match):
        use()


def test_a_parameter_in_a_new_state_is_copied():
    params = {"w": jnp.ones(3)}
    rule = Rule(roles_of(Kept), **(KEPT | {"init": lambda leaf: Kept(leaf.weight, None)}))
    state = transform("mine", rule).init(params)
    assert state.mean["w"].unsafe_buffer_pointer() != params["w"].unsafe_buffer_pointer()


class SquaresState(NamedTuple):
    squares: Any
    roles = holds(squares=Role("second moment", "second", tree=True))


def scale_by_squares(decay: Numeric):
    def update(g, s, leaf, now):
        v = decay * s.squares + (1 - decay) * g * g
        return g / (jnp.sqrt(v) + 1e-8), SquaresState(v)

    def init(leaf):
        return SquaresState(full_like(leaf.weight))

    return transform("scale_by_squares", Rule(roles_of(SquaresState), update, init=init))


def test_the_second_moment_of_adam_becomes_ones_own():
    """By the name of its role, as the guide gives it."""
    params, tx = {"w": jnp.linspace(1, 2, 3)}, scale_by_squares(0.9)
    _, old = om.adam(0.1).update(params, om.adam(0.1).init(params), params)
    state, report = om.carry_state(old, tx, params)
    moments = [x for x in jax.tree.leaves(old) if jnp.ndim(x)]
    np.testing.assert_array_equal(state.squares["w"], moments[-1])
    assert {row.fate for row in report if row.kind == "second moment"} == {"kept"}
