"""Gradients from nothing to the largest numbers, against the papers in float64; and float64 throughout.

The sizes at which a square leaves float32 are stated by `square`, and what happens beyond is tested here.
"""

import re

import catalog
import formulas
import jax
import jax.numpy as jnp
import numpy as np
import optax
import papers
import pytest
import rounding

import optimorph as om
from optimorph._carry.slots import SECOND, TOTAL, slots

SIZES = {
    "float32": (0.0, 1e-44, 1e-30, 1e-22, 1e-10, 1.0, 1e10, 1e18, 1e30),
    "bfloat16": (0.0, 1e-44, 1e-30, 1e-22, 1e-10, 1.0, 1e10, 1e18, 1e30),
    "float16": (0.0, 6e-8, 6e-5, 1.0, 6e4),
}
LEAST = {"float32": 1.2e-38, "bfloat16": 1.2e-38, "float16": 6e-8}
"""Anything smaller is zero on some machines."""
SQUARES = 1.8e19
"""The square of anything larger is infinite in float32."""

DEFAULTS = {
    "sgd": (lambda: om.sgd(0.1), lambda: papers.sgd(0.1)),
    "adagrad": (lambda: om.adagrad(0.1), lambda: papers.adagrad(0.1, 0.1, 1e-7)),
    "rmsprop": (lambda: om.rmsprop(0.1), lambda: papers.rmsprop(0.1, 0.9, 1e-8)),
    "adam": (lambda: om.adam(0.1), lambda: papers.adam(0.1, 0.9, 0.999, 1e-8)),
    "nadam": (lambda: om.nadam(0.1), lambda: papers.adam(0.1, 0.9, 0.999, 1e-8, nesterov=True)),
    "adamw": (lambda: om.adamw(0.1), lambda: papers.adam(0.1, 0.9, 0.999, 1e-8, decay=1e-4)),
    "nadamw": (lambda: om.nadamw(0.1), lambda: papers.adam(0.1, 0.9, 0.999, 1e-8, decay=1e-4, nesterov=True)),
}
EVERY = {entry.id: (entry.build, entry.paper) for entry in catalog.RECIPES} | {
    f"{name}-defaults": both for name, both in DEFAULTS.items()
}
IN_BASES = [entry.id for entry in catalog.RECIPES if entry.stacks]
"""Whose bases are made of rounding errors where a gradient has not the rank of a factor."""

POLAR = [entry.id for entry in catalog.RECIPES if entry.real and not entry.stacks]


def keeps_squares(tx):
    kinds = {slot.kind for slot in slots(tx.init({"w": jnp.ones((2, 3))}))}
    return not kinds.isdisjoint((SECOND, TOTAL))


SQUARING = [  # of gradients, which mars_adamw clips before
    name
    for name, (build, _) in EVERY.items()
    if name not in POLAR and not name.startswith("mars") and keeps_squares(build())
]
ROUNDED = ("rmsprop-centered-corrected", "muon-cautious", *IN_BASES)
"""Whose updates jump with a rounding error: a first variance of 0, a product with a weight that is 0."""


def leaves(size, dtype):
    """Gradients of that size: all of them, a tenth of them, and only the largest of many sizes."""
    rng = np.random.default_rng(3)
    even = rng.choice([-1.0, 1.0], (5, 7)) * rng.uniform(0.5, 1.0, (5, 7))
    span = 12 if size > 1e-20 else 4  # or they would not be numbers of float32
    different = {
        "even": even,
        "sparse": even * (rng.uniform(size=even.shape) < 0.1),
        "mixed": even * 10.0 ** rng.uniform(-span, 0, even.shape),
    }
    return {name: jnp.asarray(x * size, dtype) for name, x in different.items()}


def train(tx, rule, size, dtype, steps=3):
    """Of every step and leaf the update and the paper's, in float64."""
    gradients = leaves(size, dtype)
    weights = {name: jnp.full(g.shape, 0.5, dtype) for name, g in gradients.items()}
    rules, state = {name: rule() for name in weights}, tx.init(weights)
    update = jax.jit(tx.update)
    for step in range(steps):
        factor = (1.0, -0.5, 0.25)[step]
        gs = {name: factor * g for name, g in gradients.items()}
        updates, state = update(gs, state, weights)
        for name, step_of in rules.items():
            assert updates[name].dtype == dtype
            yield (
                formulas.exact(updates[name]),
                step_of(formulas.exact(gs[name]), formulas.exact(weights[name])),
            )


def worst_error(tx, rule, size, dtype):
    """Over the leaf's largest update; infinite where an update is not finite."""
    largest = float(jnp.finfo(dtype).max)
    worst = 0.0
    for update, expected in train(tx, rule, size, dtype):
        error = np.max(np.abs(update - np.clip(expected, -largest, largest)), initial=0)
        error = max(error - LEAST[dtype], 0) if np.isfinite(error) else np.inf
        worst = max(worst, error / (np.max(np.abs(expected)) or 1.0))
    return worst


@pytest.mark.examples("adamw-*16", "muon-float16", "rmsprop-float32")
@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("name", EVERY)
def test_sizes(name, dtype):
    """The paper's updates, wherever squares are numbers."""
    build, rule = EVERY[name]
    tx = build()
    for size in SIZES[dtype]:
        if size > SQUARES and (name in SQUARING or name in ("muon2", "scion-rms")):
            continue
        if name in ROUNDED:
            for update, _ in train(tx, papers.square, size, dtype):
                assert np.all(np.isfinite(update)), size
        else:
            assert worst_error(tx, rule, size, dtype) < formulas.TOLERANCE[dtype], size


@pytest.mark.examples("adamw-float32", "adagrad-bfloat16", "muon-float32")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in SQUARING if name not in IN_BASES])
def test_infinite_squares(name, dtype):
    """No update from then on, or no variance, as `square` says; left out, or clipped, they do no harm."""
    build, rule = EVERY[name]
    decayed = 0.0 if "l2" in name else rule()(np.zeros(3), np.full(3, 0.5))
    params, tx = {"w": jnp.full(3, 0.5, dtype)}, build()
    large, small = ({"w": jnp.full(3, size, dtype)} for size in (1e30, 1.0))
    state = tx.init(params)
    for k, g in enumerate((large, small)):
        updates, state = tx.update(g, state, params)
        if "centered" in name:
            assert np.all(np.isnan(updates["w"]))
        elif k == 0 or name not in ("rmsprop-momentum", "rmsprop-nesterov"):
            np.testing.assert_allclose(formulas.exact(updates["w"]), decayed, rtol=2.0**-8, atol=1e-12)

    careful = om.skip_nonfinite(tx)
    updates, state = careful.update(large, careful.init(params), params)
    assert state.skipped == 1
    assert not np.any(updates["w"])
    after, _ = careful.update(small, state, params)
    fresh, _ = tx.update(small, tx.init(params), params)
    np.testing.assert_array_equal(after["w"], fresh["w"])

    clipped = optax.chain(om.clip_by_global_norm(1.0), tx)
    updates, _ = clipped.update(large, clipped.init(params), params)
    expected = rule()(np.full(3, 1 / np.sqrt(3)), np.full(3, 0.5))
    np.testing.assert_allclose(  # of bfloat16, twice; a step along the weight itself is none on a sphere
        formulas.exact(updates["w"]), expected, rtol=2.0**-7, atol=2.0**-20
    )


def program(entry, dtype):
    """The text of `init` and `update`, and what they return."""
    params = {name: jnp.ones(shape, dtype) for name, shape in formulas.shapes(entry, "bfloat16").items()}
    tx = entry.build()

    def both(params, g):
        state = tx.init(params)
        return tx.update(g, state, params)

    return str(jax.make_jaxpr(both)(params, params)), jax.eval_shape(both, params, params)


@pytest.mark.parametrize("entry", catalog.ENTRIES, ids=catalog.IDS)
def test_no_float32_in_float64(entry):
    """Nor below: no array of the whole program, and no number but those that are there to be read."""
    with jax.enable_x64(True):
        text, (updates, state) = program(entry, jnp.float64)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("float64")}
    assert {str(s.dtype) for s in jax.tree.leaves(state) if s.shape} <= {"float64"}
    assert {str(s.dtype) for s in jax.tree.leaves(state) if not s.shape} <= {
        "int32",
        "uint32",
        "float32",
        "float64",
    }
    assert not re.search(r"\b(bf16|f16|f32)\[\d", text)


@pytest.mark.examples("*-bfloat16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("entry", catalog.ENTRIES, ids=catalog.IDS)
def test_no_float64_in_float32(entry, dtype):
    """With x64 on: arrays are of float32 at most; numbers may be wider until they meet one."""
    with jax.enable_x64(True):
        text, (updates, state) = program(entry, dtype)
    assert {str(u.dtype) for u in jax.tree.leaves(updates)} == {dtype}
    assert {str(s.dtype) for s in jax.tree.leaves(state)} <= {"float32", "int32", "uint32"}
    assert not re.search(r"\bf64\[\d", text)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: om.schedules.robbins_monro(x, x, x),
        lambda x: om.schedules.linear_warmup(x, 5),
        lambda x: om.schedules.decay_warmup(x, x, 5),
    ],
    ids=["robbins_monro", "linear_warmup", "decay_warmup"],
)
def test_schedules_of_arrays(make, dtype):
    """They have the precision of the count, whatever the dtype of the argument."""
    with jax.enable_x64(True):
        rounding.close(make(jnp.asarray(0.75, dtype))(3), make(0.75)(3), condition=100)


def test_schedules_in_float64():
    """η(t) with all its digits, ours and optax's."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # optax's schedules need it
        g, count = {"w": jnp.ones(1)}, 7
        for schedule, expected in (
            (om.schedules.robbins_monro(0.1, 0.75, 3.0), 0.1 / (1 + count / 3.0) ** 0.75),
            (optax.linear_schedule(0.1, 0.0, 30), 0.1 * (1 - count / 30)),
            (optax.cosine_decay_schedule(0.1, 30), 0.05 * (1 + np.cos(np.pi * count / 30))),
        ):
            tx = om.sgd(schedule)
            state = jax.tree.map(lambda c: c + count, tx.init(g))
            updates, _ = tx.update(g, state)
            rounding.close(updates["w"], -expected)
