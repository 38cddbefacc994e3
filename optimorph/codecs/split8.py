"""bfloat16, and eight bits of what it leaves."""

import dataclasses

import jax
import jax.numpy as jnp

from optimorph.codecs.codec import Codec, Encoded
from optimorph.core.rounding import nearest_bfloat16
from optimorph.core.types import Shape

STEP = 258
"""Of a code, in steps of float32, 65536 of which are one of bfloat16: 127 stop just short of its half."""


@dataclasses.dataclass(frozen=True)
class Split8(Codec):
    """Three bytes: the nearest bfloat16 number, for the model, and how far x is from it, for the optimizer.

        θ' = bfloat16(x),  c = round(127 (x - θ') / (ULP(θ') / 2))        (1)
        |decoded - x| ≤ 129 · 2⁻²³ |x| < 1.6e-5 |x|        (2)

    The parts are the blocks' and the scales' of `Encoded`, in blocks of one: `codes` is c, `scales` is θ'.
    Differences are those of the bits, in steps of float32: they count away from zero, are exact in every
    binade, and where ULP changes, at powers of two, each side has its own. Numbers of
    bfloat16 are exact, with c = 0, as are infinities and NaN; and bfloat16(decoded) is θ' always: 127 is just
    short of half of the way to the next.

    Below 1.2e-38, where float32's own steps stay as they are, (2) is 129 of them. Finite numbers stay finite:
    from 3.396e38 on, where there is no next, they are decoded as that.

    References:
      FlashOptim 2026, arXiv:2602.23349, weight splitting.
    """

    def zeros(self, shape: Shape) -> Encoded:
        """Zeros."""
        return Encoded(jnp.zeros(shape, jnp.int8), jnp.zeros(shape, jnp.bfloat16))

    def _encode(self, x: jax.Array, key: jax.Array | None, place: jax.Array) -> Encoded:
        nearest = nearest_bfloat16(x)
        steps = jnp.where(jnp.isnan(x), 0, jax.lax.bitcast_convert_type(x, jnp.int32) - _bits(nearest))
        codes = jnp.clip(jnp.round(steps.astype(jnp.float32) / STEP), -127, 127)  # (1)
        return Encoded(codes.astype(jnp.int8), nearest)

    def _decode(self, encoded: Encoded) -> jax.Array:
        assert encoded.scales is not None
        bits = _bits(encoded.scales) + STEP * encoded.codes.astype(jnp.int32)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _bits(x: jax.Array) -> jax.Array:
    """bfloat16 as the bits of a float32."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) << 16
