"""bfloat16, and eight bits of what it leaves."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from optimorph.codecs.codec import Encoded
from optimorph.codecs.split import SplitCodec, steps_between
from optimorph.core.rounding import nearest_bfloat16, noise
from optimorph.core.types import DTypeLike


@dataclasses.dataclass(frozen=True)
class Split8(SplitCodec):
    """Three bytes: the nearest bfloat16 number, for the model, and how far x is from it, for the optimizer.

        θ' = bfloat16(x),  c = round(127 (x - θ') / (ULP(θ') / 2))        (1)
        |decoded - x| ≤ 129 · 2⁻²³ |x| < 1.6e-5 |x|        (2)

    Numbers of bfloat16 are exact, with c = 0, as are infinities and NaN; and bfloat16(decoded) is θ' always:
    a code is 258 of the 65536 steps of float32 from one number to the next, and 127 just short of half-way.

    By chance c is rounded up or down, right on average to two steps of float32, and (2) is twice as large:
    what is added to x is then not lost, however small.

    Below 1.2e-38, where float32's own steps stay as they are, (2) is 129 of them. Finite numbers stay finite:
    from 3.396e38 on, where there is no next, they are decoded as that.

    Args:
      stochastic: whether to round c by chance, which needs a key.

    References:
      FlashOptim 2026, arXiv:2602.23349, weight splitting.
    """

    stochastic: bool = False

    code_dtype: ClassVar[DTypeLike] = jnp.int8
    step: ClassVar[int] = 258

    def _encode(self, x: jax.Array, key: jax.Array | None, place: jax.Array) -> Encoded:
        nearest = nearest_bfloat16(x)
        steps = steps_between(nearest, x)
        if self.stochastic:
            chance = (noise(self._key(key), place) >> 16).astype(jnp.int32)
            codes = (steps + (self.step * chance >> 16)) // self.step  # in integers: codes keep what they are
        else:
            codes = jnp.round(steps.astype(jnp.float32) / self.step)
        return Encoded(jnp.clip(codes, -127, 127).astype(self.code_dtype), nearest)  # (1)
