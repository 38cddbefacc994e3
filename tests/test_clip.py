"""The global norm: right at any size, in any dtype, over all leaves, and silent about nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding

import optimorph as om


def norm(tree):
    """In float64."""
    return float(
        np.sqrt(sum(np.sum(np.abs(np.asarray(x).astype(complex)) ** 2) for x in jax.tree.leaves(tree)))
    )


def clipped(g, max_norm=1.0):
    tx = om.clip_by_global_norm(max_norm)
    return jax.jit(tx.update)(g, tx.init(g))


@pytest.mark.parametrize("size", [1e-34, 1e-30, 1e-20, 1.0, 1e20, 1e30, 1e38])
def test_any_size(size):
    """Between the norms of float32: clipped at a third of it, left as it is at thrice, by the last bit."""
    rng = np.random.default_rng(0)
    g = {"a": rng.standard_normal((5, 7)), "b": rng.standard_normal(11), "z": np.zeros(3)}
    largest = max(np.abs(x).max() for x in g.values())
    g = jax.tree.map(lambda x: jnp.asarray(x / largest * size, jnp.float32), g)
    true = norm(g)
    updates, state = clipped(g, np.float32(true / 3))
    rounding.close(norm(updates), np.float32(true / 3), dtype="float32")
    rounding.close(updates, jax.tree.map(lambda x: np.asarray(x, float) / 3, g))
    rounding.close(state.norm, min(true, np.finfo(np.float32).max))
    rounding.close(state.factor, 1 / 3)
    updates, state = clipped(g, 3 * true if 3 * true < 3e38 else np.inf)
    jax.tree.map(np.testing.assert_array_equal, updates, g)
    assert state.factor == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_a_factor_below_the_least_number_still_clips(sign):
    updates, state = clipped(jnp.full(4, sign * 3e38, jnp.float32))
    rounding.close(updates, sign * 0.5)
    assert state.norm == np.finfo(np.float32).max


def test_zero():
    g = {"a": jnp.zeros(3), "b": jnp.zeros((), jnp.bfloat16)}
    updates, state = clipped(g)
    jax.tree.map(np.testing.assert_array_equal, updates, g)
    assert (state.norm, state.factor) == (0, 1)
    slope = jax.grad(lambda x: om.clip_by_global_norm(1.0).update(x, None)[0].sum())(jnp.zeros(3))
    np.testing.assert_array_equal(slope, 1)


def test_its_derivative_is_that_of_the_formula():
    g = jnp.asarray([3.0, 4.0])
    slope = jax.grad(lambda x: om.clip_by_global_norm(1.0).update(x, None)[0][0])(g)
    rounding.close(slope, np.array([16 / 125, -12 / 125]))


def test_a_million_ones_in_float16():
    """Their norm of 1000 is one of float16's numbers, the sum of their squares is not."""
    updates, state = clipped(jnp.ones(10**6, jnp.float16))
    assert updates.dtype == jnp.float16
    rounding.close(state.norm, 1000.0)  # sums of ones are exact
    np.testing.assert_array_equal(updates, jnp.float16(1e-3))


def test_float16_squares_that_underflow():
    _, state = clipped(jnp.full(100, 1e-7, jnp.float16), 1e-8)
    rounding.close(state.norm, 10 * float(jnp.float16(1e-7)))
    rounding.close(state.factor, 1e-8 / float(state.norm))


@pytest.mark.slow
def test_a_thousand_bfloat16_leaves():
    """Adding 1 to 256 in bfloat16 gives 256."""
    g = {str(k): jnp.full(4, 1.0, jnp.bfloat16) for k in range(1000)}
    updates, state = clipped(g)
    rounding.close(state.norm, np.sqrt(4000))
    assert updates["7"].dtype == jnp.bfloat16
    rounding.close(norm(updates), 1.0, units=0.6, dtype="bfloat16")  # all are rounded alike, by half a unit


def test_complex_numbers_whose_modulus_overflows():
    updates, _ = clipped(
        {"c": jnp.asarray([3e38 + 3e38j], jnp.complex64), "r": jnp.full(1, 3e38, jnp.float32)}
    )
    rounding.close(updates["c"], (1 + 1j) / np.sqrt(3))


def test_float64():
    with jax.enable_x64(True):
        g = {"a": jnp.asarray([3e200, 4e200]), "b": jnp.zeros(2, jnp.float32)}
        updates, state = clipped(g)
        rounding.close(updates["a"], np.array([0.6, 0.8]))
        assert (updates["b"].dtype, state.norm) == (jnp.float32, np.finfo(np.float32).max)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_numbers_are_reported_and_do_not_spread(bad):
    g = {"a": jnp.asarray([bad, 5.0]), "b": jnp.full(5, 9.0)}
    updates, state = clipped(g)
    jax.tree.map(np.testing.assert_array_equal, updates, g)
    np.testing.assert_equal(float(state.norm), abs(bad))
    assert state.factor == 1


def test_once_for_all_routed_groups():
    """Clipping within each of two groups gives √2."""
    params = {"a": jnp.full(3, 10.0), "b": jnp.full(3, 10.0)}

    def routed(make):
        return om.partition({"a": "first", "b": "second"}, {"first": make(), "second": make()})

    outside = optax.chain(om.clip_by_global_norm(1.0), routed(optax.identity))
    inside = routed(lambda: om.clip_by_global_norm(1.0))
    for tx, expected in ((outside, 1.0), (inside, np.sqrt(2))):
        updates, _ = tx.update(params, tx.init(params), params)
        rounding.close(norm(updates), expected, dtype="float32")


def test_in_front_of_muon():
    """Muon's matrices do not feel a factor; what it sends to others is clipped by the norm of all."""
    params = {"kernel": jnp.ones((3, 3)), "bias": jnp.full(4, 2.0)}
    seen = om.muon(0.1, axes={"kernel": "io", "bias": None}, others=optax.identity())
    tx = optax.chain(om.clip_by_global_norm(1.0), seen)
    updates, state = tx.update(params, tx.init(params), params)
    rounding.close(state[0].norm, 5.0)
    rounding.close(updates["bias"], 2 / 5)


def test_a_norm_for_every_run():
    g = jnp.asarray([[3.0, 4.0], [0.3, 0.4], [jnp.nan, 4.0]])
    tx = om.clip_by_global_norm(1.0)
    updates, state = jax.vmap(lambda g: tx.update(g, tx.init(g)))(g)
    rounding.close_each(updates, np.array([[0.6, 0.8], [0.3, 0.4], [np.nan, 4.0]]))
    rounding.close_each(state.norm, np.array([5, 0.5, np.nan]))
