"""bfloat16, and all that it leaves."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from optimorph.codecs.codec import Encoded
from optimorph.codecs.split import SplitCodec, steps_between
from optimorph.core.types import DTypeLike


@dataclasses.dataclass(frozen=True)
class Split16(SplitCodec):
    """Four bytes, float32 bit by bit: the nearest bfloat16 number, for the model, and the steps to x.

        θ' = bfloat16(x), half-way away from zero,  c = x - θ' in steps of float32        (1)
        decoded = x        (2)

    There are 65536 steps from one bfloat16 number to the next, and as many codes. If half-way were rounded to
    the even one, as is usual, that would need one code more, for half-way up and down: θ' differs there from
    `x.astype("bfloat16")`, in one number of 131072.

    (2) holds for all numbers, zeros and infinities; NaN is NaN, of one kind. From 3.396e38 on θ' is infinite,
    as it is of `astype`, and x comes back all the same.
    """

    code_dtype: ClassVar[DTypeLike] = jnp.int16
    step: ClassVar[int] = 1

    def _encode(self, x: jax.Array, key: jax.Array | None, place: jax.Array) -> Encoded:
        upper = (jax.lax.bitcast_convert_type(x, jnp.uint32) + 0x8000) >> 16
        nearest = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
        nearest = jnp.where(jnp.isnan(x), jnp.bfloat16(jnp.nan), nearest)  # whose carry may be a zero
        return Encoded(steps_between(nearest, x).astype(self.code_dtype), nearest)
