"""Eight bits without a sign, and without a zero."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from optimorph.codecs.blocks import BlockCodec, nearest
from optimorph.core.rounding import noise
from optimorph.core.types import DTypeLike


@dataclasses.dataclass(frozen=True)
class Nonneg8(BlockCodec):
    """One byte for numbers of at least 0 whose roots one divides by: second moments. Rounded by chance.

        x = s (c / 256)²,  c = 1 ... 256                          (1)
        E[decoded] = x for x ≥ s / 65536, and |√decoded - √x| ≤ √s / 256        (2)

    s is the largest x of the block. Codes have no zero: what is below s / 65536 becomes that, since an update
    divided by the root of 0 is as large as eps allows, while one divided by √s / 256 is small. And they are
    rounded by chance: an average with β = 0.999 moves by less than half of the way to the next code, so that
    rounded to the nearest it would stand still, and rounded up never fall.

    A block of zeros is exact, and a block is zeros if all is below 4.8e-38. A number that is not finite, or
    negative, makes its block NaN, and no other.

    Args:
      block: how many numbers share a scale, at least 1; more on each device than a multiple of it, if the
        last axis is divided over devices, costs communication.
      scale_dtype: float32 or bfloat16.

    Raises:
      ValueError: another dtype, or a block of no numbers; at encoding, no key.

    References:
      The root: FlashOptim 2026, arXiv:2602.23349; no zero: Li et al. 2023, "Memory efficient optimizers with
      4-bit states", arXiv:2309.01507, section 4.1; chance: Gupta et al. 2015, arXiv:1502.02551.
    """

    code_dtype: ClassVar[DTypeLike] = jnp.uint8

    def _bits(self, blocks: jax.Array) -> jax.Array:
        """What is negative, like NaN, above all."""
        return jnp.where(blocks >= 0, jax.lax.bitcast_convert_type(blocks, jnp.int32), 0x7FFFFFFF)

    def _codes(self, quarters: jax.Array, key: jax.Array | None, place: jax.Array) -> jax.Array:
        chance = (noise(self._key(key), place) >> 16).astype(jnp.int32).astype(jnp.float32)
        size = 16384 * quarters  # 65536 x / s
        c = jnp.clip(jnp.floor(jnp.sqrt(size)), 1, 255)
        above = size - c**2 > (chance + 0.5) / 65536 * (2 * c + 1)  # of the way to (c + 1)²
        return nearest(jnp.where(above, c, c - 1))  # (2)

    def _values(self, codes: jax.Array) -> jax.Array:
        return ((codes.astype(jnp.float32) + 1) / 256) ** 2  # (1)
