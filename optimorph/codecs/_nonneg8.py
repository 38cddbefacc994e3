"""The codec of second moments: 8 bits without a sign, and without a zero."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from optimorph.codecs._blocks import BlockCodec, nearest
from optimorph.core.rounding import noise
from optimorph.core.types import DTypeLike


@dataclasses.dataclass(frozen=True)
class Nonneg8(BlockCodec):
    """One byte for nonnegative numbers by whose roots one divides: second moments. Rounding is stochastic.

        x = s (c / 256)²,  c = 1 ... 256                          (1)
        E[decoded] = x for x ≥ s / 65536, and |√decoded - √x| ≤ √s / 256        (2)

    s is the largest x of the block. There is no code for zero: numbers below s / 65536 become s / 65536,
    since an update divided by the root of 0 is as large as eps allows, while one divided by √s / 256 is
    small. Rounding is stochastic because an average with β = 0.999 moves by less than half the distance to
    the next code: rounded to the nearest it would never change, and rounded up it would never fall.

    A block whose numbers are all below 4.8e-38 becomes zeros, exactly. A negative or non-finite number makes
    its own block NaN.

    Args:
      block: the numbers that share a scale, at least 1. If the last axis is sharded, shards that are not a
        multiple of it cost communication.
      scale_dtype: float32 or bfloat16.

    Raises:
      ValueError: another dtype, or a block below 1; when encoding, no key.

    References:
      The root: FlashOptim 2026, arXiv:2602.23349; no zero: Li et al. 2023, "Memory efficient optimizers with
      4-bit states", arXiv:2309.01507, section 4.1; stochastic rounding: Gupta et al. 2015, arXiv:1502.02551.
    """

    code_dtype: ClassVar[DTypeLike] = jnp.uint8

    def _bits(self, blocks: jax.Array) -> jax.Array:
        """x as int32 in the same order, negative numbers and NaN above all."""
        return jnp.where(blocks >= 0, jax.lax.bitcast_convert_type(blocks, jnp.int32), 0x7FFFFFFF)

    def _codes(self, quarters: jax.Array, key: jax.Array | None, place: jax.Array) -> jax.Array:
        random = (noise(self._key(key), place) >> 16).astype(jnp.int32).astype(jnp.float32)
        size = 16384 * quarters  # 65536 x / s
        c = jnp.clip(jnp.floor(jnp.sqrt(size)), 1, 255)
        above = size - c**2 > (random + 0.5) / 65536 * (2 * c + 1)  # the fraction of the way to (c + 1)²
        return nearest(jnp.where(above, c, c - 1))  # (2)

    def _values(self, codes: jax.Array) -> jax.Array:
        return ((codes.astype(jnp.float32) + 1) / 256) ** 2  # (1)
