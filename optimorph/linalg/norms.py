"""How large matrices are and how many directions they use: functions of their singular values.

A matrix W takes rows of inputs to rows of outputs, y = x W. Its singular values are σ₁ ≥ σ₂ ≥ ... ≥ σᵣ, where
r = min(inputs, outputs). All functions here take a stack `(*batch, inputs, outputs)` and return one number
for each matrix, `(*batch)`, in float32 or wider; all can be differentiated. Those that need singular values
take a `Spectrum` as well, so that several share one decomposition.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from optimorph.core.checks import check_numbers
from optimorph.core.tree import wide_dtype
from optimorph.core.types import Numeric
from optimorph.linalg.symmetric import product
from optimorph.linalg.unit import not_zero, scaled

Stack = Inexact[Array, "*batch n m"]
Numbers = Float[Array, "*batch"]

METHODS = ("gram", "svd")

SQUARINGS = 10
"""Of a Gram matrix: its 1024th power, from which the largest of 1000 singular values is found to 0.34 %."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The singular values of a stack of matrices: what `spectrum` returns and every norm takes.

    Args:
      values: `(*batch, r)`, the largest first.
      shape: (inputs, outputs) of each matrix.
    """

    values: jax.Array
    shape: tuple[int, int]


def spectrum(x: Stack | Spectrum) -> Spectrum:
    """All singular values of every matrix, by singular value decomposition.

    Each is known to a few roundings of the largest, 1e-6 σ₁ in float32: what is smaller is noise. A spectrum
    comes back as it is, so of several norms of `spectrum(x)` only the first costs anything.
    """
    if isinstance(x, Spectrum):
        return x
    n, m = x.shape[-2:]
    if x.size == 0:
        real = jnp.finfo(wide_dtype(x.dtype)).dtype
        return Spectrum(jnp.zeros((*x.shape[:-2], min(n, m)), real), (n, m))
    y, scale = scaled(x)
    return Spectrum(scale[..., 0] * jnp.linalg.svd(y, compute_uv=False), (n, m))


def spectral_norm(x: Stack | Spectrum, method: str = "gram") -> Numbers:
    """The largest singular value, ‖W‖₂ = σ₁: the most that W stretches a vector.

        σ₁² ≈ tr Aᵏ⁺¹ / tr Aᵏ,  A = W Wᴴ or Wᴴ W, the smaller; k = 2¹⁰ by squaring A ten times      (1)
        σ₁ r^(-1/(2k + 2)) ≤ √(1) ≤ σ₁                                                              (2)

    (1) is a mean of the eigenvalues of A, each weighted by its own kth power. So it is never above σ₁², but
    for rounding; and by the inequality of means never below (tr Aᵏ⁺¹ / r)^(1/(k + 1)), whence (2): at most
    0.34 % too small for r = 1000, 0.45 % for r = 10,000, whatever the matrix. It is exact where all other
    singular values are 1 % smaller than σ₁ or equal to it, as they are in orthogonal matrices.
    Its derivative is u vᴴ of the leading singular vectors; of several, a mean.

    Args:
      method: "gram", (1), which is eleven products of matrices; or "svd", exact. A spectrum is exact already.

    Raises:
      ValueError: another method.

    References:
      (2) is the argument of Kuczyński & Woźniakowski 1992, "Estimating the largest eigenvalue by the power
      and Lanczos algorithms with a random start", for all starts at once.
    """
    exact = _exact("spectral_norm", method)
    if exact or isinstance(x, Spectrum):
        return _largest(spectrum(x).values)
    scale, leading, _ = _gram_powers(x)
    return scale * jnp.sqrt(not_zero(leading))


def rms_to_rms_norm(x: Stack | Spectrum, method: str = "gram") -> Numbers:
    """The most that W multiplies the root mean square of a vector.

        max rms(x W) / rms(x) = √(inputs / outputs) ‖W‖₂        (1)

    Args:
      method: as that of `spectral_norm`, whose accuracy it has.

    Raises:
      ValueError: another method.

    References:
      Bernstein & Newhouse 2024, arXiv:2410.21265; Yang, Simon & Bernstein 2023, arXiv:2310.17813.
    """
    _exact("rms_to_rms_norm", method)
    return _widening(x) * spectral_norm(x, method)  # (1)


def rms_to_rms_dual_norm(x: Stack | Spectrum) -> Numbers:
    """The dual of `rms_to_rms_norm`: how much a W of norm 1 can change a loss of gradient G.

        max ⟨G, W⟩ over √(inputs / outputs) ‖W‖₂ ≤ 1  =  √(outputs / inputs) Σ σ        (1)

    References:
      Bernstein & Newhouse 2024, arXiv:2409.20325.
    """
    return nuclear_norm(x) / _widening(x)  # (1)


def nuclear_norm(x: Stack | Spectrum) -> Numbers:
    """The sum of the singular values: the dual of the spectral norm, ⟨A, B⟩ ≤ ‖A‖₂ ‖B‖⁎."""
    return jnp.sum(spectrum(x).values, axis=-1)


def schatten_norm(x: Stack | Spectrum, p: Numeric) -> Numbers:
    """The p-norm of the singular values.

        ‖W‖ₚ = (Σ σᵖ)^(1/p)        (1)

    The nuclear norm for p = 1, Frobenius' for 2, the spectral norm for infinity.

    Args:
      p: at least 1; infinity is one of them.

    Raises:
      ValueError: p below 1, when it is a concrete number.
    """
    check_numbers("schatten_norm", p=p)
    values = spectrum(x).values
    largest = _largest(values)
    p = jnp.asarray(p, values.dtype)
    power = jnp.where(jnp.isinf(p), 1, p)
    scale = jax.lax.stop_gradient(largest)
    ratios = values / not_zero(scale)[..., None]
    finite = scale * not_zero(jnp.sum(ratios**power, axis=-1)) ** (1 / power)  # (1)
    return jnp.where(jnp.isinf(p), largest, finite)


def dual_exponent(p: Numeric) -> jax.Array:
    """The q whose Schatten norm is the dual of that of p: ⟨A, B⟩ ≤ ‖A‖ₚ ‖B‖_q, attained for every A.

        1/p + 1/q = 1        (1)

    Args:
      p: at least 1; 1 and infinity are each other's.

    Raises:
      ValueError: p below 1, when it is a concrete number.
    """
    check_numbers("dual_exponent", p=p)
    return 1 / (1 - 1 / jnp.asarray(p, float))  # (1)


def stable_rank(x: Stack | Spectrum, method: str = "gram") -> Numbers:
    """How many singular values as large as the largest the squares of all would make: in [1, r].

        ‖W‖F² / ‖W‖₂²        (1)

    Zero has rank 0.

    Args:
      method: as that of `spectral_norm`. The rank is too large by what the square of that norm is too small
        by: 0.7 % at most for r = 1000.

    Raises:
      ValueError: another method.

    References:
      Rudelson & Vershynin 2007, arXiv:math/0503442, section 1.
    """
    exact = _exact("stable_rank", method)
    if exact or isinstance(x, Spectrum):
        ratios = _relative(x)
        leading, squares = _largest(ratios) ** 2, jnp.sum(ratios**2, axis=-1)
    else:
        _, leading, squares = _gram_powers(x)
    return squares / not_zero(leading)  # (1)


def effective_rank(x: Stack | Spectrum) -> Numbers:
    """How many equal singular values would have the entropy of these: in [1, r].

        exp(-Σ pₖ ln pₖ),  pₖ = σₖ / Σ σ        (1)

    Zero has rank 0.

    References:
      Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    ratios = _relative(x)
    total = jnp.sum(ratios, axis=-1)
    shares = ratios / not_zero(total)[..., None]
    entropy = -jnp.sum(shares * jnp.log(not_zero(shares)), axis=-1)
    return jnp.where(total == 0, 0, jnp.exp(entropy))  # (1)


def top_energy(x: Stack | Spectrum, k: int) -> Numbers:
    """The share of the squares that the k largest singular values have: in [0, 1].

        Σ σⱼ² over j ≤ k / Σ σⱼ²        (1)

    It is what the best approximation of rank k keeps. Zero has none.

    Args:
      k: at least 1.

    Raises:
      ValueError: k below 1, or no whole number.

    References:
      Eckart & Young 1936, "The approximation of one matrix by another of lower rank".
    """
    if isinstance(k, bool) or k != int(k) or k < 1:
        raise ValueError(f"top_energy: k must be a whole number of at least 1, but is {k}. Type k=1.")
    squares = _relative(x) ** 2
    return jnp.sum(squares[..., :k], axis=-1) / not_zero(jnp.sum(squares, axis=-1))  # (1)


def orthogonality_error(x: Stack | Spectrum) -> Numbers:
    """How far W is from a multiple of an orthogonal matrix: the sine of its angle to its polar factor.

        min ‖W - c Q‖F / ‖W‖F over c and Q with orthonormal rows or columns = √(Σ (σ - σ̄)² / Σ σ²)        (1)

    σ̄ is the mean of all r. In [0, 1): 0 where all singular values are equal, √(1 - 1/r) at rank 1, and 0 for
    zero, which is a multiple too. The size of W does not matter. In float32 it is seen from 1e-6 on.

    References:
      The nearest Q is the polar factor: Fan & Hoffman 1955, "Some metric inequalities in the space of
      matrices"; Higham 2008, "Functions of Matrices", theorem 8.4.
    """
    ratios = _relative(x)
    mean = jnp.sum(ratios, axis=-1, keepdims=True) / max(1, ratios.shape[-1])
    deviation = jnp.sum((ratios - mean) ** 2, axis=-1) / not_zero(jnp.sum(ratios**2, axis=-1))
    return jnp.where(deviation == 0, 0, jnp.sqrt(not_zero(deviation)))  # (1)


def _exact(who: str, method: str) -> bool:
    """Whether a method is the exact one."""
    if method not in METHODS:
        raise ValueError(f"{who}: no method is called {method!r}. Type {' or '.join(map(repr, METHODS))}.")
    return method == "svd"


def _gram_powers(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """c, and (σ₁ / c)² and (‖x‖F / c)² for it: (1) of `spectral_norm`."""
    if x.size == 0:
        zeros = spectrum(x).values.sum(axis=-1)
        return zeros, zeros, zeros
    y, scale = scaled(x)
    y = y.mT.conj() if y.shape[-2] > y.shape[-1] else y
    a = product(y, y.mT.conj(), "highest")
    power = _of_trace_one(jax.lax.stop_gradient(a))
    power = jax.lax.fori_loop(0, SQUARINGS, lambda _, b: _of_trace_one(product(b, b, "highest")), power)
    return scale[..., 0, 0], jnp.sum((a * power.conj()).real, axis=(-2, -1)), _trace(a)


def _of_trace_one(a: jax.Array) -> jax.Array:
    return a / not_zero(_trace(a))[..., None, None].astype(a.dtype)


def _trace(a: jax.Array) -> jax.Array:
    return jnp.trace(a, axis1=-2, axis2=-1).real


def _largest(values: jax.Array) -> jax.Array:
    return jnp.max(values, axis=-1, initial=0)


def _relative(x: jax.Array | Spectrum) -> jax.Array:
    """Singular values over the largest, which derivatives take for a constant: for what is of degree 0."""
    values = spectrum(x).values
    return values / not_zero(jax.lax.stop_gradient(_largest(values)))[..., None]


def _widening(x: jax.Array | Spectrum) -> float:
    """√(inputs / outputs)."""
    inputs, outputs = x.shape[-2:]
    return math.sqrt(max(1, inputs) / max(1, outputs))
