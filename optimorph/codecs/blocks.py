"""Codecs of one byte: codes within blocks of the last axis, each with a scale of its own."""

import abc
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optimorph.codecs.codec import Codec, Encoded
from optimorph.core.rounding import outer_bfloat16
from optimorph.core.types import DTypeLike, Shape

TINY = 1.1754944e-38
"""The smallest normal number of float32: many machines take those below it for zeros, and so do blocks."""


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
        if isinstance(self.block, bool) or self.block < 1:
            raise ValueError(
                f"{who}: block must be a whole number of at least 1, but is {self.block}. Type block=128."
            )
        object.__setattr__(self, "scale_dtype", jnp.dtype(self.scale_dtype))
        if self.scale_dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(
                f"{who}: scale_dtype must be float32 or bfloat16, but is {self.scale_dtype}, whose range is "
                "not that of gradients. Type scale_dtype='bfloat16'."
            )

    def zeros(self, shape: Shape) -> Encoded:
        """What decodes to zeros."""
        return Encoded(
            jnp.zeros(shape, self.code_dtype), jnp.zeros(self._scales_shape(shape), self.scale_dtype)
        )

    def _encode(self, x: jax.Array, key: jax.Array | None, place: jax.Array) -> Encoded:
        blocks = self._blocks(x)
        scales = self._scales(blocks)
        units = _over(blocks, scales.astype(jnp.float32)[..., None])
        codes = self._codes(units, key, self._blocks(place))
        return Encoded(_joined(codes.astype(self.code_dtype), x), scales.reshape(self._scales_shape(x.shape)))

    def _decode(self, encoded: Encoded) -> jax.Array:
        assert encoded.scales is not None
        codes, scales = self._blocks(encoded.codes), encoded.scales.astype(jnp.float32)
        x = self._values(codes) * scales.reshape(*codes.shape[:-1], 1)  # (2)
        return _joined(x, encoded.codes)

    def _scales(self, blocks: jax.Array) -> jax.Array:
        """(1); 0 where all is below `TINY`, NaN where anything is not finite."""
        bits = jax.lax.bitcast_convert_type(jnp.abs(blocks), jnp.int32)
        s = jax.lax.bitcast_convert_type(jnp.max(bits, axis=-1), jnp.float32)  # NaN too, which max may lose
        s = jnp.where(s < jnp.inf, s, jnp.nan)
        s = jnp.where(s < TINY, 0, s)
        return outer_bfloat16(s) if self.scale_dtype == jnp.bfloat16 else s

    @abc.abstractmethod
    def _codes(self, units: jax.Array, key: jax.Array | None, place: jax.Array) -> jax.Array:
        """Of x / s, which is in [-1, 1] but for rounding, and 0 where s is 0 or NaN."""

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


def _over(blocks: jax.Array, scales: jax.Array) -> jax.Array:
    """x / s, as x times 1 / s, also where that is no normal number; 0 where s is 0 or NaN."""
    middle = jnp.where(scales > 1, 2.0**-64, 2.0**64)
    inverse = jnp.where(scales > 0, 1 / jnp.where(scales > 0, scales * middle, 1), 0)
    return jnp.where(inverse > 0, blocks * middle * inverse, 0)


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
