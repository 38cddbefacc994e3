"""Leaves over a mesh as groups of matrices: those of one shape that are sharded in the same way."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optimorph._core.types import Shape
from optimorph._distributed.shardings import Names, Spec, devices, whole_shape
from optimorph.linalg import Axes

Cost = Callable[[int, int], float]
"""The cost of a matrix n x m."""


class Span(NamedTuple):
    """The slots [first, last) of a group; of whole matrices, or of parts."""

    group: int
    first: int
    last: int
    parts: int = 1


class Leaf(NamedTuple):
    """An array over a mesh: its global shape, how it reads as matrices, its sharding and its dtype."""

    shape: Shape
    form: Axes
    spec: Spec
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class LeafShard:
    """A leaf's local shard as local shards of matrices, `(matrices, *local_shape)`.

    Args:
      view: the local shard's shape with blocks as axes of their own.
      order: the permutation of the view's axes that puts those that count matrices first.
      matrices: their number; blocks that a shard boundary cuts count as one matrix.
      local_shape: the shape of the local shard of a matrix.
      transposed: whether matrices are transposed, so that none is taller than wide.
    """

    leaf: int
    view: Shape
    order: tuple[int, ...]
    matrices: int
    local_shape: Shape
    transposed: bool


class Group(NamedTuple):
    """Matrices of one shape, sharded in the same way.

    Args:
      local_shape: the shape of the local shard of a matrix.
      mesh_axes: the mesh axes that shard each axis of a matrix.
      form: how whole matrices `(matrices, *axes)` read as such.
      slots: the number of matrices that each owner computes whole.
      parts: the number of owners among which each further matrix is divided.
      part_slots: the number of matrices of which each owner computes a part.
      repeat: whether these owners repeat the polynomial, as `Neighbours` says.
    """

    local_shape: Shape
    mesh_axes: Spec
    form: Axes
    shards: tuple[LeafShard, ...]
    slots: int = 0
    parts: int = 1
    part_slots: int = 0
    repeat: bool = False

    @property
    def matrices(self) -> int:
        return sum(shard.matrices for shard in self.shards)

    def whole(self, mesh: Mapping[str, int]) -> Shape:
        return whole_shape(mesh, self.mesh_axes, self.local_shape)

    def part(self, parts: int) -> "Group":
        *rows, columns = self.local_shape
        return self if parts == 1 else self._replace(local_shape=(*rows, columns // parts))

    def matrices_of(self, span: Span, owners: int) -> tuple[int, int]:
        """The first and the last of the matrices in the slots of a span."""
        start, each = (0, owners) if span.parts == 1 else (owners * self.slots, owners // span.parts)
        return start + each * span.first, start + each * span.last

    def room(self, owners: int) -> int:
        return owners * self.slots + owners // self.parts * self.part_slots

    def cost(self, mesh: Mapping[str, int], cost: Cost) -> float:
        stacks = self.form.stacks((1, *self.whole(mesh)))
        return float(sum(math.prod(batch) * cost(min(n, m), max(n, m)) for *batch, n, m in stacks))


def groups_of(
    mesh: Mapping[str, int], leaves: Sequence[Leaf], equivariant: bool
) -> Iterable[tuple[Group, Names, np.dtype]]:
    groups: dict[Any, list[LeafShard]] = {}
    for index, leaf in enumerate(leaves):
        if 0 in leaf.shape:
            continue
        shard, mesh_axes, form, batch_axes = _leaf_shard(mesh, leaf, index, equivariant)
        groups.setdefault((shard.local_shape, mesh_axes, form, batch_axes, leaf.dtype), []).append(shard)
    for (local_shape, mesh_axes, form, batch_axes, dtype), shards in groups.items():
        yield Group(local_shape, mesh_axes, form, tuple(shards)), in_order(mesh, [batch_axes]), dtype


def _leaf_shard(
    mesh: Mapping[str, int], leaf: Leaf, index: int, equivariant: bool
) -> tuple[LeafShard, Spec, Axes, Names]:
    """A leaf's shard, the mesh axes and form of its matrices, and its batch axes."""
    sides = [*_sides(mesh, leaf)]
    letters, sizes, over = ([side[k] for side in sides] for k in range(3))
    view = tuple(size // devices(mesh, names) for size, names in zip(sizes, over, strict=True))
    batch, rest, rows, columns = (
        [k for k, letter in enumerate(letters) if chosen(letter)]
        for chosen in (lambda x: x == "b", lambda x: x != "b", lambda x: x == "i", lambda x: x == "o")
    )
    matrices, batch_axes = math.prod(view[k] for k in batch), _joined(over, batch)
    if not equivariant or len(rows) + len(columns) < len(rest):
        form = Axes("b" + "".join(letters[k] for k in rest))
        shard = LeafShard(index, view, (*batch, *rest), matrices, tuple(view[k] for k in rest), False)
        return shard, tuple(over[k] for k in rest), form, batch_axes
    n, m = (math.prod(sizes[k] for k in side) for side in (rows, columns))
    local_shape = tuple(math.prod(view[k] for k in side) for side in (rows, columns))
    mesh_axes = _joined(over, rows), _joined(over, columns)
    transposed = n > m or (n == m and mesh_axes > mesh_axes[::-1])  # so that more squares are sharded alike
    if transposed:
        local_shape, mesh_axes = local_shape[::-1], mesh_axes[::-1]
    shard = LeafShard(index, view, (*batch, *rows, *columns), matrices, local_shape, transposed)
    return shard, mesh_axes, Axes("bio"), batch_axes


def _sides(mesh: Mapping[str, int], leaf: Leaf) -> Iterable[tuple[Any, ...]]:
    """Every axis as (letter, size, mesh axes); equal blocks that no shard boundary cuts are a batch axis."""
    for size, axis, names in zip(leaf.shape, leaf.form.parts, leaf.spec, strict=True):
        blocks = len(axis.blocks)
        divided = _block_axes(mesh, blocks, names) if axis.equal and blocks > 1 else None
        if divided is None:
            yield str(axis), size, names
        else:
            yield "b", blocks, divided[0]
            yield axis.letter, size // blocks, divided[1]


def _block_axes(mesh: Mapping[str, int], blocks: int, names: Names) -> tuple[Names, Names] | None:
    """The mesh axes over blocks, and those within each block; None if one mesh axis is both."""
    for k, name in enumerate(names):
        if blocks == 1:
            return names[:k], names[k:]
        if blocks % mesh[name]:
            return None
        blocks //= mesh[name]
    return names, ()


def in_order(mesh: Mapping[str, int], spec: Iterable[Names]) -> Names:
    """All mesh axes of a spec, in the mesh's order."""
    used = {*itertools.chain.from_iterable(spec)}
    return tuple(name for name in mesh if name in used)


def _joined(spec: Sequence[Names], axes: Iterable[int]) -> Names:
    return tuple(itertools.chain.from_iterable(spec[k] for k in axes))
