"""How many directions matrices use, and how evenly: functions of their singular values that ignore size.

Letters, shapes and what is taken are as in `norms`.
"""

import jax
import jax.numpy as jnp

from optimorph.linalg.spectrum import Numbers, Spectrum, Stack, gram_powers, is_exact, largest, spectrum
from optimorph.linalg.unit import not_zero


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
    exact = is_exact("stable_rank", method)
    if exact or isinstance(x, Spectrum):
        ratios = _relative(x)
        leading, squares = largest(ratios) ** 2, jnp.sum(ratios**2, axis=-1)
    else:
        _, leading, squares = gram_powers(x)
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


def _relative(x: jax.Array | Spectrum) -> jax.Array:
    """Singular values over the largest, which derivatives take for a constant: for what is of degree 0."""
    values = spectrum(x).values
    return values / not_zero(jax.lax.stop_gradient(largest(values)))[..., None]
