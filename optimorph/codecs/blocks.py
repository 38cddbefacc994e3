"""Codecs of one byte: codes within blocks of the last axis, each with a scale of its own."""

import abc
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optimorph.codecs.codec import Codec, Encoded
from optimorph.core.checks import dtype_name, is_integer
from optimorph.core.rounding import outer_bfloat16
from optimorph.core.types import DTypeLike, Shape

TINY = 4.7019774e-38
"""Blocks of what is below it are zeros: four times the smallest normal number, of which 4 / s is finite."""

WHOLE = 1.5 * 2**23
"""What is added to it has its nearest whole number, ties to even, in the last bits of the sum."""


@dataclasses.dataclass(frozen=True)
class BlockCodec(Codec):
    """What the codecs of one byte share.

        s = max |x| over the block, in bfloat16 the next number above it        (1)
        x = s value(code)                                                       (2)

    The last block of an axis may be shorter, and is the only one of an axis shorter than a block. A scalar
    is a block.
    """

    block: int = 128
    _: dataclasses.KW_ONLY
    scale_dtype: DTypeLike = "float32"

    code_dtype: ClassVar[DTypeLike]

    def __post_init__(self):
        """Refuse what is no block or no scale, and keep the description hashable."""
        who = type(self).__name__
        if not is_integer(self.block, 1):
            raise ValueError(
                f"{who}: block must be a whole number of at least 1, but is {self.block!r}. Type block=128."
            )
        if dtype_name(self.scale_dtype) not in ("float32", "bfloat16"):
            raise ValueError(
                f"{who}: scale_dtype must be float32 or bfloat16, which have the range of gradients, but is "
                f"{self.scale_dtype!r}. Type scale_dtype='bfloat16'."
            )
        object.__setattr__(self, "scale_dtype", jnp.dtype(self.scale_dtype))

    def zeros(self, shape: Shape) -> Encoded:
        """What decodes to zeros."""
        return Encoded(
            jnp.zeros(shape, self.code_dtype), jnp.zeros(self._scales_shape(shape), self.scale_dtype)
        )

    def _encode(self, x: jax.Array, key: jax.Array | None, place: jax.Array) -> Encoded:
        blocks = self._blocks(x)
        scales = self._scales(blocks)
        s = scales.astype(jnp.float32)[..., None]
        quarters = blocks * jnp.where(s >= TINY, 4 / s, 0)  # as 1 / s may be no normal number
        codes = self._codes(quarters, key, self._blocks(place))
        return Encoded(_joined(codes.astype(self.code_dtype), x), scales.reshape(self._scales_shape(x.shape)))

    def _decode(self, encoded: Encoded) -> jax.Array:
        assert encoded.scales is not None
        codes, scales = self._blocks(encoded.codes), encoded.scales.astype(jnp.float32)
        x = self._values(codes) * scales.reshape(*codes.shape[:-1], 1)  # (2)
        return _joined(x, encoded.codes)

    def _scales(self, blocks: jax.Array) -> jax.Array:
        """(1); 0 where all is below `TINY`, NaN where anything is not finite."""
        s = jax.lax.bitcast_convert_type(_largest(self._bits(blocks)), jnp.float32)
        s = jnp.where(s < jnp.inf, s, jnp.nan)
        s = jnp.where(s < TINY, 0, s)
        return outer_bfloat16(s) if self.scale_dtype == jnp.bfloat16 else s

    def _bits(self, blocks: jax.Array) -> jax.Array:
        """|x| as int32 in the same order, NaN above all, which compilers lose in a maximum of floats."""
        return jax.lax.bitcast_convert_type(jnp.abs(blocks), jnp.int32)

    @abc.abstractmethod
    def _codes(self, quarters: jax.Array, key: jax.Array | None, place: jax.Array) -> jax.Array:
        """Of 4 x / s, which is in [-4, 4] but for rounding, and 0 where s is 0; of NaN any."""

    @abc.abstractmethod
    def _values(self, codes: jax.Array) -> jax.Array:
        """What codes stand for, in [-1, 1]."""

    def _scales_shape(self, shape: Shape) -> Shape:
        return (*shape[:-1], -(-shape[-1] // self.block)) if shape else ()

    def _blocks(self, x: jax.Array) -> jax.Array:
        """`(*batch, last)` → `(*batch, blocks, width)`, the tail filled with zeros."""
        *batch, last = x.shape or (1,)
        width = max(1, min(self.block, last))
        count = -(-last // width)
        x = _whole(x, width)
        if count * width != last:
            x = jnp.pad(x, (*[(0, 0)] * len(batch), (0, count * width - last)))
        return x.reshape(*batch, count, width)


def nearest(x: jax.Array) -> jax.Array:
    """Whole numbers, ties to even, for codes: right in the last byte for |x| < 2²², and for NaN any."""
    return jax.lax.bitcast_convert_type(x + WHOLE, jnp.int32)


def _largest(x: jax.Array) -> jax.Array:
    """max over the last axis: first of its halves, which compilers turn into vectors."""
    while (width := x.shape[-1]) > 16:
        half = (width + 1) // 2
        x = jnp.maximum(x[..., :half], x[..., width - half :])
    return jnp.max(x, axis=-1)


def _whole(x: jax.Array, width: int) -> jax.Array:
    """`x`, its last axis on every device if its type says that blocks lie across devices."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[-1] if x.ndim and len(sharding.spec) == x.ndim else None
    if names is None:
        return x
    parts = math.prod(sharding.mesh.shape[n] for n in ((names,) if isinstance(names, str) else names))
    if x.shape[-1] % (parts * width) == 0:
        return x
    return jax.sharding.reshard(x, sharding.update(spec=PartitionSpec(*sharding.spec[:-1], None)))


def _joined(blocks: jax.Array, like: jax.Array) -> jax.Array:
    """`(*batch, blocks, width)` in the shape of another array, and where its type says that it is."""
    *batch, count, width = blocks.shape
    x = blocks.reshape(*batch, count * width)[..., : like.shape[-1] if like.ndim else 1].reshape(like.shape)
    sharding = jax.typeof(like).sharding
    return x if jax.typeof(x).sharding.spec == sharding.spec else jax.sharding.reshard(x, sharding)
