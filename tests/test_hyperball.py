"""Weights keep their norms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding

import optimorph as om
from optimorph.linalg import Exact

WEIGHTS = {"w": np.array([[0.5, -1.0, 1.5], [-0.5, 0.25, 1.0]])}
GRADIENTS = [
    {"w": np.array(g)}
    for g in (
        [[0.1, -0.2, 0.3], [0.4, 0.5, -0.6]],
        [[-0.3, 0.2, 0.1], [0.2, -0.1, 0.4]],
        [[0.2, 0.1, -0.4], [-0.5, 0.3, 0.1]],
    )
]
AFTER = {
    "muonh": [[0.4816265091, -1.0148330416, 1.4891678229], [-0.5331893340, 0.1959023414, 1.0051668545]],
    "adamh": [[0.4983795707, -1.0048965593, 1.4699746874], [-0.5491230628, 0.1775453793, 1.0297653262]],
    "lion": [[0.4998850011, -1.0000700013, 1.4998550034], [-0.5000849972, 0.2498925011, 0.9998699993]],
    "laprop": [[0.4990372882, -0.9992989219, 1.4983447591], [-0.5018392365, 0.2481413867, 1.0010112923]],
}
"""The weights after three steps of the published programs."""

TX = {
    "muonh": lambda: om.muonh(0.02, axes={"*": "oi"}, orthogonalizer=Exact()),
    "adamh": lambda: om.adamh(0.02, axes={"*": "oi"}),
    "lion": lambda: om.lion(1e-4, weight_decay=0.1),
    "laprop": lambda: om.laprop(1e-3),
}


@pytest.mark.parametrize("name", TX)
@rounding.in_float64
def test_three_steps_of_the_published_program(name):
    tx, params = TX[name](), jax.tree.map(jnp.asarray, WEIGHTS)
    state = tx.init(params)
    for g in GRADIENTS:
        updates, state = tx.update(jax.tree.map(jnp.asarray, g), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], AFTER[name], atol=6e-11)


@pytest.mark.parametrize(("axes", "sides"), [("bio", (1, 2)), ("iob", (0, 1)), ("iio", (0, 1, 2))])
@rounding.in_float64
def test_norms_are_those_of_matrices(axes, sides):
    """Of each in a stack; after 20 steps they are what they were."""
    rng = np.random.default_rng(0)
    w, tx = {"w": jnp.asarray(rng.standard_normal((4, 5, 6)))}, om.hyperball(0.1, {"*": axes})
    state, update, start = tx.init(w), jax.jit(tx.update), w
    for _ in range(20):
        updates, state = update({"w": jnp.asarray(rng.standard_normal((4, 5, 6)))}, state, w)
        w = optax.apply_updates(w, updates)
    before, after = (jnp.sqrt(jnp.sum(x["w"] ** 2, sides)) for x in (start, w))
    rounding.close(after, before, units=64)


@pytest.mark.parametrize(
    "spec", ["i(3o)", "i(1+2 o)", "i(2*(1+2) o)", "i(2~(1+2) o)", "(~2 i)o", "b(2*(1+2) i)o"]
)
@rounding.in_float64
def test_norms_are_those_of_blocks(spec):
    form, rng = om.linalg.Axes(spec), np.random.default_rng(0)
    shape = (2, 12, 4) if form.ndim == 3 else (12, 12)
    w, g = jnp.asarray(rng.standard_normal((2, *shape)))
    tx = om.hyperball(0.1, {"*": spec})
    after = optax.apply_updates(w, tx.update(g, tx.init(w), w)[0])
    for a, b in zip(form.matrices(w), form.matrices(after), strict=True):
        rounding.close(jnp.linalg.norm(b, axis=(-2, -1)), jnp.linalg.norm(a, axis=(-2, -1)), units=64)


def test_zero_weights_and_zero_directions():
    tx = om.hyperball(0.25, {"*": "io"})
    w, g = jnp.zeros((2, 3)), jnp.ones((2, 3))
    updates, _ = tx.update({"w": g}, tx.init({"w": w}), {"w": w})
    np.testing.assert_array_equal(updates["w"], -0.25)  # the plain step
    updates, _ = tx.update({"w": w}, tx.init({"w": g}), {"w": g})
    np.testing.assert_array_equal(updates["w"], 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    "spec", ["bio", "oib", "i(3o)", "(3i)o", "i(1+2 o)", "i(2*(1+2) o)", "i(2~(1+2) o)", "bi(2o)"]
)
@rounding.in_float64
def test_one_matrix_of_zeros_among_others(spec, dtype):
    """It takes the plain step and then keeps that norm; to its neighbours it is as any other matrix."""
    form, rng = om.linalg.Axes(spec), np.random.default_rng(0)
    shape = (3, 6, 12) if form.ndim == 3 else (6, 12)
    w, *gs = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(3))
    first, *rest = form.matrices(w)
    assert rest or first.ndim > 2  # there are neighbours
    index = (-1,) * (first.ndim - 2)
    zeros = form.array([first.at[index].set(0), *rest], shape)
    marks = form.array([jnp.zeros_like(first).at[index].set(1), *map(jnp.zeros_like, rest)], shape) > 0
    tx = om.hyperball(0.25, {"*": spec})
    update, state = jax.jit(tx.update), tx.init(w)
    (plain, _), (updates, state) = update(gs[0], state, w), update(gs[0], state, zeros)
    assert updates.dtype == dtype
    np.testing.assert_array_equal(updates, jnp.where(marks, -gs[0] / 4, plain))
    if dtype == "bfloat16":  # rounds the weights and so their norms
        return
    before = optax.apply_updates(zeros, updates)
    after = optax.apply_updates(before, update(gs[1], state, before)[0])
    for a, b in zip(form.matrices(before), form.matrices(after), strict=True):
        rounding.close(jnp.linalg.norm(b, axis=(-2, -1)), jnp.linalg.norm(a, axis=(-2, -1)), units=64)


def test_the_scale_of_the_direction_is_irrelevant():
    rng = np.random.default_rng(0)
    w, g = ({"w": jnp.asarray(rng.standard_normal((6, 4)), jnp.float32)} for _ in range(2))
    tx = om.hyperball(0.1, {"*": "io"})
    one, many = (tx.update({"w": c * g["w"]}, tx.init(w), w)[0]["w"] for c in (1.0, 2.0**20))
    rounding.close(many, one)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e18, 1e30])
def test_weights_of_any_size(size):
    rng = np.random.default_rng(0)
    w, g = ({"w": jnp.asarray(rng.standard_normal((64, 64)), jnp.float32)} for _ in range(2))
    tx = om.hyperball(0.1, {"*": "io"})
    plain = tx.update(g, tx.init(w), w)[0]["w"]
    scaled = {"w": w["w"] * jnp.float32(size)}
    rounding.close(tx.update(g, tx.init(w), scaled)[0]["w"] / jnp.float32(size), plain, units=64)


def test_bfloat16_weights():
    """With a key many small steps add up as in float32, and the norm stays within what is said of it."""
    rng = np.random.default_rng(0)
    start, g = (jnp.asarray(rng.standard_normal((64, 64)), jnp.bfloat16) for _ in range(2))
    tx = om.hyperball(5e-4, {"*": "io"})
    state = tx.init(start)

    def step(w, key):
        key = key if w.dtype == jnp.bfloat16 else None
        return om.apply_updates(w, tx.update(g, state, w)[0], key=key), None

    keys = jax.random.split(jax.random.key(0), 300)
    ends = (jax.lax.scan(step, start.astype(dtype), keys)[0] for dtype in (jnp.bfloat16, jnp.float32))
    got, want = (np.asarray(w, np.float64) for w in ends)
    assert abs(np.linalg.norm(got) / np.linalg.norm(want) - 1) < 5e-3
    assert np.linalg.norm(got - want) < np.linalg.norm(want - np.asarray(start, np.float64)) / 3


def test_derivatives_with_a_leaf_of_zeros():
    tx, g = om.hyperball(0.1, {"*": None}), {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}

    def loss(w):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(tx.update(g, tx.init(w), w)[0]))

    slopes = jax.grad(loss)({"w": jnp.eye(4, 3), "b": jnp.zeros(3)})
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(slopes))


def test_what_is_refused():
    w = {"w": jnp.ones((128, 128))}
    tx = om.hyperball(0.1, {"*": "io"})
    with pytest.raises(ValueError, match="hyperball: update was called without params"):
        tx.update(w, tx.init(w))
    inside = om.compress_state(om.chain(om.ema(0.9), tx))
    state = inside.init(w)
    with pytest.raises(ValueError, match="compress_state: put hyperball outside"):
        inside.update(w, state, w)
    with pytest.raises(ValueError, match="ema: nesterov and lookahead"):
        om.ema(0.9, nesterov=True, lookahead=0.5)


def test_recipes_store_moments_in_8_bits():
    """Beside the step on the sphere, which needs whole matrices."""
    w = {"w": jnp.ones((128, 128))}
    for tx in (om.adamh(0.1, axes={"*": "io"}, state="int8"), om.muonh(0.1, axes={"*": "io"}, state="int8")):
        state = tx.init(w)
        updates, state = jax.jit(tx.update)(w, state, w)
        assert any(x.dtype.itemsize == 1 for x in jax.tree.leaves(state))
        after = optax.apply_updates(w, updates)["w"]
        rounding.close(jnp.linalg.norm(after), jnp.linalg.norm(w["w"]), units=64)


def test_muonh_decays_the_other_leaves_that_its_mask_selects():
    w = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4), "embed": {"table": jnp.ones((8, 4))}}
    tx = om.muonh(0.1, axes={"kernel": "io", "*": None}, weight_decay=0.5, mask={"bias": False, "*": True})
    zeros = jax.tree.map(jnp.zeros_like, w)
    updates, _ = tx.update(zeros, tx.init(w), w)
    assert not jnp.any(updates["bias"])
    assert jnp.all(updates["embed"]["table"] < 0)
