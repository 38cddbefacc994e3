"""The polar factor of a stack of matrices: what is left of a matrix when every singular value is 1."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from optimorph.core.tree import wide
from optimorph.core.types import DTypeLike
from optimorph.linalg.coefficients import table

Stack = Inexact[Array, "*batch n m"]


@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
    """The polar factor by matrix products alone.

        X ← G / ‖G‖F                                     (1)
        X ← a X + (b XXᴴ + c (XXᴴ)²) X, row by row       (2)

    Each step applies the odd polynomial a σ + b σ³ + c σ⁵ to the singular values and leaves the singular
    vectors as they are. The smaller side is squared. Scale does not matter: polar(cG) = polar(G) for c > 0;
    zero comes back as zero.

    Shapes:
      `(*batch, n, m)` in, the same out.

    Args:
      coefficients: `"polar_express"`, `"jordan"`, or rows `((a, b, c), ...)`, of which the last repeats.
      steps: how many times (2) is applied, at least 1.
      dtype: of the iteration; float32 or the input's own, whichever is wider. Complex input keeps its own.

    Raises:
      ValueError: an unknown preset, a malformed table, fewer than one step.

    References:
      Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks";
      Amsel et al. 2025, arXiv:2505.16932 (Polar Express); Björck & Bowie 1971.
    """

    coefficients: str | Sequence[Sequence[float]] = "polar_express"
    steps: int = 5
    dtype: DTypeLike | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        """Refuse what could not be computed, and keep the description hashable."""
        table(self.coefficients, self.steps)
        if not isinstance(self.coefficients, str):
            object.__setattr__(self, "coefficients", tuple(tuple(row) for row in self.coefficients))

    def __call__(self, g: Stack) -> Stack:
        """The approximate polar factor of every matrix."""
        if g.size == 0:
            return g
        x = _unit(g)
        if self.dtype is not None and not jnp.iscomplexobj(x):
            x = x.astype(self.dtype)
        tall = g.shape[-2] > g.shape[-1]
        x = x.mT.conj() if tall else x
        for a, b, c in table(self.coefficients, self.steps):
            gram = _product(x, x.mT.conj())
            x = a * x + _product(b * gram + c * _product(gram, gram), x)  # (2)
        return (x.mT.conj() if tall else x).astype(g.dtype)


@dataclasses.dataclass(frozen=True)
class Exact:
    """The polar factor by singular value decomposition: the oracle, slow on every machine.

        G = U Σ Vᴴ,  polar(G) = U sign(Σ) Vᴴ        (1)

    Singular values below rounding count as zero, so rank is kept and zero comes back as zero.

    Shapes:
      `(*batch, n, m)` in, the same out.

    References:
      Higham 2008, "Functions of Matrices", chapter 8.
    """

    def __call__(self, g: Stack) -> Stack:
        """The polar factor of every matrix."""
        if g.size == 0:
            return g
        u, s, vh = jnp.linalg.svd(_unit(g), full_matrices=False)
        kept = s > max(g.shape[-2:]) * jnp.finfo(s.dtype).eps * s[..., :1]
        return _product(jnp.where(kept[..., None, :], u, 0), vh).astype(g.dtype)  # (1)


def _unit(g: jax.Array) -> jax.Array:
    """(1) of `NewtonSchulz`, safe from overflow and underflow; zero stays zero."""
    x = wide(g)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    middle = jnp.where(largest > 1, 2.0**-64, 2.0**64).astype(
        largest.dtype
    )  # whose reciprocals are all normal
    x = x * middle.astype(x.dtype)
    x = x / _not_zero(largest * middle).astype(x.dtype)
    squares = jnp.sum((x * x.conj()).real, axis=(-2, -1), keepdims=True)
    return x / jnp.sqrt(_not_zero(squares)).astype(x.dtype)


def _not_zero(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, 1, x)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """A product in the dtype that was asked for: accelerators would round float32 factors to 10 bits."""
    return jnp.matmul(x, y, precision="highest")
