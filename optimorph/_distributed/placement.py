"""The plan of an exchange: which device computes which matrices, from shapes alone.

Every matrix is computed whole by one owner, or divided over some owners where others would be idle. The mesh
axes of a leaf have four roles. Batch axes shard the leaf's batch: its matrices are local already. The other
axes that shard the leaf divide the matrices. Over all_to_all axes owners receive their local shards and send
the results back; over all_gather axes every device receives all of them. Over replica axes the leaf is
replicated: replicas split the matrices and all_gather the results. Where splitting saves nothing, replicas
repeat the work. `roles` chooses.

A matrix that is divided is cut into parts of its columns, which are sent as if each were a matrix: every
local shard is cut into so many, and the parts of a matrix belong to owners that follow each other.

Planning needs no device, and the names of mesh axes have no meaning.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from optimorph._distributed.groups import Cost, Group, Leaf, Span, groups_of, in_order
from optimorph._distributed.roles import Chooser, Division, Placed, Roles
from optimorph._distributed.shardings import Names, devices

Round = tuple[Span, ...]
"""What is exchanged and computed together."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Leaves of one dtype for which the mesh axes have the same roles.

    Args:
      batch_axes: mesh axes, in the mesh's order.
      roles: the other mesh axes by role.
      rounds: their slots, in the order in which they are exchanged.
    """

    batch_axes: Names
    roles: Roles
    dtype: np.dtype
    comm_dtype: np.dtype
    groups: tuple[Group, ...] = ()
    rounds: tuple[Round, ...] = ()


@dataclasses.dataclass(frozen=True)
class Placement:
    """A plan.

    Args:
      mesh: the names and sizes of the mesh axes.
      flops: multiplications and additions of the busiest device.
      least_flops: those of a device if the work were divided evenly.
      sent: bytes that a device sends.
      divided: the number of matrices that are divided over several devices.
      inside: bytes that a device sends within iterations, of matrices that are divided.
      collectives: the number of collectives within iterations.
      seconds: the expected seconds of computing and of sending; 0 if the speed of the devices is not known.
    """

    mesh: tuple[tuple[str, int], ...]
    exchanges: tuple[Exchange, ...] = dataclasses.field(repr=False)
    flops: float
    least_flops: float
    sent: float
    divided: int
    inside: float
    collectives: int
    seconds: tuple[float, float]


def place(
    mesh: Mapping[str, int],
    leaves: Sequence[Leaf],
    *,
    cost: Cost = lambda n, m: 2.0 * n * n * m,
    equivariant: bool = True,
    comm_dtype: np.dtype | None = None,
    bytes_at_once: int = 2**28,
    division: Division | None = None,
) -> Placement:
    """The plan for leaves over a mesh.

    Args:
      leaves: arrays whose axes are divisible by the mesh axes that shard them.
      equivariant: whether rows and columns may be permuted, and matrices transposed and padded with zeros, as
        for polar factors; else owners receive the matrices unchanged.
      bytes_at_once: the most bytes of whole matrices that a device holds in one round; one may exceed it.
      division: what decides whether matrices are divided; without it, and if not equivariant, none is.
    """
    if division is not None and not equivariant:
        division = dataclasses.replace(division, work=None)
    alike: dict[Any, list[Group]] = {}
    for group, batch_axes, dtype in groups_of(mesh, leaves, equivariant):
        alike.setdefault((batch_axes, in_order(mesh, group.mesh_axes), dtype), []).append(group)
    placed: dict[Exchange, list[Placed]] = {}
    least_flops = 0.0
    for (batch_axes, axes, dtype), groups in alike.items():
        owners = tuple(name for name in mesh if name not in batch_axes)
        sent_dtype = _sent_dtype(dtype, comm_dtype)
        for group in groups:
            least_flops += group.matrices * group.cost(mesh, cost) / devices(mesh, owners)
        chooser = Chooser(mesh, axes, owners, sent_dtype.itemsize, cost, division)
        for found in map(chooser.placed, _merged(mesh, groups, chooser) if equivariant else groups):
            exchange = Exchange(batch_axes, found.roles, dtype, sent_dtype)
            placed.setdefault(exchange, []).append(found)
    exchanges = tuple(
        _in_rounds(mesh, exchange, [found.group for found in members], bytes_at_once)
        for exchange, members in placed.items()
    )
    loads = [found.load for members in placed.values() for found in members]
    return Placement(
        tuple(mesh.items()),
        exchanges,
        flops=sum(load.flops for load in loads),
        least_flops=least_flops,
        sent=sum(load.sent for load in loads),
        divided=sum(_divided(mesh, exchange) for exchange in exchanges),
        inside=sum(load.inside for load in loads),
        collectives=sum(
            members[span.group].load.collectives
            for exchange, members in zip(exchanges, placed.values(), strict=True)
            for span in itertools.chain.from_iterable(exchange.rounds)
            if span.parts > 1
        ),
        seconds=(sum(load.computing for load in loads), sum(load.sending + load.sharing for load in loads)),
    )


def _divided(mesh: Mapping[str, int], exchange: Exchange) -> int:
    owners = devices(mesh, exchange.roles.owners)
    shared = [group for group in exchange.groups if group.part_slots]
    local = sum(group.matrices - group.slots * owners for group in shared)
    return local * devices(mesh, exchange.batch_axes)


def _merged(mesh: Mapping[str, int], groups: list[Group], chooser: Chooser) -> list[Group]:
    """Groups of nearly equal shapes merged by padding, where that takes less: it fills empty slots."""
    merged: list[tuple[Group, float]] = []
    for group in sorted(groups, key=lambda group: group.cost(mesh, chooser.cost), reverse=True):
        alone = chooser.effort(group)
        for k, (large, effort) in enumerate(merged):
            both = _padded(large, group)
            if both is None or chooser.least_effort(both) >= effort + alone:
                continue
            together = chooser.effort(both)
            if together < effort + alone:
                merged[k] = both, together
                break
        else:
            merged.append((group, alone))
    return [group for group, _ in merged]


def _padded(a: Group, b: Group) -> Group | None:
    """Both groups in one, padded to the larger sizes; None if their sharding or form differs."""
    if a.mesh_axes != b.mesh_axes or a.form != b.form or a.form.spec != "bio":
        return None
    local_shape = tuple(map(max, a.local_shape, b.local_shape))
    return a._replace(local_shape=local_shape, shards=a.shards + b.shards)


def _in_rounds(
    mesh: Mapping[str, int], exchange: Exchange, groups: Sequence[Group], bytes_at_once: int
) -> Exchange:
    rounds: list[list[Span]] = [[]]
    room = bytes_at_once
    for index, group in enumerate(groups):
        for parts, end in ((1, group.slots), (group.parts, group.part_slots)):
            shape, first = group.part(parts).whole(mesh), 0
            numbers = math.prod(shape) + (2 * shape[0] ** 2 if parts > 1 else 0)  # X; R and Z of all rows
            size = numbers * max(4, exchange.dtype.itemsize)
            while first < end:
                if room < size and rounds[-1]:
                    rounds.append([])
                    room = bytes_at_once
                count = min(end - first, max(1, room // size))
                rounds[-1].append(Span(index, first, first + count, parts))
                room -= count * size
                first += count
    return dataclasses.replace(exchange, groups=tuple(groups), rounds=tuple(map(tuple, rounds)))


def _sent_dtype(dtype: np.dtype, comm_dtype: np.dtype | None) -> np.dtype:
    """`comm_dtype` for real leaves of a wider dtype, else the leaf's own."""
    if comm_dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return dtype
    return min(dtype, np.dtype(comm_dtype), key=lambda x: x.itemsize)
