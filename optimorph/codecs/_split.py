"""Codecs of weights: a bfloat16 number for the model, and the difference from it for the optimizer."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from optimorph._core.rounding import nearest_bfloat16, noise
from optimorph._core.types import DTypeLike, Shape
from optimorph.codecs._codec import Codec, Encoded


@dataclasses.dataclass(frozen=True)
class _SplitCodec(Codec):
    """What the codecs of weights share.

        x = θ' + step c        (1)

    In `Encoded`, `codes` is c and `scales` is θ', one for each number. Differences are between bit patterns,
    in steps of float32, of which 65536 are one of bfloat16: they count away from zero, are exact in every
    binade, and are right on both sides of a power of two, where the step size changes.
    """

    code_dtype: ClassVar[DTypeLike]
    step: ClassVar[int]

    def zeros(self, shape: Shape) -> Encoded:
        """The encoding of zeros."""
        return Encoded(jnp.zeros(shape, self.code_dtype), jnp.zeros(shape, jnp.bfloat16))

    def _decode(self, encoded: Encoded) -> jax.Array:
        assert encoded.scales is not None
        bits = _bits(encoded.scales) + self.step * encoded.codes.astype(jnp.int32)  # (1)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Split8(_SplitCodec):
    """Three bytes: the nearest bfloat16 number for the model, and a byte of difference for the optimizer.

        θ' = bfloat16(x),  c = round(127 (x - θ') / (ULP(θ') / 2))        (1)
        |decoded - x| ≤ 129 · 2⁻²³ |x| < 1.6e-5 |x|        (2)

    bfloat16 numbers, infinities and NaN are exact, with c = 0, and bfloat16(decoded) is always θ': a code is
    258 of the 65536 steps of float32 between neighbors, and code 127 is just short of half-way.

    With stochastic rounding c is unbiased to two steps of float32, and the error twice (2): additions to x,
    however small, are then not lost.

    Below 1.2e-38, where the steps of float32 no longer shrink, the error is at most 129 of them. Finite
    numbers stay finite: those above 3.396e38 are decoded as 3.396e38.

    Args:
      stochastic: whether to round c stochastically, which needs a key.

    References:
      FlashOptim 2026, arXiv:2602.23349, weight splitting.
    """

    stochastic: bool = False

    code_dtype: ClassVar[DTypeLike] = jnp.int8
    step: ClassVar[int] = 258

    def _encode(self, x: jax.Array, key: jax.Array | None, place: jax.Array) -> Encoded:
        nearest = nearest_bfloat16(x)
        steps = _steps_between(nearest, x)
        if self.stochastic:
            random = (noise(self._key(key), place) >> 16).astype(jnp.int32)
            codes = (steps + (self.step * random >> 16)) // self.step  # integers: exact codes stay exact
        else:
            codes = jnp.round(steps.astype(jnp.float32) / self.step)
        return Encoded(jnp.clip(codes, -127, 127).astype(self.code_dtype), nearest)  # (1)


@dataclasses.dataclass(frozen=True)
class Split16(_SplitCodec):
    """Four bytes, float32 bit by bit: the nearest bfloat16 number for the model, and the steps from it to x.

        θ' = bfloat16(x), half-way away from zero,  c = x - θ' in steps of float32        (1)
        decoded = x        (2)

    There are 65536 steps between neighbors in bfloat16, and as many codes. Rounding half-way to even, as is
    usual, would need one code more, for half-way up and down: θ' differs there from `x.astype("bfloat16")`,
    for one number in 131072.

    (2) holds for all numbers, zeros and infinities; every NaN is decoded as the same NaN. From 3.396e38 on θ'
    is infinite, as with `astype`, and x is still decoded exactly.
    """

    code_dtype: ClassVar[DTypeLike] = jnp.int16
    step: ClassVar[int] = 1

    def _encode(self, x: jax.Array, key: jax.Array | None, place: jax.Array) -> Encoded:
        upper = (jax.lax.bitcast_convert_type(x, jnp.uint32) + 0x8000) >> 16
        nearest = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
        nearest = jnp.where(jnp.isnan(x), jnp.bfloat16(jnp.nan), nearest)  # the carry can make NaN a zero
        return Encoded(_steps_between(nearest, x).astype(self.code_dtype), nearest)


def _steps_between(nearest: jax.Array, x: jax.Array) -> jax.Array:
    """The steps of float32 from bfloat16 numbers to float32 numbers; 0 for NaN."""
    return jnp.where(jnp.isnan(x), 0, jax.lax.bitcast_convert_type(x, jnp.int32) - _bits(nearest))


def _bits(x: jax.Array) -> jax.Array:
    """bfloat16 as the bits of a float32."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) << 16
