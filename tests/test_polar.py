"""Properties of the polar factor: what it must be for every matrix, not how it is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import papers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimorph.linalg import Exact, NewtonSchulz

SHAPES = [
    (1, 1),
    (1, 7),
    (7, 1),
    (7, 7),
    (4, 16),
    (16, 4),
    (37, 100),
    (2, 3, 5, 4),
    (0, 3),
    (3, 0),
    (0, 4, 4),
]
METHODS = {
    "jordan": NewtonSchulz("jordan"),
    "polar_express": NewtonSchulz(),
    "polar_express8": NewtonSchulz(steps=8),
    "table": NewtonSchulz(((1.5, -0.5, 0.0),), steps=3),
    "exact": Exact(),
}
every = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def matrix(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def spectrum(values, shape=(12, 20), seed=0):
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((shape[0], shape[0])))[0]
    v = np.linalg.qr(rng.standard_normal((shape[1], shape[1])))[0]
    return u[:, : len(values)] * values @ v[:, : len(values)].T


ZOO = {
    "uniform": np.linspace(0.01, 1, 12),
    "gaussian": np.abs(matrix(12)),
    "power": np.arange(1, 13.0) ** -1.5,
    "exponential": np.exp(-np.arange(12.0)),
    "heavy": np.abs(np.random.default_rng(0).standard_cauchy(12)),
    "rank1": np.array([3.0]),
    "orthonormal": np.ones(12),
    "deficient": np.array([2.0, 1.0, 0.5, 0, 0, 0]),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every
def test_float64_equals_the_polynomial_of_the_singular_values(method, shape):
    """Newton-Schulz by products = its scalar polynomial on the spectrum; Exact = U Vᴴ."""
    with jax.enable_x64(True):
        g = matrix(shape)
        out = np.asarray(method(jnp.asarray(g)))
        assert out.shape == shape
        if g.size == 0:
            return
        for got, one in zip(out.reshape(-1, *shape[-2:]), g.reshape(-1, *shape[-2:]), strict=True):
            rows = {
                "jordan": papers.JORDAN,
                "polar_express": papers.EXPRESS,
            }.get(next(k for k, v in METHODS.items() if v is method))
            if rows:
                np.testing.assert_allclose(got, papers.on_singular_values(one, rows), atol=1e-9)
            if isinstance(method, Exact):
                u, _, vh = np.linalg.svd(one, full_matrices=False)
                np.testing.assert_allclose(got, u @ vh, atol=1e-12)


@pytest.mark.parametrize("values", ZOO.values(), ids=ZOO)
@every
def test_never_turns_a_direction_around(method, values):
    """Uᵀ polar(G) V is diagonal and not negative, whatever the spectrum."""
    g = jnp.asarray(spectrum(values), jnp.float32)
    u, _, vh = np.linalg.svd(spectrum(values), full_matrices=False)
    inside = u.T @ np.asarray(method(g), np.float64) @ vh.T
    np.testing.assert_allclose(inside - np.diag(np.diag(inside)), 0, atol=2e-3)
    assert np.min(np.diag(inside)) > -1e-3
    assert np.max(np.diag(inside)) < 1.25


def test_polar_express_reaches_one():
    """max |1 - σ| where the smallest singular value is a given part of the norm."""
    for lower, steps, bound in ((1e-3, 5, 0.27), (1e-2, 5, 0.15), (1e-3, 8, 1e-3)):
        values = np.geomspace(lower, 1, 12)
        values[0] = lower * np.linalg.norm(values)
        out = NewtonSchulz(steps=steps)(jnp.asarray(spectrum(values), jnp.float32))
        assert np.max(np.abs(1 - np.linalg.svd(np.asarray(out), compute_uv=False))) < bound


@every
def test_symmetries(method):
    """polar(U G Vᵀ) = U polar(G) Vᵀ; polar(Gᵀ) = polar(G)ᵀ; a stack is its slices."""
    g = jnp.asarray(matrix((5, 9)), jnp.float32)
    u = jnp.asarray(np.linalg.qr(matrix((5, 5), 1))[0], jnp.float32)
    v = jnp.asarray(np.linalg.qr(matrix((9, 9), 2))[0], jnp.float32)
    np.testing.assert_allclose(method(u @ g @ v.T), u @ method(g) @ v.T, atol=1e-4)
    np.testing.assert_allclose(method(g.T), method(g).T, atol=1e-5)
    stack = jnp.asarray(matrix((3, 2, 5, 9)), jnp.float32)
    np.testing.assert_allclose(method(stack)[1, 1], method(stack[1, 1]), atol=1e-5)


@every
def test_complex(method):
    with jax.enable_x64(True):
        g = matrix((4, 6)) + 1j * matrix((4, 6), 1)
        u, _, vh = np.linalg.svd(g, full_matrices=False)
        inside = u.conj().T @ np.asarray(method(jnp.asarray(g))) @ vh.conj().T
        np.testing.assert_allclose(inside, np.diag(np.diag(inside).real), atol=1e-9)


@every
@settings(deadline=None, max_examples=25)
@given(power=st.integers(-30, 30), seed=st.integers(0, 5))
def test_scale_does_not_matter(method, power, seed):
    g = matrix((5, 9), seed).astype(np.float32)
    scaled = (g.astype(np.float64) * 10.0**power).astype(np.float32)
    np.testing.assert_allclose(method(jnp.asarray(scaled)), method(jnp.asarray(g)), atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@every
def test_finite_and_in_its_dtype(method, dtype):
    extremes = [
        0.0,
        float(jnp.finfo(dtype).max),
        float(jnp.finfo(dtype).tiny),
        float(jnp.finfo(dtype).smallest_subnormal),
    ]
    for size in extremes:
        out = method(jnp.full((3, 5), size, dtype))
        assert out.dtype == dtype
        assert bool(jnp.all(jnp.isfinite(out)))
    assert not np.any(np.asarray(method(jnp.zeros((3, 5), dtype)), np.float32))


@every
def test_the_largest_numbers_are_not_flushed(method):
    g = np.asarray(matrix((3, 5)), np.float32)
    g = g / np.abs(g).max()
    huge = (g * 3e38).astype(np.float32)
    np.testing.assert_allclose(method(jnp.asarray(huge)), method(jnp.asarray(g)), atol=1e-5)


def test_iteration_dtype():
    """bfloat16 inside: coarse, yet in the input's dtype and close."""
    g = jnp.asarray(matrix((16, 32)), jnp.float32)
    out = NewtonSchulz(dtype=jnp.bfloat16)(g)
    assert out.dtype == jnp.float32
    error = np.abs(np.asarray(out) - np.asarray(NewtonSchulz()(g))).max()
    assert 1e-5 < error < 0.1


def test_description_is_hashable_and_frozen():
    assert NewtonSchulz() == NewtonSchulz("polar_express", 5)
    assert len({NewtonSchulz(), NewtonSchulz("jordan"), NewtonSchulz([[1.5, -0.5, 0.0]])}) == 3
    with pytest.raises(AttributeError):
        NewtonSchulz().steps = 3


@every
def test_under_vmap_and_jit(method):
    stack = jnp.asarray(matrix((3, 5, 9)), jnp.float32)
    np.testing.assert_allclose(jax.jit(jax.vmap(method))(stack), method(stack), atol=1e-5)
