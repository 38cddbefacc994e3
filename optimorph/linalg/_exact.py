"""The polar factor by singular value decomposition."""

import dataclasses

import jax
import jax.numpy as jnp

from optimorph._core.checks import check_matrices
from optimorph._core.numbers import with_type_of
from optimorph.linalg._newton_schulz import Stack, normalize


@dataclasses.dataclass(frozen=True)
class Exact:
    """The polar factor by singular value decomposition, exact up to rounding and slow on every device.

        G = U Σ Vᴴ,  polar(G) = U sign(Σ) Vᴴ        (1)

    Singular values below the rounding error are taken for zero. So the rank does not change, and the polar
    factor of zero is zero.

    Shapes:
      `(*batch, n, m)` in, the same out.

    References:
      Higham 2008, "Functions of Matrices", chapter 8.
    """

    def __call__(self, g: Stack) -> Stack:
        """The polar factor of every matrix."""
        check_matrices("Exact", g)
        if g.size == 0:
            return g
        u, s, vh = jnp.linalg.svd(normalize(g), full_matrices=False)
        nonzero = s > max(g.shape[-2:]) * jnp.finfo(s.dtype).eps * s[..., :1]
        factor = jnp.matmul(jnp.where(nonzero[..., None, :], u, 0), vh, precision="highest")  # (1)
        return with_type_of(jax.lax.convert_element_type(factor, g.dtype), g)
