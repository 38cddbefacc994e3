"""Codecs of weights: a bfloat16 number for the model, and the difference from it for the optimizer."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from optimorph._core.checks import check_flags
from optimorph._core.rounding import nearest_bfloat16, noise, with_nan_of
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
        return Encoded(jnp.zeros(shape, self.code_dtype), jnp.zeros(shape, jnp.bfloat16))

    def _decode(self, encoded: Encoded) -> jax.Array:
        assert encoded.scales is not None
        bits = _bits(encoded.scales) + self.step * encoded.codes.astype(jnp.int32)  # (1)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Split8(_SplitCodec):
    """Three bytes: the nearest bfloat16 number for the model, and 8 bits of difference for the optimizer.

        θ' = bfloat16(x),  c = round(127 (x - θ') / (ULP(θ') / 2))        (1)
        |decoded - x| ≤ 129 · 2⁻²³ |x| < 1.6e-5 |x|        (2)

    bfloat16 numbers, infinities and NaN are exact, with c = 0. bfloat16(decoded) is always θ': two codes are
    258 steps of float32 apart, of the 65536 steps between two neighbours in bfloat16, and code 127 is just
    below the middle.

    With stochastic rounding c is unbiased up to two steps of float32, and the error is at most twice (2).
    Small additions to x are then not lost.

    Below 1.2e-38 the steps of float32 no longer shrink, and the error is at most 129 of these steps. Numbers
    above 3.396e38 are decoded as 3.396e38, so finite numbers stay finite.

    Args:
      stochastic: whether to round c stochastically, which needs a key.

    References:
      FlashOptim 2026, arXiv:2602.23349, weight splitting.
    """

    stochastic: bool = False

    def __post_init__(self):
        check_flags("Split8", stochastic=self.stochastic)

    code_dtype: ClassVar[DTypeLike] = jnp.int8
    step: ClassVar[int] = 258

    def _encode(self, x: jax.Array, key: jax.Array | None, place: jax.Array, scales: None) -> Encoded:
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
    """Four bytes, exact in float32: the nearest bfloat16 number for the model, and 16 bits of difference.

        θ' = bfloat16(x), ties away from zero,  c = x - θ' in steps of float32        (1)
        decoded = x        (2)

    There are 65536 steps of float32 between two neighbours in bfloat16, and as many codes. Ties are rounded
    away from zero, because the usual rounding to even would need one more code. So θ' differs from
    `x.astype("bfloat16")` at ties, for one number in 131072.

    (2) holds for all numbers, zeros and infinities. NaN is decoded as NaN. Above 3.396e38 θ'
    is infinite, as with `astype`, and x is still decoded exactly.
    """

    code_dtype: ClassVar[DTypeLike] = jnp.int16
    step: ClassVar[int] = 1

    def _encode(self, x: jax.Array, key: jax.Array | None, place: jax.Array, scales: None) -> Encoded:
        upper = (jax.lax.bitcast_convert_type(x, jnp.uint32) + 0x8000) >> 16
        nearest = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
        nearest = with_nan_of(x, nearest)  # the carry can make NaN a zero
        return Encoded(_steps_between(nearest, x).astype(self.code_dtype), nearest)


def _steps_between(nearest: jax.Array, x: jax.Array) -> jax.Array:
    """The steps of float32 from bfloat16 numbers to float32 numbers; 0 for NaN."""
    return jnp.where(jnp.isnan(x), 0, jax.lax.bitcast_convert_type(x, jnp.int32) - _bits(nearest))


def _bits(x: jax.Array) -> jax.Array:
    """bfloat16 as the bits of a float32."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) << 16
