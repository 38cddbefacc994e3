"""Codecs of weights: a bfloat16 number, and how far the weight is from it."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from optimorph.codecs.codec import Codec, Encoded
from optimorph.core.types import DTypeLike, Shape


@dataclasses.dataclass(frozen=True)
class SplitCodec(Codec):
    """What the codecs of weights share.

        x = θ' + step c        (1)

    The parts are the blocks' and the scales' of `Encoded`, in blocks of one: `codes` is c, `scales` is θ'.
    Differences are those of the bits, in steps of float32, of which 65536 are one of bfloat16: they count
    away from zero, are exact in every binade, and where steps change, at powers of two, each side has its
    own.
    """

    code_dtype: ClassVar[DTypeLike]
    step: ClassVar[int]

    def zeros(self, shape: Shape) -> Encoded:
        """Zeros."""
        return Encoded(jnp.zeros(shape, self.code_dtype), jnp.zeros(shape, jnp.bfloat16))

    def _decode(self, encoded: Encoded) -> jax.Array:
        assert encoded.scales is not None
        bits = _bits(encoded.scales) + self.step * encoded.codes.astype(jnp.int32)  # (1)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)


def steps_between(nearest: jax.Array, x: jax.Array) -> jax.Array:
    """From bfloat16 numbers to float32 ones, in steps of float32; 0 for NaN."""
    return jnp.where(jnp.isnan(x), 0, jax.lax.bitcast_convert_type(x, jnp.int32) - _bits(nearest))


def _bits(x: jax.Array) -> jax.Array:
    """bfloat16 as the bits of a float32."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) << 16
