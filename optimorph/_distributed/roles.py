"""The roles of mesh axes for the matrices of one shape, and whether some matrices are divided.

Roles are chosen for the fewest slots (1), then for the fewest bytes (2):

    matrices  M = those of one shape on a device's share of the batch axes
    owners    P = |all_to_all| |replica|
    slots     k = ⌈M / P⌉ for each owner; the last ones may stay empty                     (1)
    sent      k (|all_to_all| |all_gather| - 1) local shards in, k (|all_to_all| - 1) back,
              k |all_to_all| (|replica| - 1) to the replicas                             (2)

Where owners would stay idle, matrices may be divided: ⌊M / P⌋ rounds are of whole matrices, and each further
matrix is shared by g owners that follow each other, each of which has some of its columns. That is done where
it takes clearly less time by published numbers (`hardware`):

    part slots  ⌈(M mod P) g / P⌉                                                       (3)
    seconds     flops / flops a second + bytes / bytes a second + collectives           (4)
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from optimorph._distributed.groups import Cost, Group
from optimorph._distributed.hardware import Hardware
from optimorph._distributed.shardings import Names, devices
from optimorph.linalg import NewtonSchulz
from optimorph.linalg._shared_columns import Work

MOST_PARTS = 64
"""The most devices that share a matrix."""

WORTH = 0.9
"""The most time that dividing may take, as a share of that without: published numbers are rough."""


@dataclasses.dataclass(frozen=True)
class Division:
    """What decides whether matrices are divided.

    Args:
      work: (n, m, parts, repeat) → what a device does for one matrix that so many share; None if none is
        divided, and only the time is asked.
      hardware: what devices can do.
    """

    work: Callable[[int, int, int, bool], Work] | None
    hardware: Hardware


class Roles(NamedTuple):
    """The mesh axes of a group's leaves by role, in the mesh's order."""

    all_to_all: Names
    all_gather: Names
    replica: Names

    @property
    def owners(self) -> Names:
        """The axes along which owners follow each other."""
        return (*self.replica, *self.all_to_all)


class Load(NamedTuple):
    """What one device does for a group.

    Args:
      flops: multiplications and additions.
      sent: bytes of matrices, in and back.
      inside: bytes of partial products, within the iteration.
      collectives: within the iteration, for each round.
      computing, sending, sharing: seconds of the products, for `sent` and for what is within the iteration;
        0 where the hardware is not known.
    """

    flops: float
    sent: float
    inside: float = 0.0
    collectives: int = 0
    computing: float = 0.0
    sending: float = 0.0
    sharing: float = 0.0

    @property
    def seconds(self) -> float:
        """One after the other (4)."""
        return self.computing + self.sending + self.sharing


class Placed(NamedTuple):
    """A group with its slots, the roles of mesh axes for it, and what a device does."""

    group: Group
    roles: Roles
    load: Load


@dataclasses.dataclass(frozen=True)
class Chooser:
    """Chooses for groups whose leaves lie over the same mesh axes.

    Args:
      axes: those that divide the matrices.
      owners: those, and the ones over which the leaves are replicated.
      itemsize: that of numbers in collectives.
      division: what decides whether matrices are divided; None if nothing is known of the hardware.
    """

    mesh: Mapping[str, int]
    axes: Names
    owners: Names
    itemsize: int
    cost: Cost
    division: Division | None

    @functools.cached_property
    def _choices(self) -> dict[int, Roles]:
        """For every possible number of owners the roles for which these are the nearest.

        What is sent depends on the number of owners alone (2).
        """
        idle = [name for name in self.owners if name not in self.axes]
        pairs = itertools.product(_subsets(self.axes), _subsets(idle))
        choices = [Roles(a, tuple(name for name in self.axes if name not in a), r) for a, r in pairs]
        far_first = sorted(choices, key=lambda roles: _extent(self.mesh, roles.owners), reverse=True)
        return {devices(self.mesh, roles.owners): roles for roles in far_first}

    def placed(self, group: Group) -> Placed:
        """The group in whole matrices, or with those divided for which that takes less time."""

        def weight(owners: int) -> tuple[int, int]:
            k = -(-group.matrices // owners)  # (1)
            return k, k * shards_sent(self.mesh, self._choices[owners])

        owners = min(self._choices, key=weight)
        whole = self._loaded(group._replace(slots=weight(owners)[0]), self._choices[owners])
        if self.division is None or self.division.work is None or group.form.spec != "bio":
            return whole
        pairs = ((x, roles) for owners, roles in self._choices.items() for x in _divided(owners, group))
        divided = [self._loaded(x, roles) for x, roles in pairs]
        divided = [choice for choice in divided if choice.load.flops < whole.load.flops]
        best = min([whole, *divided], key=lambda choice: choice.load.seconds)
        return best if best.load.seconds < WORTH * whole.load.seconds else whole

    def effort(self, group: Group) -> float:
        """What merging groups should lessen: flops, or seconds with what is sent within iterations."""
        load = self.placed(group).load
        return load.flops if self.division is None else load.computing + load.sharing

    def least_effort(self, group: Group) -> float:
        flops = group.matrices * group.cost(self.mesh, self.cost) / devices(self.mesh, self.owners)
        return flops if self.division is None else flops / self.division.hardware.flops

    def _loaded(self, group: Group, roles: Roles) -> Placed:
        mesh, division = self.mesh, self.division
        numbers = math.prod(group.local_shape) * (group.slots + group.part_slots / group.parts)
        flops = group.slots * group.cost(mesh, self.cost)
        sent = self.itemsize * numbers * shards_sent(mesh, roles)
        if division is None:
            return Placed(group, roles, Load(flops, sent))
        hardware, inside, collectives, sharing = division.hardware, 0.0, 0, 0.0
        if group.part_slots and division.work is not None:
            n, m = group.whole(mesh)
            work = division.work(n, m, group.parts, group.repeat)
            flops += group.part_slots * work.flops
            inside, collectives = group.part_slots * work.bytes, work.collectives
            sharing = inside / hardware.bytes_over(_extent(mesh, roles.owners, group.parts))
            sharing += collectives * hardware.seconds
        sending = sent / hardware.bytes_over(_extent(mesh, (*roles.all_gather, *roles.owners)))
        load = Load(flops, sent, inside, collectives, flops / hardware.flops, sending, sharing)
        return Placed(group, roles, load)


def shards_sent(mesh: Mapping[str, int], roles: Roles) -> int:
    """The local shards that a device sends for each slot (2)."""
    a, g, r = (devices(mesh, names) for names in roles)
    return (a * g - 1) + (a - 1) + a * (r - 1)


def cost_of(f: Callable[..., Any], hardware: Hardware | None) -> Cost:
    if isinstance(f, NewtonSchulz):
        return functools.cache(
            functools.partial(f.flops, platform="" if hardware is None else hardware.platform)
        )
    return getattr(f, "flops", lambda n, m: 2.0 * n * n * m)


def division_of(f: Callable[..., Any], hardware: Hardware | None, divide: bool = True) -> Division | None:
    """What decides for a function of matrices, of which only `NewtonSchulz` can be divided."""
    if hardware is None:
        return None
    if not divide or not isinstance(f, NewtonSchulz):
        return Division(None, hardware)
    return Division(functools.cache(functools.partial(f.work, platform=hardware.platform)), hardware)


def _divided(owners: int, group: Group) -> Iterable[Group]:
    """The group with whole matrices in all rounds that are full, and the other ones divided (3)."""
    full, rest = divmod(group.matrices, owners)
    *rows, columns = group.local_shape
    for parts in range(2, min(owners, MOST_PARTS) + 1):
        if owners % parts == 0:
            cut = group._replace(
                local_shape=(*rows, columns + -columns % parts),
                slots=full,
                parts=parts,
                part_slots=-(-rest * parts // owners),
            )
            yield from (cut, cut._replace(repeat=True))


def _extent(mesh: Mapping[str, int], names: Sequence[str], count: int | None = None) -> int:
    """How far apart in the mesh the first and the last of so many devices are that follow each other."""
    extent, stride, strides = 1, 1, {}
    for name in reversed([*mesh]):
        strides[name], stride = stride, stride * mesh[name]
    count = devices(mesh, names) if count is None else count
    for name in reversed(names):
        extent += (min(mesh[name], count) - 1) * strides[name]
        count = -(-count // mesh[name])
    return extent


def _subsets(names: Sequence[str]) -> list[Names]:
    return [subset for n in range(len(names) + 1) for subset in itertools.combinations(names, n)]
