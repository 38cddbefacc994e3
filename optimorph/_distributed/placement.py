"""The plan of an exchange: which device computes which matrices whole, from shapes alone.

Every matrix is computed whole by one owner. The mesh axes of a leaf have four roles. Batch axes shard the
leaf's batch: its matrices are local already. The other axes that shard the leaf divide the matrices. Over
all_to_all axes owners receive their local shards and send the results back; over all_gather axes every device
receives all of them. Over replica axes the leaf is replicated: replicas split the matrices and all_gather the
results. Where splitting saves nothing, replicas repeat the work. Roles are chosen for the fewest slots (1),
then for the fewest bytes (2).

    matrices  M = those of one shape on a device's share of the batch axes
    slots     k = ⌈M / (|all_to_all| |replica|)⌉ for each owner; the last ones may stay empty            (1)
    sent      k (|all_to_all| |all_gather| - 1) local shards in, k (|all_to_all| - 1) back,
              k |all_to_all| (|replica| - 1) to the replicas                                           (2)

Planning needs no device, and the names of mesh axes have no meaning.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optimorph._core.types import Shape
from optimorph._distributed.shardings import Names, Spec, devices, whole_shape
from optimorph.linalg import Axes

Cost = Callable[[int, int], float]
"""The cost of a matrix n x m."""

Round = tuple[tuple[int, int, int], ...]
"""What is exchanged and computed together: (group, first, last) for the slots [first, last) of a group."""


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
      leaf: the leaf's index.
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


@dataclasses.dataclass(frozen=True)
class Group:
    """Matrices of one shape, sharded in the same way.

    Args:
      local_shape: the shape of the local shard of a matrix.
      mesh_axes: the mesh axes that shard each axis of a matrix.
      form: how whole matrices `(matrices, *axes)` read as such.
      shards: the leaves that they come from.
      slots: the number of matrices that each owner computes.
    """

    local_shape: Shape
    mesh_axes: Spec
    form: Axes
    shards: tuple[LeafShard, ...]
    slots: int = 0

    @property
    def matrices(self) -> int:
        """Their number."""
        return sum(shard.matrices for shard in self.shards)

    def whole(self, mesh: Mapping[str, int]) -> Shape:
        """The shape of a whole matrix."""
        return whole_shape(mesh, self.mesh_axes, self.local_shape)

    def cost(self, mesh: Mapping[str, int], cost: Cost) -> float:
        """The cost of one matrix."""
        stacks = self.form.stacks((1, *self.whole(mesh)))
        return float(sum(math.prod(batch) * cost(min(n, m), max(n, m)) for *batch, n, m in stacks))


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Leaves of one dtype for which the mesh axes have the same roles.

    Args:
      batch_axes, all_to_all_axes, all_gather_axes, replica_axes: mesh axes, in the mesh's order.
      dtype: that of the leaves.
      comm_dtype: that of the data in collectives.
      groups: the matrices.
      rounds: their slots, in the order in which they are exchanged.
    """

    batch_axes: Names
    all_to_all_axes: Names
    all_gather_axes: Names
    replica_axes: Names
    dtype: np.dtype
    comm_dtype: np.dtype
    groups: tuple[Group, ...] = ()
    rounds: tuple[Round, ...] = ()


@dataclasses.dataclass(frozen=True)
class Placement:
    """A plan.

    Args:
      mesh: the names and sizes of the mesh axes.
      exchanges: those of all leaves, each leaf in one.
      flops: multiplications and additions of the busiest device.
      least_flops: those of a device if the work were divided evenly.
      sent: bytes that a device sends.
      least_sent: bytes that a device would send if no slot were empty.
    """

    mesh: tuple[tuple[str, int], ...]
    exchanges: tuple[Exchange, ...]
    flops: float
    least_flops: float
    sent: float
    least_sent: float


def place(
    mesh: Mapping[str, int],
    leaves: Sequence[Leaf],
    *,
    cost: Cost = lambda n, m: 2.0 * n * n * m,
    equivariant: bool = True,
    comm_dtype: np.dtype | None = None,
    bytes_at_once: int = 2**28,
) -> Placement:
    """The plan for leaves over a mesh.

    Args:
      mesh: the names and sizes of the mesh axes, in order.
      leaves: arrays whose axes are divisible by the mesh axes that shard them.
      cost: flops of one matrix.
      equivariant: whether rows and columns may be permuted, and matrices transposed and padded with zeros, as
        for polar factors; else owners receive the matrices unchanged.
      comm_dtype: the dtype of the data in collectives, if narrower than the leaf's.
      bytes_at_once: the most bytes of whole matrices that a device holds in one round; one may exceed it.
    """
    alike: dict[Any, list[Group]] = {}
    for group, batch_axes, dtype in _groups(mesh, leaves, equivariant):
        alike.setdefault((batch_axes, _in_order(mesh, group.mesh_axes), dtype), []).append(group)
    placed: dict[Exchange, list[Group]] = {}
    least_flops = least_sent = 0.0
    for (batch_axes, axes, dtype), groups in alike.items():
        owners = [name for name in mesh if name not in batch_axes]
        sent_dtype = _sent_dtype(dtype, comm_dtype)
        for group in groups:
            least_flops += group.matrices * group.cost(mesh, cost) / devices(mesh, owners)
            least_sent += sent_dtype.itemsize * _least_sent(mesh, axes, owners, group)
        for group in _merged(mesh, owners, groups, cost) if equivariant else groups:
            all_to_all, all_gather, replica, slots = _roles(mesh, axes, owners, group)
            exchange = Exchange(batch_axes, all_to_all, all_gather, replica, dtype, sent_dtype)
            placed.setdefault(exchange, []).append(dataclasses.replace(group, slots=slots))
    flops = sent = 0.0
    for exchange, groups in placed.items():
        for group in groups:
            flops += group.slots * group.cost(mesh, cost)
            axes = exchange.all_to_all_axes, exchange.all_gather_axes, exchange.replica_axes
            numbers = group.slots * math.prod(group.local_shape) * _shards_sent(mesh, *axes)
            sent += exchange.comm_dtype.itemsize * numbers
    exchanges = (_in_rounds(mesh, exchange, groups, bytes_at_once) for exchange, groups in placed.items())
    return Placement(tuple(mesh.items()), tuple(exchanges), flops, least_flops, sent, least_sent)


def _groups(
    mesh: Mapping[str, int], leaves: Sequence[Leaf], equivariant: bool
) -> Iterable[tuple[Group, Names, np.dtype]]:
    groups: dict[Any, list[LeafShard]] = {}
    for index, leaf in enumerate(leaves):
        if 0 in leaf.shape:
            continue
        shard, mesh_axes, form, batch_axes = _leaf_shard(mesh, leaf, index, equivariant)
        groups.setdefault((shard.local_shape, mesh_axes, form, batch_axes, leaf.dtype), []).append(shard)
    for (local_shape, mesh_axes, form, batch_axes, dtype), shards in groups.items():
        yield Group(local_shape, mesh_axes, form, tuple(shards)), _in_order(mesh, [batch_axes]), dtype


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


def _roles(
    mesh: Mapping[str, int], axes: Names, owners: Sequence[str], group: Group
) -> tuple[Names, Names, Names, int]:
    """The all_to_all, all_gather and replica axes, and the slots: fewest slots (1), then fewest bytes (2)."""

    def weight(all_to_all: Names, replica: Names) -> tuple[int, int]:
        slots = _slots(mesh, (*all_to_all, *replica), group.matrices)
        all_gather = tuple(name for name in axes if name not in all_to_all)
        return slots, slots * _shards_sent(mesh, all_to_all, all_gather, replica)

    idle = [name for name in owners if name not in axes]
    pairs = itertools.product(_subsets(axes), _subsets(idle))
    all_to_all, replica = min(pairs, key=lambda pair: weight(*pair))
    all_gather = tuple(name for name in axes if name not in all_to_all)
    return all_to_all, all_gather, replica, weight(all_to_all, replica)[0]


def _merged(mesh: Mapping[str, int], owners: Sequence[str], groups: list[Group], cost: Cost) -> list[Group]:
    """Groups of nearly equal shapes merged by padding, where that fills empty slots."""

    def total(group: Group) -> float:
        return _slots(mesh, owners, group.matrices) * group.cost(mesh, cost)

    merged: list[Group] = []
    for group in sorted(groups, key=lambda group: group.cost(mesh, cost), reverse=True):
        for k, large in enumerate(merged):
            both = _padded(large, group)
            if both is not None and total(both) < total(large) + total(group):
                merged[k] = both
                break
        else:
            merged.append(group)
    return merged


def _padded(a: Group, b: Group) -> Group | None:
    """Both groups in one, padded to the larger sizes; None if their sharding or form differs."""
    if a.mesh_axes != b.mesh_axes or a.form != b.form or a.form.spec != "bio":
        return None
    local_shape = tuple(map(max, a.local_shape, b.local_shape))
    return dataclasses.replace(a, local_shape=local_shape, shards=a.shards + b.shards)


def _in_rounds(
    mesh: Mapping[str, int], exchange: Exchange, groups: Sequence[Group], bytes_at_once: int
) -> Exchange:
    rounds: list[list[tuple[int, int, int]]] = [[]]
    room = bytes_at_once
    for index, group in enumerate(groups):
        size, first = math.prod(group.whole(mesh)) * max(4, exchange.dtype.itemsize), 0
        while first < group.slots:
            if room < size and rounds[-1]:
                rounds.append([])
                room = bytes_at_once
            count = min(group.slots - first, max(1, room // size))
            rounds[-1].append((index, first, first + count))
            room -= count * size
            first += count
    return dataclasses.replace(exchange, groups=tuple(groups), rounds=tuple(map(tuple, rounds)))


def _slots(mesh: Mapping[str, int], owners: Iterable[str], matrices: int) -> int:
    return -(-matrices // devices(mesh, owners))  # (1)


def _shards_sent(mesh: Mapping[str, int], all_to_all: Names, all_gather: Names, replica: Names) -> int:
    """The local shards that a device sends for each slot (2)."""
    a, g, r = (devices(mesh, names) for names in (all_to_all, all_gather, replica))
    return (a * g - 1) + (a - 1) + a * (r - 1)


def _least_sent(mesh: Mapping[str, int], axes: Names, owners: Sequence[str], group: Group) -> float:
    """The numbers that a device would send if the matrices were divided evenly."""
    replica = tuple(name for name in owners if name not in axes)
    shards = _shards_sent(mesh, axes, (), replica)
    return group.matrices / devices(mesh, owners) * math.prod(group.local_shape) * shards


def _in_order(mesh: Mapping[str, int], spec: Iterable[Names]) -> Names:
    """All mesh axes of a spec, in the mesh's order."""
    used = {*itertools.chain.from_iterable(spec)}
    return tuple(name for name in mesh if name in used)


def _subsets(names: Sequence[str]) -> list[Names]:
    return [subset for n in range(len(names) + 1) for subset in itertools.combinations(names, n)]


def _sent_dtype(dtype: np.dtype, comm_dtype: np.dtype | None) -> np.dtype:
    """`comm_dtype` for real leaves of a wider dtype, else the leaf's own."""
    if comm_dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return dtype
    return min(dtype, np.dtype(comm_dtype), key=lambda x: x.itemsize)


def _joined(spec: Sequence[Names], axes: Iterable[int]) -> Names:
    return tuple(itertools.chain.from_iterable(spec[k] for k in axes))
