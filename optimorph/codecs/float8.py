"""Eight bits with an exponent."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from optimorph.codecs.blocks import BlockCodec
from optimorph.core.types import DTypeLike

TOP = 256.0
"""What s becomes: a power of two, so that decoding rounds once, below 448, beyond which e4m3 has only NaN."""


@dataclasses.dataclass(frozen=True)
class Float8(BlockCodec):
    """One byte for numbers of either sign: four bits of exponent, three of mantissa, and a scale per block.

        x = s c / 256,  c in e4m3        (1)
        |decoded - x| ≤ max(|x| / 17, s / 262144)        (2)

    s is the largest |x| of the block. Each number becomes the nearest that its block has; a second round trip
    changes nothing. Below s / 262144 it is 0, which second moments must not be: `Nonneg8` is for those.

    A block of zeros is exact, and a block is zeros if all is below 4.8e-38. A number that is not finite makes
    its block NaN, and no other.

    Args:
      block: how many numbers share a scale, at least 1; more on each device than a multiple of it, if the
        last axis is divided over devices, costs communication.
      scale_dtype: float32 or bfloat16.

    Raises:
      ValueError: another dtype, or a block of no numbers.

    References:
      Micikevicius et al. 2022, "FP8 formats for deep learning", arXiv:2209.05433.
    """

    code_dtype: ClassVar[DTypeLike] = jnp.float8_e4m3fn

    def _codes(self, quarters: jax.Array, key: jax.Array | None, place: jax.Array) -> jax.Array:
        return TOP / 4 * quarters

    def _values(self, codes: jax.Array) -> jax.Array:
        """(1), the sign apart: of (c / TOP) s compilers make c (s / TOP), which may vanish."""
        c = codes.astype(jnp.float32)
        return jnp.sign(c) * (jnp.abs(c) / TOP)
