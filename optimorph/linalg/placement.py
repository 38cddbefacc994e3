"""Which device makes which matrices whole, and what it is sent for that: a plan, from shapes alone.

A matrix that is spread over a mesh is computed whole by one owner. Of every leaf some mesh axes divide its
batch: its matrices are there already (kept). Others divide the matrices themselves. Over as many of these as
give every owner its share pieces are sent to the owners, and results back (moved); over the rest of them
every device gets all pieces (gathered). The other axes replicate the leaf: they share the work (shared), or,
where that would save nothing, repeat it.

    units   U = matrices of one kind on a device's share of the kept axes
    slots   k = ⌈U / (|moved| |shared|)⌉ for every owner, the last ones empty              (1)
    sent    k (|moved| |gathered| - 1) pieces in, k (|moved| - 1) back,
            k |moved| (|shared| - 1) shared out                                            (2)

No device is needed to plan, and no name of a mesh axis means anything.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optimorph.linalg.axes import Axes, Shape

Names = tuple[str, ...]
Spec = tuple[Names, ...]
"""For each axis of an array the mesh axes that divide it, the outermost first."""

Cost = Callable[[int, int], float]
"""What a matrix n x m costs."""


class Leaf(NamedTuple):
    """An array over a mesh: its whole shape, how it reads as matrices, how it is spread, and its numbers."""

    shape: Shape
    form: Axes
    spec: Spec
    dtype: np.dtype


def devices(mesh: Mapping[str, int], names: Iterable[str]) -> int:
    """How many there are along some axes of a mesh."""
    return math.prod(mesh[name] for name in names)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a device's shard of one leaf becomes units, `(units, *piece)`, and back.

    Args:
      leaf: its number.
      view: the shard's shape with blocks as axes of their own.
      order: of the view's axes: those that count units first.
      units: how many there are.
      piece: what the device holds of each.
      turned: whether a piece is transposed, so that no matrix is higher than wide.
    """

    leaf: int
    view: Shape
    order: tuple[int, ...]
    units: int
    piece: Shape
    turned: bool


@dataclasses.dataclass(frozen=True)
class Group:
    """Units of one kind: the same pieces, spread in the same way.

    Args:
      piece: what a device holds of a unit.
      spread: the mesh axes that divide each axis of a unit.
      form: how whole units `(unit, *axes)` read as matrices.
      cuts: where they come from.
      slots: how many units each owner takes.
    """

    piece: Shape
    spread: Spec
    form: Axes
    cuts: tuple[Cut, ...]
    slots: int = 0

    @property
    def units(self) -> int:
        """How many there are."""
        return sum(cut.units for cut in self.cuts)

    def whole(self, mesh: Mapping[str, int]) -> Shape:
        """The shape of a unit put together."""
        return tuple(size * devices(mesh, names) for size, names in zip(self.piece, self.spread, strict=True))

    def cost(self, mesh: Mapping[str, int], cost: Cost) -> float:
        """Of one unit."""
        stacks = self.form.stacks((1, *self.whole(mesh)))
        return float(sum(math.prod(batch) * cost(min(n, m), max(n, m)) for *batch, n, m in stacks))


@dataclasses.dataclass(frozen=True)
class Bucket:
    """What is exchanged, and computed, in one go: of each group the slots [first, last)."""

    parts: tuple[tuple[int, int, int], ...]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Leaves of one dtype that the same mesh axes keep, move and share.

    Args:
      kept, moved, gathered, shared: mesh axes, in the mesh's order.
      groups: the units.
      buckets: what goes together.
      dtype, sent: of the leaves, and of the numbers as they are sent.
    """

    kept: Names
    moved: Names
    gathered: Names
    shared: Names
    dtype: np.dtype
    sent: np.dtype
    groups: tuple[Group, ...] = ()
    buckets: tuple[Bucket, ...] = ()


@dataclasses.dataclass(frozen=True)
class Placement:
    """A plan: `print` shows it.

    Args:
      mesh: the names and sizes of its axes.
      exchanges: of all leaves, each leaf in one.
      flops: multiplications and additions of the busiest device.
      least_flops: of a device, if they could be divided evenly.
      sent: bytes that a device sends.
      least_sent: bytes that it would send if no slot were empty.
    """

    mesh: tuple[tuple[str, int], ...]
    exchanges: tuple[Exchange, ...]
    flops: float
    least_flops: float
    sent: float
    least_sent: float

    def __str__(self) -> str:
        """A line for every kind of units, and the totals."""
        mesh = dict(self.mesh)
        lines = ["mesh " + (" x ".join(f"{name} {size}" for name, size in self.mesh) or "of one device")]
        for exchange in self.exchanges:
            roles = ("kept", "moved", "gathered", "shared")
            said = [f"{role} {', '.join(names)}" for role in roles if (names := getattr(exchange, role))]
            lines.append(f"{'; '.join(said) or 'all on each device'}; in {len(exchange.buckets)} go(es)")
            for group in exchange.groups:
                owners = devices(mesh, exchange.shared) * devices(mesh, exchange.moved)
                whole = " x ".join(map(str, group.whole(mesh)))
                lines.append(f"  {group.units} units of {whole} over {owners} owners, {group.slots} each")
        lines.append(f"flops of a device {self.flops:.4g}, at least {self.least_flops:.4g}")
        lines.append(f"bytes that a device sends {self.sent:.4g}, at least {self.least_sent:.4g}")
        return "\n".join(lines)


def place(
    mesh: Mapping[str, int],
    leaves: Sequence[Leaf],
    *,
    cost: Cost = lambda n, m: 2.0 * n * n * m,
    free: bool = True,
    wire: np.dtype | None = None,
    bytes_at_once: int = 2**28,
) -> Placement:
    """The plan for leaves over a mesh.

    Args:
      mesh: the names of its axes and their sizes, in order.
      leaves: every axis of a leaf must divide by the mesh axes that divide it.
      cost: flops of one matrix.
      free: whether rows and columns may be permuted, and matrices transposed and padded with zeros, as polar
        factors allow; else matrices come together as they are.
      wire: the dtype of what is sent, if narrower than the leaf's.
      bytes_at_once: of whole units that a device holds in one go, unless one alone is larger.
    """
    alike: dict[Any, list[Group]] = {}
    for group, kept, dtype in _groups(mesh, leaves, free):
        alike.setdefault((kept, _over(mesh, group.spread), dtype), []).append(group)
    found: dict[Exchange, list[Group]] = {}
    least_flops = least_sent = 0.0
    for (kept, over, dtype), groups in alike.items():
        owners, sent = [name for name in mesh if name not in kept], _as_sent(dtype, wire)
        least_flops += sum(group.units * group.cost(mesh, cost) for group in groups) / devices(mesh, owners)
        least_sent += sent.itemsize * sum(_least_sent(mesh, over, owners, group) for group in groups)
        for group in _merged(mesh, owners, groups, cost) if free else groups:
            moved, gathered, shared, slots = _divided(mesh, over, owners, group)
            exchange = Exchange(kept, moved, gathered, shared, dtype, sent)
            found.setdefault(exchange, []).append(dataclasses.replace(group, slots=slots))
    exchanges = tuple(_bucketed(mesh, exchange, groups, bytes_at_once) for exchange, groups in found.items())
    pairs = [(exchange, group) for exchange in exchanges for group in exchange.groups]
    return Placement(
        tuple(mesh.items()),
        exchanges,
        flops=float(sum(group.slots * group.cost(mesh, cost) for _, group in pairs)),
        least_flops=float(least_flops),
        sent=float(sum(exchange.sent.itemsize * _sent(mesh, exchange, group) for exchange, group in pairs)),
        least_sent=float(least_sent),
    )


def _groups(
    mesh: Mapping[str, int], leaves: Sequence[Leaf], free: bool
) -> Iterable[tuple[Group, Names, np.dtype]]:
    found: dict[Any, list[Cut]] = {}
    for number, leaf in enumerate(leaves):
        if 0 in leaf.shape:
            continue
        cut, spread, form, kept = _cut(mesh, leaf, number, free)
        found.setdefault((cut.piece, spread, form, kept, leaf.dtype), []).append(cut)
    for (piece, spread, form, kept, dtype), cuts in found.items():
        yield Group(piece, spread, form, tuple(cuts)), _over(mesh, [kept]), dtype


def _cut(mesh: Mapping[str, int], leaf: Leaf, number: int, free: bool) -> tuple[Cut, Spec, Axes, Names]:
    sides = [*_sides(mesh, leaf)]
    letters, sizes, spread = ([side[k] for side in sides] for k in range(3))
    view = tuple(size // devices(mesh, names) for size, names in zip(sizes, spread, strict=True))
    batch, rest, rows, columns = (
        [k for k, letter in enumerate(letters) if chosen(letter)]
        for chosen in (lambda x: x == "b", lambda x: x != "b", lambda x: x == "i", lambda x: x == "o")
    )
    units, kept = math.prod(view[k] for k in batch), _joined(spread, batch)
    if not free or len(rows) + len(columns) < len(rest):
        form = Axes("b" + "".join(letters[k] for k in rest))
        cut = Cut(number, view, (*batch, *rest), units, tuple(view[k] for k in rest), False)
        return cut, tuple(spread[k] for k in rest), form, kept
    n, m = (math.prod(sizes[k] for k in side) for side in (rows, columns))
    high, wide = (math.prod(view[k] for k in side) for side in (rows, columns))
    by_row, by_column = _joined(spread, rows), _joined(spread, columns)
    turned = n > m or (n == m and by_row > by_column)  # squares that lie alike go together
    piece, spread = ((wide, high), (by_column, by_row)) if turned else ((high, wide), (by_row, by_column))
    cut = Cut(number, view, (*batch, *rows, *columns), units, piece, turned)
    return cut, spread, Axes("bio"), kept


def _sides(mesh: Mapping[str, int], leaf: Leaf) -> Iterable[tuple[Any, ...]]:
    """Every axis as (letter, size, mesh axes); equal blocks that no shard cuts through are a batch axis."""
    for size, axis, names in zip(leaf.shape, leaf.form.parts, leaf.spec, strict=True):
        blocks = len(axis.blocks)
        between = _between(mesh, blocks, names) if axis.equal and blocks > 1 else None
        if between is None:
            yield str(axis), size, names
        else:
            yield "b", blocks, between[0]
            yield axis.letter, size // blocks, between[1]


def _between(mesh: Mapping[str, int], blocks: int, names: Names) -> tuple[Names, Names] | None:
    """The mesh axes that count blocks, and those that divide each; None if one does both."""
    for k, name in enumerate(names):
        if blocks == 1:
            return names[:k], names[k:]
        if blocks % mesh[name]:
            return None
        blocks //= mesh[name]
    return names, ()


def _divided(
    mesh: Mapping[str, int], over: Names, owners: Sequence[str], group: Group
) -> tuple[Names, Names, Names, int]:
    """What to move, gather and share over, and the slots: as few as can be (1), then as few bytes (2)."""

    def weighed(moved: Names, shared: Names) -> tuple[int, int]:
        slots = _slots(mesh, (*moved, *shared), group.units)
        return slots, slots * _pieces(mesh, moved, tuple(n for n in over if n not in moved), shared)

    idle = [name for name in owners if name not in over]
    moved, shared = min(itertools.product(_subsets(over), _subsets(idle)), key=lambda pair: weighed(*pair))
    gathered = tuple(name for name in over if name not in moved)
    return moved, gathered, shared, weighed(moved, shared)[0]


def _merged(mesh: Mapping[str, int], owners: Sequence[str], groups: list[Group], cost: Cost) -> list[Group]:
    """Kinds of nearly the same shape as one, padded, where that makes empty slots of use."""

    def spent(group: Group) -> float:
        return _slots(mesh, owners, group.units) * group.cost(mesh, cost)

    done: list[Group] = []
    for group in sorted(groups, key=lambda group: group.cost(mesh, cost), reverse=True):
        for k, large in enumerate(done):
            both = _together(large, group)
            if both is not None and spent(both) < spent(large) + spent(group):
                done[k] = both
                break
        else:
            done.append(group)
    return done


def _together(a: Group, b: Group) -> Group | None:
    if a.spread != b.spread or a.form != b.form or a.form.spec != "bio":
        return None
    return dataclasses.replace(a, piece=tuple(map(max, a.piece, b.piece)), cuts=a.cuts + b.cuts)


def _bucketed(
    mesh: Mapping[str, int], exchange: Exchange, groups: Sequence[Group], bytes_at_once: int
) -> Exchange:
    buckets: list[list[tuple[int, int, int]]] = [[]]
    room = bytes_at_once
    for number, group in enumerate(groups):
        size, first = math.prod(group.whole(mesh)) * max(4, exchange.dtype.itemsize), 0
        while first < group.slots:
            if room < size and buckets[-1]:
                buckets.append([])
                room = bytes_at_once
            count = min(group.slots - first, max(1, room // size))
            buckets[-1].append((number, first, first + count))
            room -= count * size
            first += count
    found = tuple(Bucket(tuple(parts)) for parts in buckets)
    return dataclasses.replace(exchange, groups=tuple(groups), buckets=found)


def _slots(mesh: Mapping[str, int], owners: Iterable[str], units: int) -> int:
    return -(-units // devices(mesh, owners))  # (1)


def _pieces(mesh: Mapping[str, int], moved: Names, gathered: Names, shared: Names) -> int:
    """How many a device sends for each slot (2)."""
    m, g, s = (devices(mesh, names) for names in (moved, gathered, shared))
    return (m * g - 1) + (m - 1) + m * (s - 1)


def _sent(mesh: Mapping[str, int], exchange: Exchange, group: Group) -> int:
    """How many numbers a device sends for a group."""
    pieces = _pieces(mesh, exchange.moved, exchange.gathered, exchange.shared)
    return group.slots * math.prod(group.piece) * pieces


def _least_sent(mesh: Mapping[str, int], over: Names, owners: Sequence[str], group: Group) -> float:
    """How many if its units could be divided evenly."""
    shared = tuple(name for name in owners if name not in over)
    return group.units / devices(mesh, owners) * math.prod(group.piece) * _pieces(mesh, over, (), shared)


def _over(mesh: Mapping[str, int], spread: Iterable[Names]) -> Names:
    """All mesh axes of a spec, in the mesh's order."""
    found = {*itertools.chain.from_iterable(spread)}
    return tuple(name for name in mesh if name in found)


def _subsets(names: Sequence[str]) -> list[Names]:
    return [each for n in range(len(names) + 1) for each in itertools.combinations(names, n)]


def _as_sent(dtype: np.dtype, wire: np.dtype | None) -> np.dtype:
    """The wire's dtype, where it is the narrower one of real numbers."""
    real = wire is not None and jnp.issubdtype(dtype, jnp.floating)
    return np.dtype(wire) if real and np.dtype(wire).itemsize < dtype.itemsize else dtype


def _joined(spread: Sequence[Names], axes: Iterable[int]) -> Names:
    return tuple(itertools.chain.from_iterable(spread[k] for k in axes))
