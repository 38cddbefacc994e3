"""The codec of 8-bit floats."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from optimorph._core.types import DTypeLike
from optimorph.codecs._blocks import BlockCodec

TOP = 256.0
"""The code of s: a power of two, so that decoding rounds once, and below 448, the largest of e4m3."""


@dataclasses.dataclass(frozen=True)
class Float8(BlockCodec):
    """One byte for each signed number: four bits of exponent, three of mantissa. Each block has a scale.

        x = s c / 256,  c in e4m3        (1)
        |decoded - x| ≤ max(|x| / 17, s / 262144)        (2)

    s is the largest |x| of the block. Numbers are rounded to the nearest value, and a second round trip
    changes nothing. Numbers below s / 262144 become 0. Second moments must not become 0, so use `Nonneg8` for
    them.

    A block whose numbers are all below 4.8e-38 becomes zeros, exactly. A non-finite number makes its own
    block NaN.

    Args:
      block: the most numbers that share a scale, at least 1. Blocks may be narrower, down to a quarter of it,
        so that 16 devices can share a row evenly. If a row is divided further, encoding costs communication.
      scale_dtype: float32 or bfloat16.

    Raises:
      ValueError: another dtype, or a block below 1.

    References:
      Micikevicius et al. 2022, "FP8 formats for deep learning", arXiv:2209.05433.
    """

    code_dtype: ClassVar[DTypeLike] = jnp.float8_e4m3fn

    def _codes(self, quarters: jax.Array, key: jax.Array | None, place: jax.Array) -> jax.Array:
        return TOP / 4 * quarters

    def _values(self, codes: jax.Array) -> jax.Array:
        """(1); without the sign apart, compilers turn (c / TOP) s into c (s / TOP), which may underflow."""
        c = codes.astype(jnp.float32)
        return jnp.sign(c) * (jnp.abs(c) / TOP)
