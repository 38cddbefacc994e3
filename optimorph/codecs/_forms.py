"""How a row falls into blocks: with an axis for the blocks, or, on TPUs, without.

TPUs keep a row in registers of 128 numbers: another axis inside a row is a copy of the whole array. There a
maximum over blocks is a window that moves by its own width, and a number for each block is spread over the
row by a product with the indicators of the blocks, which is exact: a float32 is three numbers of bfloat16.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from optimorph._core.numbers import with_type_of

TINY = 4.7019774e-38
"""Blocks with a smaller maximum become zeros: four times the smallest normal number; 4 / s is finite."""

Bits = Callable[[jax.Array], jax.Array]
"""Numbers → integers in the order that counts, which are those numbers' bits, or those of NaN."""

Scale = Callable[[jax.Array], jax.Array]
"""The largest integer of a block → the bits of its scale, which never fall while that integer grows."""

INFINITY, NAN = np.int32(0x7F800000), np.int32(0x7FC00000)
"""The bits of float32. They are chosen as integers: `jax_debug_nans` and `_infs` refuse such constants."""


class Blocks(NamedTuple):
    """`(*batch, blocks, width)`, padded with zeros.

    Args:
      width: the numbers of a block.
      halves: whether maxima are those of halves of blocks first, which vectorizes on CPUs, and what a block
        has one of is computed once. Without, what is computed of every number is in the same kernel of a GPU
        as the number itself or its code, and a kernel of its own would cost more.
    """

    width: int
    halves: bool

    def split(self, x: jax.Array) -> jax.Array:
        """An array in this form."""
        *batch, last = x.shape or (1,)
        count = -(-last // self.width)
        x = _whole(x, self.width)
        if count * self.width != last:
            x = jnp.pad(x, (*[(0, 0)] * len(batch), (0, count * self.width - last)))
        sharding = jax.typeof(x).sharding
        by_blocks = sharding.update(spec=(*sharding.spec, None)) if any(sharding.spec) else None
        return jnp.reshape(x, (*batch, count, self.width), out_sharding=by_blocks)

    def scales(self, x: jax.Array, bits: Bits, scale: Scale) -> jax.Array:
        """`(*batch, blocks)`, the scale of every block: that of its number of the largest integer."""
        x = bits(x)
        if not self.halves:
            return _as_float(jnp.max(scale(x), axis=-1))
        while (width := x.shape[-1]) > 16:
            half = (width + 1) // 2
            x = jnp.maximum(x[..., :half], x[..., width - half :])
        return _as_float(scale(jnp.max(x, axis=-1)))

    def spread(self, s: jax.Array) -> jax.Array:
        """Numbers `(*batch, blocks)`, at least 0 or NaN, to be multiplied with an array in this form."""
        return s[..., None]

    def quarters(self, x: jax.Array, s: jax.Array) -> jax.Array:
        """4 x / s, and 0 where s is 0, for x in this form. 1 / s may be subnormal."""
        if self.halves:
            return x * self.spread(_four_over(s))
        s = self.spread(s)
        return jnp.where(s >= TINY, x / jnp.where(s >= TINY, s / 4, 1), 0)

    def joined(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """The array of which `x` is the form, with the shape and the sharding of another one."""
        *batch, count, width = x.shape
        x = x.reshape(*batch, count * width)[..., : like.shape[-1] if like.ndim else 1].reshape(like.shape)
        return with_type_of(x, like)


class Rows(NamedTuple):
    """`(*batch, last)`."""

    width: int
    last: int

    def split(self, x: jax.Array) -> jax.Array:
        return x

    def scales(self, x: jax.Array, bits: Bits, scale: Scale) -> jax.Array:
        """As of `Blocks`."""
        window = (*[1] * (x.ndim - 1), self.width)
        padding = (*[(0, 0)] * (x.ndim - 1), (0, -self.last % self.width))

        largest = jax.lax.reduce_window(bits(x), np.int32(0), jax.lax.max, window, window, padding)
        return _as_float(scale(largest))

    def spread(self, s: jax.Array) -> jax.Array:
        """As of `Blocks`. NaN is -1 in the product, where it would reach the whole row."""
        place = jnp.arange(self.last)[None] - self.width * jnp.arange(s.shape[-1])[:, None]
        inside = ((place >= 0) & (place < self.width)).astype(jnp.bfloat16)
        s = jnp.where(s >= 0, s, -1)
        axes = ((s.ndim - 1,), (0,)), ((), ())
        spread = jax.lax.dot_general(s, inside, axes, "highest", s.dtype)
        return _as_float(jnp.where(spread < 0, NAN, _as_int(spread)))

    def quarters(self, x: jax.Array, s: jax.Array) -> jax.Array:
        return x * self.spread(_four_over(s))

    def joined(self, x: jax.Array, like: jax.Array) -> jax.Array:
        return x


Form = Blocks | Rows
"""Arrays in a form in which blocks can be reduced."""


def in_form(f: Callable[..., Any], width: int, x: jax.Array, *arrays: Any) -> Any:
    """`f(form, x, *arrays)`, with the form that suits the platform, for blocks of `width` numbers."""

    def of(form: Form) -> Callable[..., Any]:
        return lambda *arrays: f(form, *arrays)

    halves, blocks = of(Blocks(width, True)), of(Blocks(width, False))
    if not x.ndim or not x.shape[-1]:
        return blocks(x, *arrays)
    if any(jax.typeof(x).sharding.spec):
        return jax.lax.platform_dependent(x, *arrays, cpu=halves, default=blocks)
    rows = of(Rows(width, x.shape[-1]))
    return jax.lax.platform_dependent(x, *arrays, cpu=halves, tpu=rows, default=blocks)


def _four_over(s: jax.Array) -> jax.Array:
    """4 / s, and 0 where s is 0, without a division by 0, which debug flags find outside of programs."""
    return jnp.where(s >= TINY, 4 / jnp.where(s >= TINY, s, 1), 0)


def _as_float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _as_int(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


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
