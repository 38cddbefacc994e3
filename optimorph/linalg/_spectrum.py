"""Norms and ranks of stacks of matrices: functions of their singular values.

A matrix W maps rows of inputs to rows of outputs, y = x W. Its singular values are σ₁ ≥ σ₂ ≥ ... ≥ σᵣ, where
r = min(inputs, outputs). Norms and ranks take a stack `(*batch, inputs, outputs)` and return one number per
matrix, `(*batch)`, in float32 or wider; all are differentiable. They also take a `Spectrum`, so that several
share one decomposition. Ranks do not depend on the size of W; the rank of zero is 0.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from optimorph._core.checks import check_integer, check_matrices
from optimorph._core.numbers import upcast_dtype
from optimorph._core.shown import shown
from optimorph.linalg._newton_schulz import Stack, rescale, safe_denominator
from optimorph.linalg._symmetric import product

Numbers = Float[Array, "*batch"]

METHODS = ("gram", "svd")

SQUARINGS = 10
"""Squarings of the Gram matrix, to its 1024th power: accurate to 0.34 % for 1000 singular values."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The singular values of a stack of matrices, as `spectrum` returns them. Every norm accepts them.

    Args:
      values: `(*batch, r)`, the largest first.
      shape: (inputs, outputs) of each matrix.
    """

    values: jax.Array
    shape: tuple[int, int]


def spectrum(x: Stack | Spectrum) -> Spectrum:
    """All singular values of every matrix, by singular value decomposition.

    The error of each is a few roundings of the largest, about 1e-6 σ₁ in float32. Smaller values are noise. A
    `Spectrum` is returned unchanged.
    """
    if isinstance(x, Spectrum):
        return x
    check_matrices("linalg", x, jnp.number)
    n, m = x.shape[-2:]
    if x.size == 0:
        real = jnp.finfo(upcast_dtype(x.dtype)).dtype
        return Spectrum(jnp.zeros((*x.shape[:-2], min(n, m)), real), (n, m))
    y, scale = rescale(x)
    return Spectrum(scale[..., 0] * jnp.linalg.svd(y, compute_uv=False), (n, m))


def spectral_norm(x: Stack | Spectrum, method: str = "gram") -> Numbers:
    """The largest singular value, ‖W‖₂ = σ₁: the largest factor by which W stretches a vector.

        σ₁² ≈ tr Aᵏ⁺¹ / tr Aᵏ,  A = W Wᴴ or Wᴴ W, the smaller; k = 2¹⁰ by squaring A ten times      (1)
        σ₁ r^(-1/(2k + 2)) ≤ √(1) ≤ σ₁                                                              (2)

    (1) is a mean of the eigenvalues of A, each weighted by its own kth power, so it is at most σ₁², up to
    rounding. By the inequality of means it is at least (tr Aᵏ⁺¹ / r)^(1/(k + 1)), which gives (2). The norm
    is at most 0.34 % too small for any matrix with r = 1000, and 0.45 % with r = 10,000. It is exact if every
    other singular value is equal to σ₁ or at least 1 % smaller, as in orthogonal matrices. Its derivative is
    u vᴴ, where u and v are the leading singular vectors. If there are several, it is a mean over them.

    Args:
      method: "gram" for (1), which takes eleven matrix products, or "svd", which is exact. It has no effect
        on a `Spectrum`, which is exact already.

    Raises:
      ValueError: another method.

    References:
      (2) is the argument of Kuczyński & Woźniakowski 1992, "Estimating the largest eigenvalue by the power
      and Lanczos algorithms with a random start", for all starts at once.
    """
    exact = _is_exact("spectral_norm", method)
    if exact or isinstance(x, Spectrum):
        return _largest(spectrum(x).values)
    scale, leading, _ = _gram_powers(x)
    return scale * jnp.sqrt(safe_denominator(leading))


def rms_to_rms_norm(x: Stack | Spectrum, method: str = "gram") -> Numbers:
    """The largest factor by which W multiplies the root mean square of a vector.

        max rms(x W) / rms(x) = √(inputs / outputs) ‖W‖₂        (1)

    Args:
      method: as in `spectral_norm`, with the same accuracy.

    Raises:
      ValueError: another method.

    References:
      Bernstein & Newhouse 2024, arXiv:2410.21265; Yang, Simon & Bernstein 2023, arXiv:2310.17813.
    """
    _is_exact("rms_to_rms_norm", method)
    norm = spectral_norm(x, method)
    inputs, outputs = x.shape[-2:]
    return math.sqrt(max(1, inputs) / max(1, outputs)) * norm  # (1)


def stable_rank(x: Stack | Spectrum, method: str = "gram") -> Numbers:
    """The sum of squared singular values divided by the square of the largest, between 1 and the rank r.

        ‖W‖F² / ‖W‖₂²        (1)

    Args:
      method: as in `spectral_norm`. The relative error is that of the squared norm: with "gram" the rank is
        at most 0.7 % too large for r = 1000.

    Raises:
      ValueError: another method.

    References:
      Rudelson & Vershynin 2007, arXiv:math/0503442, section 1.
    """
    exact = _is_exact("stable_rank", method)
    if exact or isinstance(x, Spectrum):
        ratios = _relative(x)
        leading, squares = _largest(ratios) ** 2, jnp.sum(ratios**2, axis=-1)
    else:
        _, leading, squares = _gram_powers(x)
    return squares / safe_denominator(leading)  # (1)


def effective_rank(x: Stack | Spectrum) -> Numbers:
    """The number of equal singular values that would have the same entropy, between 1 and the rank r.

        exp(-Σ pₖ ln pₖ),  pₖ = σₖ / Σ σ        (1)

    References:
      Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    ratios = _relative(x)
    total = jnp.sum(ratios, axis=-1)
    shares = ratios / safe_denominator(total)[..., None]
    entropy = -jnp.sum(shares * jnp.log(safe_denominator(shares)), axis=-1)
    return jnp.where(total == 0, 0, jnp.exp(entropy))  # (1)


def top_energy(x: Stack | Spectrum, k: int) -> Numbers:
    """The share of the k largest singular values in the sum of squares, between 0 and 1.

        Σ σⱼ² over j ≤ k / Σ σⱼ²        (1)

    The best approximation of rank k keeps this share. For a matrix of zeros it is 0.

    Args:
      k: at least 1.

    Raises:
      ValueError: k below 1, or not a whole number.

    References:
      Eckart & Young 1936, "The approximation of one matrix by another of lower rank".
    """
    check_integer("top_energy", "k", k, 1)
    squares = _relative(x) ** 2
    return jnp.sum(squares[..., :k], axis=-1) / safe_denominator(jnp.sum(squares, axis=-1))  # (1)


def orthogonality_error(x: Stack | Spectrum) -> Numbers:
    """The relative distance of W from the nearest multiple of an orthogonal matrix.

        min ‖W - c Q‖F / ‖W‖F over c and Q with orthonormal rows or columns = √(Σ (σ - σ̄)² / Σ σ²)        (1)

    σ̄ is the mean of all r singular values. The error is in [0, 1). It is 0 if all singular values are equal
    or zero, and √(1 - 1/r) for a matrix of rank 1. In float32 it is accurate above 1e-6.

    References:
      The nearest Q is the polar factor: Fan & Hoffman 1955, "Some metric inequalities in the space of
      matrices"; Higham 2008, "Functions of Matrices", theorem 8.4.
    """
    ratios = _relative(x)
    mean = jnp.sum(ratios, axis=-1, keepdims=True) / max(1, ratios.shape[-1])
    deviation = jnp.sum((ratios - mean) ** 2, axis=-1) / safe_denominator(jnp.sum(ratios**2, axis=-1))
    return jnp.where(deviation == 0, 0, jnp.sqrt(safe_denominator(deviation)))  # (1)


def _is_exact(who: str, method: str) -> bool:
    """Whether a method is the exact one; refuse unknown methods."""
    if method not in METHODS:
        raise ValueError(f"{who}: method is {shown(method)}. Type {' or '.join(map(repr, METHODS))}.")
    return method == "svd"


def _largest(values: jax.Array) -> jax.Array:
    return jnp.max(values, axis=-1, initial=0)


def _relative(x: jax.Array | Spectrum) -> jax.Array:
    """Singular values over the largest, which derivatives treat as a constant: for functions of degree 0."""
    values = spectrum(x).values
    return values / safe_denominator(jax.lax.stop_gradient(_largest(values)))[..., None]


def _gram_powers(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A scale c, with (σ₁ / c)² by (1) of `spectral_norm` and (‖x‖F / c)²."""
    check_matrices("linalg", x, jnp.number)
    if x.size == 0:
        zeros = spectrum(x).values.sum(axis=-1)
        return zeros, zeros, zeros
    y, scale = rescale(x)
    y = y.mT.conj() if y.shape[-2] > y.shape[-1] else y
    a = product(y, y.mT.conj(), "highest")
    power = _of_trace_one(jax.lax.stop_gradient(a))
    power = jax.lax.fori_loop(0, SQUARINGS, lambda _, b: _of_trace_one(product(b, b, "highest")), power)
    return scale[..., 0, 0], jnp.sum((a * power.conj()).real, axis=(-2, -1)), _trace(a)


def _of_trace_one(a: jax.Array) -> jax.Array:
    return a / safe_denominator(_trace(a))[..., None, None].astype(a.dtype)


def _trace(a: jax.Array) -> jax.Array:
    return jnp.trace(a, axis1=-2, axis2=-1).real
