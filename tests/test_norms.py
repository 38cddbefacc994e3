"""Norms and ranks: what NumPy's singular values say, at any size, and the laws that make them norms."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from optimorph import linalg
from optimorph.linalg import Exact, NewtonSchulz, spectral_norm, spectrum
from optimorph.linalg._spectrum import SQUARINGS

SHAPES = [(1, 1), (1, 7), (6, 6), (5, 9), (9, 5), (2, 3, 8, 4)]
FACTS = {
    "spectral_norm": (linalg.spectral_norm, lambda s, n, m: s[0]),
    "spectral_norm svd": (functools.partial(spectral_norm, method="svd"), lambda s, n, m: s[0]),
    "rms_to_rms_norm": (linalg.rms_to_rms_norm, lambda s, n, m: s[0] * np.sqrt(n / m)),
    "stable_rank": (linalg.stable_rank, lambda s, n, m: (s**2).sum() / s[0] ** 2),
    "stable_rank svd": (
        functools.partial(linalg.stable_rank, method="svd"),
        lambda s, n, m: (s**2).sum() / s[0] ** 2,
    ),
    "effective_rank": (
        linalg.effective_rank,
        lambda s, n, m: np.exp(-np.sum(s / s.sum() * np.log(s / s.sum()))),
    ),
    "top_energy": (lambda x: linalg.top_energy(x, 2), lambda s, n, m: (s[:2] ** 2).sum() / (s**2).sum()),
    "orthogonality_error": (
        linalg.orthogonality_error,
        lambda s, n, m: np.sqrt(1 - s.mean() ** 2 / (s**2).mean()),
    ),
}
NORMS = [name for name in FACTS if "norm" in name]
every = pytest.mark.parametrize(("f", "fact"), FACTS.values(), ids=FACTS)
each_norm = pytest.mark.parametrize("f", [FACTS[name][0] for name in NORMS], ids=NORMS)


def matrix(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def of_values(values, shape=None, seed=0):
    """A matrix of these singular values, in float64."""
    n, m = shape or (len(values), len(values) + 3)
    u, v = (np.linalg.qr(matrix((k, len(values)), seed + k))[0] for k in (n, m))
    return u * values @ v.T


def by_numpy(fact, x):
    n, m = x.shape[-2:]
    values = np.linalg.svd(x, compute_uv=False).reshape(-1, min(n, m))
    return np.reshape([fact(s, n, m) for s in values], x.shape[:-2])


@pytest.mark.parametrize(("shape", "i"), [*((shape, 0) for shape in SHAPES), ((9, 5), 1j)], ids=str)
@every
def test_facts(f, fact, shape, i):
    with jax.enable_x64(True):
        x = matrix(shape) + i * matrix(shape, 1)
        got = f(jnp.asarray(x))
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, by_numpy(fact, x), rtol=1e-7, atol=3e-8)


@pytest.mark.examples("spectral_norm", "rms_to_rms_norm")
@every
@rounding.in_float64
def test_one_decomposition_serves_all(f, fact):
    """Everything takes a spectrum, with or without jit and vmap, and says the same of it."""
    x = jnp.asarray(matrix((3, 5, 9)))
    found = jax.jit(spectrum)(x)
    assert (found.shape, spectrum(found)) == ((5, 9), found)
    rounding.close(f(found), f(x), units=64)
    rounding.close(jax.vmap(f)(found), f(x), units=64)
    twice = jax.vmap(lambda found, _: f(found), (None, 0))(found, jnp.zeros(2))
    rounding.close(twice[1], f(x), units=64)
    rounding.close(jax.jit(jax.vmap(f))(x), f(x), units=64)


def test_it_is_decomposed_once():
    text = str(
        jax.make_jaxpr(lambda x: [f(found) for found in [spectrum(x)] for f, _ in FACTS.values()])(jnp.eye(3))
    )
    assert len(re.findall(r"\bsvd\[", text)) == 1


ZOO = {
    "gaussian": np.sort(np.abs(matrix(40)))[::-1],
    "linear": np.linspace(1, 0.01, 60),
    "power": np.arange(1, 61.0) ** -1.5,
    "rank 1": np.array([3.0]),
    "deficient": np.array([2.0, 1.0, 0.5, 0, 0, 0]),
    "all equal": np.full(50, 7.0),
    "some equal": np.array([4.0] * 5 + [1.0] * 30),
    "1 % apart": np.array([1.0] + [0.99] * 100),
    "nearly equal": np.linspace(1, 0.999, 60),
    "worst": np.array([1.0] + [math.sqrt(1 - 4.34e-3)] * 300),
    "worst for half the power": np.array([1.0] + [math.sqrt(1 - 8.66e-3)] * 300),
}


@pytest.mark.examples("rank 1-*", "worst-*")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("values", ZOO.values(), ids=ZOO)
def test_gram_powers_keep_their_bound(values, dtype):
    """Never above the norm and never below it by more than is promised, but for rounding."""
    with jax.enable_x64(dtype == "float64"):
        ratio = float(spectral_norm(jnp.asarray(of_values(values), dtype))) / values[0]
    few = 16 * rounding.eps(dtype)
    assert len(values) ** (-1 / 2050) - few <= ratio <= 1 + few


@settings(deadline=None, max_examples=40)
@given(st.lists(st.just(0.0) | st.floats(1e-200, 1), min_size=1, max_size=12), st.integers(0, 3))
def test_gram_powers_keep_their_bound_whatever_the_spectrum(values, seed):
    with jax.enable_x64(True):
        x = of_values(np.array(values + [0.0] * (12 - len(values))), seed=seed)
        ratio = float(spectral_norm(jnp.asarray(x)))
        assert max(values) * len(values) ** (-1 / 2050) * (1 - 1e-12) <= ratio <= max(values) * (1 + 1e-12)


def test_the_figures_of_the_docstring():
    assert SQUARINGS == 10
    for figure, r, power in ((0.0034, 1000, 1), (0.0045, 10_000, 1), (0.0067, 1000, 2)):
        assert figure == pytest.approx(1 - r ** (-power / 2050), abs=5e-5)


@pytest.mark.slow
def test_the_bound_is_not_idle():
    """The worst spectrum is more than half of the way to it; those of the docstring are exact."""
    with jax.enable_x64(True):
        error = {name: 1 - float(spectral_norm(jnp.asarray(of_values(s)))) / s[0] for name, s in ZOO.items()}
    assert error["worst"] > 0.6 * (1 - 301 ** (-1 / 2050))
    assert max(abs(error[name]) for name in ("rank 1", "all equal", "some equal", "1 % apart")) < 1e-8


@pytest.mark.parametrize("power", [-30, 30])
@every
def test_any_size(f, fact, power):
    """Norms are of degree 1, ranks and shares of degree 0."""
    x = matrix((5, 9))
    got = f(jnp.asarray(x * 10.0**power, jnp.float32))
    degree = 1 if f in [FACTS[name][0] for name in NORMS] else 0
    rounding.close(np.float64(got) / 10.0 ** (degree * power), by_numpy(fact, x), dtype="float32")
    slope = jax.grad(f)(jnp.asarray(x * 10.0**power, jnp.float32))
    plain = jax.grad(f)(jnp.asarray(x, jnp.float32))
    s = np.linalg.svd(x, compute_uv=False)
    directions = s[0] / -np.max(np.diff(s))  # by how much the gaps magnify an error of singular vectors
    slope = np.float64(slope) * 10.0 ** ((1 - degree) * power)
    rounding.close(slope, plain, condition=directions, dtype="float32")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@every
def test_half_precision_is_computed_in_float32(f, fact, dtype):
    x = jnp.asarray(matrix((40, 30)), dtype)
    got = f(x)
    assert got.dtype == jnp.float32
    rounding.close(got, by_numpy(fact, np.asarray(x, np.float64)), units=2, condition=np.sqrt(x.size))


@pytest.mark.examples("spectral_norm", "rms_to_rms_norm")
@every
def test_zero_is_zero_with_finite_slopes(f, fact):
    """And so are slopes where singular values are equal, or some of them zero."""
    for kind in (jnp.float32, jnp.complex64):
        zero = jnp.zeros((4, 6), kind)
        assert f(zero) == 0
        for x in (zero, jnp.eye(4, 6, dtype=kind), jnp.eye(4, 6, dtype=kind).at[3, 3].set(0)):
            assert np.all(np.isfinite(jax.grad(f)(x)))


@every
def test_nothing_at_all(f, fact):
    for shape in ((0, 3), (3, 0), (2, 0, 3), (0, 4, 4)):
        np.testing.assert_array_equal(f(jnp.zeros(shape)), np.zeros(shape[:-2]))


@every
def test_what_is_not_finite_is_reported(f, fact):
    assert np.isnan(f(jnp.eye(3).at[1, 2].set(jnp.nan)))


@pytest.mark.examples("spectral_norm", "rms_to_rms_norm")
@pytest.mark.parametrize("name", FACTS)
def test_derivatives(name):
    """Against finite differences."""
    with jax.enable_x64(True):
        x = jnp.asarray(of_values(np.array([4.0, 2.0, 1.5, 1.0])))
        check_grads(lambda x: FACTS[name][0](jnp.asarray(x)), (x,), order=1, rtol=1e-6)


def test_derivatives_of_gram_powers():
    """u vᴴ; where several singular values are the largest, or nearly, a mean of nuclear norm 1."""
    with jax.enable_x64(True):
        x = of_values(np.array([4.0, 2.0, 1.5, 1.0]))
        u, _, vh = np.linalg.svd(x)
        np.testing.assert_allclose(
            jax.grad(spectral_norm)(jnp.asarray(x)), np.outer(u[:, 0], vh[0]), atol=1e-12
        )
        rank = jax.grad(linalg.stable_rank)(jnp.asarray(x))
        exact = jax.grad(functools.partial(linalg.stable_rank, method="svd"))(jnp.asarray(x))
        np.testing.assert_allclose(rank, exact, atol=1e-12)
        several = jax.grad(spectral_norm)(jnp.asarray(of_values(np.array([3.0, 3.0, 1.0]))))
        np.testing.assert_allclose(np.linalg.svd(several, compute_uv=False), [0.5, 0.5, 0], atol=1e-9)
        near = jnp.asarray(of_values(np.linspace(1, 0.999, 60)))
        mean = jax.grad(spectral_norm)(near)
        assert jnp.linalg.norm(mean, "nuc") == pytest.approx(1, abs=1e-6)
        np.testing.assert_allclose(jnp.sum(mean * near), spectral_norm(near), rtol=1e-12)


seeds = given(st.integers(0, 10**6), st.sampled_from([(5, 9), (9, 5), (6, 6)]))
often = settings(deadline=None, max_examples=8)


@pytest.mark.examples("spectral_norm", "rms_to_rms_norm")
@every
@often
@seeds
def test_turning_changes_nothing(f, fact, seed, shape):
    with jax.enable_x64(True):
        x = matrix(shape, seed)
        u, v = (np.linalg.qr(matrix((k, k), seed + k))[0] for k in shape)
        np.testing.assert_allclose(f(jnp.asarray(u @ x @ v)), f(jnp.asarray(x)), rtol=1e-9)


@pytest.mark.examples("spectral_norm", "rms_to_rms_norm")
@each_norm
@often
@seeds
def test_norms_are_norms(f, seed, shape):
    with jax.enable_x64(True):
        a, b = (jnp.asarray(matrix(shape, seed + k)) for k in range(2))
        gram = 9 ** (1 / 2050)  # by which the sum's may fall short
        assert f(a) > 0
        np.testing.assert_allclose(f(-2.5 * a), 2.5 * f(a), rtol=1e-9)
        assert f(a + b) <= gram * (f(a) + f(b))


@often
@seeds
def test_norms_are_submultiplicative(seed, shape):
    with jax.enable_x64(True):
        a, b = jnp.asarray(matrix(shape, seed)), jnp.asarray(matrix((shape[1], 7), seed + 1))
        for norm in (linalg.spectral_norm, linalg.rms_to_rms_norm):
            whole, *parts = (norm(x, "svd") for x in (a @ b, a, b))
            assert whole <= parts[0] * parts[1] * (1 + 1e-12)


@often
@given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=8), st.integers(0, 10**6))
def test_ranks_count(values, seed):
    """Between 1 and the number of singular values that are not zero; the stable rank is never the larger."""
    with jax.enable_x64(True):
        x = jnp.asarray(of_values(np.array(values + [0.0] * (8 - len(values))), seed=seed))
        stable, effective = linalg.stable_rank(x, "svd"), linalg.effective_rank(x)
        assert 1 - 1e-9 <= stable <= effective + 1e-9
        assert effective <= len(values) + 1e-9
        assert stable - 1e-9 <= linalg.stable_rank(x) <= stable * 8 ** (1 / 1025) + 1e-9
        shares = [float(linalg.top_energy(x, k)) for k in range(1, 10)]
        assert shares == sorted(shares)
        assert shares[len(values) - 1 :] == pytest.approx([1.0] * (10 - len(values)))


@rounding.in_float64
def test_ranks_of_equal_values():
    x = jnp.asarray(of_values(np.array([2.0] * 5 + [0.0] * 3)))
    for f in (linalg.stable_rank, linalg.effective_rank):
        np.testing.assert_allclose(f(x), 5, rtol=1e-12)
    np.testing.assert_allclose([linalg.top_energy(x, k) for k in (1, 3, 9)], [0.2, 0.6, 1], rtol=1e-12)


def test_rms_to_rms_is_what_is_measured():
    with jax.enable_x64(True):
        w = matrix((30, 12))

        def gain(x):
            return np.sqrt(np.mean((x @ w) ** 2, -1) / np.mean(x**2, -1))

        norm = linalg.rms_to_rms_norm(jnp.asarray(w))
        assert np.max(gain(matrix((1000, 30), 1))) < norm
        np.testing.assert_allclose(gain(np.linalg.svd(w)[0][:, 0]), norm, rtol=1e-9)


def test_orthogonality_error_is_an_angle():
    """Between the matrix and its polar factor, and no other orthogonal matrix is nearer."""
    with jax.enable_x64(True):
        g = jnp.asarray(matrix((5, 9)))
        q = Exact()(g)
        cosine = jnp.sum(g * q) / (jnp.linalg.norm(g) * jnp.linalg.norm(q))
        error = linalg.orthogonality_error(g)
        np.testing.assert_allclose(error, jnp.sqrt(1 - cosine**2), rtol=1e-9)
        for seed in range(1, 21):  # not that of g, whose direction leads nowhere
            other = Exact()(q + 0.1 * jnp.asarray(matrix((5, 9), seed)))
            c = jnp.sum(g * other) / jnp.sum(other * other)
            assert jnp.linalg.norm(g - c * other) > error * jnp.linalg.norm(g)
        np.testing.assert_allclose(linalg.orthogonality_error(7 * q), 0, atol=1e-12)
        one = jnp.asarray(of_values(np.array([3.0]), (5, 9)))
        np.testing.assert_allclose(linalg.orthogonality_error(one), np.sqrt(1 - 1 / 5), rtol=1e-9)
        steps = [linalg.orthogonality_error(NewtonSchulz(steps=k)(g)) for k in (1, 3, 8)]
        assert steps == sorted(steps, reverse=True)


REFUSED = {
    "no direction": (lambda x: linalg.top_energy(x, 0), ["top_energy", "k", "at least 1", "0"]),
    "boolean": (lambda x: linalg.top_energy(x, True), ["top_energy", "True"]),
    "method": (lambda x: spectral_norm(x, "power"), ["spectral_norm", "'power'", "'gram' or 'svd'"]),
    "rms method": (lambda x: linalg.rms_to_rms_norm(x, "qr"), ["rms_to_rms_norm", "'qr'"]),
    "rank's method": (lambda x: linalg.stable_rank(spectrum(x), "qr"), ["stable_rank", "'qr'"]),
}


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(call, words):
    with pytest.raises(ValueError) as caught:
        call(jnp.eye(3))
    assert all(word in str(caught.value) for word in words)
