"""An element-wise function of large arrays, slab by slab and in place: nothing large is made on the way."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optimorph._core.numbers import types_of, varying, with_type_of
from optimorph._core.rounding import places
from optimorph._core.target import Target
from optimorph._core.types import PyTree, Shape
from optimorph._distributed.shardings import in_mesh

SIZES = {"cpu": (1 << 12, 1 << 14)}
OTHER_SIZES = (1 << 26, 1 << 26)
"""The fewest and the most numbers of a slab: of a core's cache, or so many that launches do not matter."""

ON_TPU = 1 << 22
"""The numbers of a slab on each device of a TPU, where a turn of a loop costs little."""

PARTS = 96
"""How many slabs an array has, if they are neither too small nor too large."""


def slab_shape(shape: Shape, target: Target) -> Shape | None:
    """That of the slabs of an array, the last of which may be shorter; None for an array that is one slab."""
    if len(shape) < 2 or 0 in shape:
        return None
    fewest, most = SIZES.get(target.platform, OTHER_SIZES)
    if target.platform == "tpu":
        fewest = most = ON_TPU * target.devices
    pieces = _pieces(shape, target)
    rows, size = shape[-2] // pieces, math.prod(shape)
    wanted = max(1, min(max(size // PARTS, fewest), most) * rows // size)
    even = max(k for k in range(1, wanted + 1) if rows % k == 0)
    chosen = even if 2 * even >= wanted else wanted
    return (*shape[:-2], pieces * chosen, shape[-1]) if 2 * chosen <= rows else None


def in_slabs(
    make: Callable[[PyTree, PyTree], PyTree],
    store: Callable[[jax.Array, PyTree, PyTree], PyTree],
    shape: Shape,
    target: Target,
    written: PyTree,
    read: PyTree,
) -> PyTree:
    """`written` after `store(place, make(slab of written, slab of read))` of one slab after the other.

    All arrays are of `shape` but for their last axes. A slab is as many rows of the last axis but one from
    each of as many pieces as there are devices, so that it lies over a mesh as the array does, however that
    is. All that is made of a slab is there before any of it is stored: so compilers need no copy of the
    arrays, and do not make it again for each of the results that are stored. TPUs and GPUs keep this order by
    a barrier. CPUs do not: there what a turn makes is stored by the next, before that reads the array.

    Args:
      make: of a slab of what is written, as it was, and of what is read.
      store: of a place, the number of every element in the whole, uint32, what was made, and a slab as it
        was, for what is the same in all of them; returns what the slab becomes.
      written: arrays, updated in place if they are donated.
    """
    slab = slab_shape(shape, target)
    assert slab is not None
    pieces = _pieces(shape, target)
    rows = slab[-2] // pieces
    count, rest = divmod(shape[-2] // pieces, rows)
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    steps.insert(-2, math.prod(shape[-2:]) // pieces)

    in_use = not jax.sharding.get_abstract_mesh().empty
    at_once = target.platform in ("gpu", "tpu")

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-2], pieces, x.shape[-2] // pieces, x.shape[-1])

    def joined(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-3], pieces * x.shape[-2], x.shape[-1])

    def take(arrays: PyTree, start: Any, size: int) -> PyTree:
        def one(x):
            return joined(jax.lax.dynamic_slice_in_dim(x, start, size, -2, allow_negative_indices=False))

        return jax.tree.map(one, arrays)

    def put(arrays: PyTree, slab: PyTree, start: Any) -> PyTree:
        def one(x, new):
            new = with_type_of(cut(new), x) if in_use else cut(new)
            return jax.lax.dynamic_update_slice_in_dim(x, new, start, -2, allow_negative_indices=False)

        return jax.tree.map(one, arrays, slab)

    def place(start: Any, size: int) -> jax.Array:
        first = jnp.asarray(start).astype(jnp.uint32) * jnp.uint32(shape[-1] % 2**32)
        return joined(places((*shape[:-2], pieces, size, shape[-1]), steps) + first)

    def updated(written, start, size):
        slab = take(written, start, size)
        made = make(slab, take(read, start, size))
        if at_once:
            made = jax.lax.optimization_barrier(made)
        return put(written, store(place(start, size), made, slab), start)

    def turn(k, carry):
        written, made = carry
        start = jnp.maximum(k - 1, 0) * rows
        stored = store(place(start, rows), made, first)
        begun = jax.tree.map(lambda new, old: jnp.where(k > 0, with_type_of(new, old), old), stored, first)
        written = put(written, begun, start)
        return written, make(take(written, k * rows, rows), take(read, k * rows, rows))

    written, read = jax.tree.map(lambda x: cut(in_mesh(x) if in_use else x), (written, read))
    if at_once:
        written = jax.lax.fori_loop(0, count, lambda k, x: updated(x, k * rows, rows), written)
    else:
        first = take(written, 0, rows)
        made = types_of(make, first, take(read, 0, rows))
        nothing = jax.tree.map(lambda x: varying(with_type_of(jnp.zeros(x.shape, x.dtype), x), x), made)
        # the last turn stores what the one before has made; what it makes itself is of no use
        written, _ = jax.lax.fori_loop(0, count + 1, turn, (written, nothing))
    if rest:
        written = updated(written, count * rows, rest)
    return jax.tree.map(joined, written)


def _pieces(shape: Shape, target: Target) -> int:
    return math.gcd(shape[-2], target.devices)
