"""Codecs of one byte per number, with a scale for each block of the last axis."""

import abc
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optimorph.codecs._codec import Codec, Encoded
from optimorph.core.checks import dtype_name, is_integer
from optimorph.core.rounding import outer_bfloat16
from optimorph.core.types import DTypeLike, Shape

TINY = 4.7019774e-38
"""Blocks with a smaller maximum become zeros: four times the smallest normal number; 4 / s is finite."""

WHOLE = 1.5 * 2**23
"""The last bits of x + WHOLE are the integer nearest to x, ties to even."""


@dataclasses.dataclass(frozen=True)
class BlockCodec(Codec):
    """What the codecs of one byte share.

        s = max |x| over the block, rounded up for bfloat16 scales              (1)
        x = s value(code)                                                       (2)

    The last block of an axis may be shorter. A scalar is one block.
    """

    block: int = 128
    _: dataclasses.KW_ONLY
    scale_dtype: DTypeLike = "float32"

    code_dtype: ClassVar[DTypeLike]

    def __post_init__(self):
        """Refuse an invalid block or scale dtype, and keep the description hashable."""
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
        """The encoding of zeros."""
        return Encoded(
            jnp.zeros(shape, self.code_dtype), jnp.zeros(self._scales_shape(shape), self.scale_dtype)
        )

    def _encode(self, x: jax.Array, key: jax.Array | None, place: jax.Array) -> Encoded:
        blocks = self._blocks(x)
        scales = self._scales(blocks)
        s = scales.astype(jnp.float32)[..., None]
        quarters = blocks * jnp.where(s >= TINY, 4 / s, 0)  # 1 / s may be subnormal
        codes = self._codes(quarters, key, self._blocks(place))
        return Encoded(_joined(codes.astype(self.code_dtype), x), scales.reshape(self._scales_shape(x.shape)))

    def _decode(self, encoded: Encoded) -> jax.Array:
        assert encoded.scales is not None
        codes, scales = self._blocks(encoded.codes), encoded.scales.astype(jnp.float32)
        x = self._values(codes) * scales.reshape(*codes.shape[:-1], 1)  # (2)
        return _joined(x, encoded.codes)

    def _scales(self, blocks: jax.Array) -> jax.Array:
        """(1); 0 below `TINY`, NaN for blocks with a non-finite number."""
        s = jax.lax.bitcast_convert_type(_largest(self._bits(blocks)), jnp.float32)
        s = jnp.where(s < jnp.inf, s, jnp.nan)
        s = jnp.where(s < TINY, 0, s)
        return outer_bfloat16(s) if self.scale_dtype == jnp.bfloat16 else s

    def _bits(self, blocks: jax.Array) -> jax.Array:
        """|x| as int32 in the same order, NaN above all: compilers lose NaN in a maximum of floats."""
        return jax.lax.bitcast_convert_type(jnp.abs(blocks), jnp.int32)

    @abc.abstractmethod
    def _codes(self, quarters: jax.Array, key: jax.Array | None, place: jax.Array) -> jax.Array:
        """The codes of 4 x / s, which is in [-4, 4] up to rounding and 0 where s is 0; arbitrary for NaN."""

    @abc.abstractmethod
    def _values(self, codes: jax.Array) -> jax.Array:
        """The values of codes, in [-1, 1]."""

    def _scales_shape(self, shape: Shape) -> Shape:
        return (*shape[:-1], -(-shape[-1] // self.block)) if shape else ()

    def _blocks(self, x: jax.Array) -> jax.Array:
        """`(*batch, last)` → `(*batch, blocks, width)`, padded with zeros."""
        *batch, last = x.shape or (1,)
        width = max(1, min(self.block, last))
        count = -(-last // width)
        x = _whole(x, width)
        if count * width != last:
            x = jnp.pad(x, (*[(0, 0)] * len(batch), (0, count * width - last)))
        return x.reshape(*batch, count, width)


def nearest(x: jax.Array) -> jax.Array:
    """The nearest integer, ties to even: its last byte is right for |x| < 2²², arbitrary for NaN."""
    return jax.lax.bitcast_convert_type(x + WHOLE, jnp.int32)


def _largest(x: jax.Array) -> jax.Array:
    """max over the last axis, first elementwise between its halves, which compilers vectorize."""
    while (width := x.shape[-1]) > 16:
        half = (width + 1) // 2
        x = jnp.maximum(x[..., :half], x[..., width - half :])
    return jnp.max(x, axis=-1)


def _whole(x: jax.Array, width: int) -> jax.Array:
    """`x`, resharded to replicate its last axis if its type says that shard boundaries cut blocks."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[-1] if x.ndim and len(sharding.spec) == x.ndim else None
    if names is None:
        return x
    parts = math.prod(sharding.mesh.shape[n] for n in ((names,) if isinstance(names, str) else names))
    if x.shape[-1] % (parts * width) == 0:
        return x
    return jax.sharding.reshard(x, sharding.update(spec=PartitionSpec(*sharding.spec[:-1], None)))


def _joined(blocks: jax.Array, like: jax.Array) -> jax.Array:
    """`(*batch, blocks, width)` in the shape of another array, with the sharding of its type."""
    *batch, count, width = blocks.shape
    x = blocks.reshape(*batch, count * width)[..., : like.shape[-1] if like.ndim else 1].reshape(like.shape)
    sharding = jax.typeof(like).sharding
    return x if jax.typeof(x).sharding.spec == sharding.spec else jax.sharding.reshard(x, sharding)
