"""A placement carried out on one device of a mesh: pieces out, whole matrices in, and back."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from optimorph.linalg.axes import Shape, inverse
from optimorph.linalg.buckets import of_matrices, parts
from optimorph.linalg.placement import Cut, Exchange, Group, Names, Placement, devices

Sizes = Mapping[str, int]

AHEAD = 2
"""Buckets under way at a time: one is computed while the next is sent, and memory is bounded by both."""


@dataclasses.dataclass(frozen=True)
class Executor:
    """Carries out plans on the devices they were made for, where the mesh's axes are manual.

    Computed is in the leaf's dtype; what is sent may be narrower. With bfloat16 every number sent is rounded
    to 8 bits, once in and once out: directions of singular values below 2⁻⁹ of the norm are lost, and the
    result is known to 2⁻⁹ of itself.

    Args:
      f: a function of stacks `(batch, n, m)` that treats each matrix by itself.
      free: whether f allows what a plan made with `free` does.
      to: "invarying" where types track what differs between devices, as in `jax.shard_map(check_vma=True)`.
    """

    f: Callable[[jax.Array], jax.Array]
    free: bool = True
    to: str = "varying"

    def __call__(self, plan: Placement, shards: Sequence[jax.Array]) -> list[jax.Array]:
        """This device's shards of f of every matrix, from its shards of every leaf."""
        found, sizes = list(shards), dict(plan.mesh)
        for exchange in plan.exchanges:
            for cut, units in self._exchanged(sizes, exchange, shards):
                x = units[0] if len(units) == 1 else jnp.concatenate(units)
                found[cut.leaf] = _shard(x, cut).reshape(shards[cut.leaf].shape)
        return found

    def _exchanged(
        self, sizes: Sizes, exchange: Exchange, shards: Sequence[jax.Array]
    ) -> Iterable[tuple[Cut, list[jax.Array]]]:
        """For each leaf f of its units, in one piece or, from several buckets, more."""
        sharers = devices(sizes, exchange.shared)
        owners = devices(sizes, exchange.moved)
        packed = [_packed(group, sharers * owners * group.slots, shards) for group in exchange.groups]
        done: dict[Cut, list[jax.Array]] = {cut: [] for group in exchange.groups for cut in group.cuts}
        under_way: list[list[jax.Array]] = []
        for bucket in exchange.buckets:
            spans = [(sharers * owners * first, sharers * owners * last) for _, first, last in bucket.parts]
            groups = [exchange.groups[g] for g, _, _ in bucket.parts]
            pieces = [
                _own(packed[g][i:j].reshape(sharers, owners, last - first, *group.piece), exchange.shared)
                for (g, first, last), (i, j), group in zip(bucket.parts, spans, groups, strict=True)
            ]
            if len(under_way) == AHEAD:
                pieces, _ = jax.lax.optimization_barrier((pieces, under_way.pop(0)))
            under_way.append(self._computed(sizes, exchange, groups, pieces))
            for group, span, result in zip(groups, spans, under_way[-1], strict=True):
                for cut, units in _unpacked(group, span, result):
                    done[cut].append(units)
        return done.items()

    def _computed(
        self, sizes: Sizes, exchange: Exchange, groups: Sequence[Group], pieces: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """f of units: this device's pieces `(owners, slots, *piece)` in, those of all sharers out."""
        arrived = _gathered(exchange, exchange.gathered, _moved(exchange, pieces), "varying")
        wholes = [_whole(sizes, exchange, group, x) for group, x in zip(groups, arrived, strict=True)]
        results = of_matrices(self.f, [group.form for group in groups], wholes, turn=self.free)
        back = [_pieces(sizes, exchange, group, y) for group, y in zip(groups, results, strict=True)]
        return _gathered(exchange, exchange.shared, _moved(exchange, back), self.to)


def _moved(exchange: Exchange, packets: Sequence[jax.Array]) -> list[jax.Array]:
    """Packets `(owners, ...)` to the owners, from whom as many come; all in one go."""
    if not exchange.moved:
        return [*packets]
    flat = _joined([x.reshape(len(x), -1) for x in packets])
    flat = _wired(exchange, lambda x: jax.lax.all_to_all(x, exchange.moved, 0, 0, tiled=True), flat)
    return _apart(flat, [x.shape[1:] for x in packets])


def _gathered(exchange: Exchange, names: Names, packets: Sequence[jax.Array], to: str) -> list[jax.Array]:
    """Packets of all devices along some axes, `(devices, ...)`; all in one go."""
    if not names:
        return [x[None] for x in packets]
    flat = _joined([x.reshape(1, -1) for x in packets])
    flat = _wired(exchange, lambda x: jax.lax.all_gather(x[0], names, to=to), flat)
    return _apart(flat, [x.shape for x in packets])


def _wired(exchange: Exchange, send: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """What is sent, in its dtype; of two bytes as whole numbers, as some compilers widen the others."""
    kind, short = exchange.sent, exchange.sent.itemsize == 2
    y = x.astype(kind)
    y = send(jax.lax.bitcast_convert_type(y, jnp.uint16) if short else y)
    return (jax.lax.bitcast_convert_type(y, kind) if short else y).astype(x.dtype)


def _packed(group: Group, count: int, shards: Sequence[jax.Array]) -> jax.Array:
    """All units of a group, `(count, *piece)`, the last ones zero."""
    units = [_cut(shards[cut.leaf], cut, group.piece) for cut in group.cuts]
    if empty := count - group.units:
        units.append(jnp.zeros((empty, *group.piece), units[0].dtype))
    return units[0] if len(units) == 1 else jnp.concatenate(units)


def _own(x: jax.Array, names: Names) -> jax.Array:
    """Of what there is for each device along some axes, this one's."""
    return jax.lax.dynamic_index_in_dim(x, jax.lax.axis_index(names), keepdims=False) if names else x[0]


def _joined(rows: list[jax.Array]) -> jax.Array:
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=1)


def _apart(flat: jax.Array, shapes: Sequence[Shape]) -> list[jax.Array]:
    ends = np.cumsum([0, *(np.prod(shape, dtype=int) for shape in shapes)])
    columns = [jax.lax.slice_in_dim(flat, int(i), int(j), axis=1) for i, j in itertools.pairwise(ends)]
    return [x.reshape(len(flat), *shape) for x, shape in zip(columns, shapes, strict=True)]


def _whole(sizes: Sizes, exchange: Exchange, group: Group, x: jax.Array) -> jax.Array:
    """Pieces of all who hold some, `(gathered, owners, slots, *piece)`, as whole units `(slots, *axes)`."""
    names = (*exchange.gathered, *exchange.moved)
    x = x.reshape(*(sizes[name] for name in names), *x.shape[2:]).transpose(_order(names, group))
    return x.reshape(x.shape[0], *group.whole(sizes))


def _pieces(sizes: Sizes, exchange: Exchange, group: Group, y: jax.Array) -> jax.Array:
    """Of whole units what goes back to each owner, `(owners, slots, *piece)`."""
    names = (*exchange.gathered, *exchange.moved)
    order = _order(names, group)
    split = [len(y)]
    for over, size in zip(group.spread, group.piece, strict=True):
        split += [*(sizes[name] for name in over), size]
    y = y.reshape(split).transpose(inverse(order))
    y = y.reshape(-1, devices(sizes, exchange.moved), *y.shape[len(names) :])
    return _own(y, exchange.gathered)


def _order(names: Names, group: Group) -> list[int]:
    """Of `(*names, slots, *piece)`: the slots, and every axis behind the mesh axes that divide it."""
    order = [len(names)]
    for k, over in enumerate(group.spread):
        order += [*map(names.index, over), len(names) + 1 + k]
    return order


def _cut(shard: jax.Array, cut: Cut, piece: Shape) -> jax.Array:
    """A shard as units `(units, *piece)`."""
    x = shard.reshape(cut.view).transpose(cut.order).reshape(cut.units, *_upright(cut))
    x = x.mT.conj() if cut.turned else x
    missing = [(0, 0), *((0, full - own) for full, own in zip(piece, cut.piece, strict=True))]
    return x if piece == cut.piece else jnp.pad(x, missing)


def _unpacked(group: Group, span: tuple[int, int], x: jax.Array) -> Iterable[tuple[Cut, jax.Array]]:
    """Of `(sharers, owners, slots, *piece)`, which are the units of a span, those of each leaf."""
    first, last = span
    ends = itertools.accumulate(cut.units for cut in group.cuts)
    inside = [
        (cut, min(end, last) - max(end - cut.units, first)) for cut, end in zip(group.cuts, ends, strict=True)
    ]
    inside = [(cut, count) for cut, count in inside if count > 0]
    units = parts(x.reshape(-1, *group.piece), [count for _, count in inside])
    return [(cut, each) for (cut, _), each in zip(inside, units, strict=True)]


def _shard(x: jax.Array, cut: Cut) -> jax.Array:
    """The inverse of `_cut`."""
    x = x[(slice(None), *map(slice, cut.piece))]
    x = x.mT.conj() if cut.turned else x
    return x.reshape([cut.view[k] for k in cut.order]).transpose(inverse(cut.order))


def _upright(cut: Cut) -> Shape:
    return cut.piece[::-1] if cut.turned else cut.piece
