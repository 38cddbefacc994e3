"""The execution of a plan on one device of a mesh: local shards out, whole matrices in, and back.

A piece is the local shard of a matrix, or a part of it where several devices share the matrix.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from optimorph._core.types import Shape
from optimorph._distributed.groups import Group, LeafShard, Span
from optimorph._distributed.map_by_shape import map_matrices, split
from optimorph._distributed.placement import Exchange, Placement
from optimorph._distributed.shardings import Names, devices
from optimorph.linalg import NewtonSchulz
from optimorph.linalg._axes import inverse
from optimorph.linalg._shared_columns import Neighbours

Function = Callable[[jax.Array], jax.Array]

Sizes = Mapping[str, int]
"""The sizes of the mesh axes."""

PREFETCH = 2
"""Rounds in flight: one is computed while the next is sent, and memory is bounded by both."""


def execute(
    plan: Placement, f: Function, shards: Sequence[jax.Array], *, equivariant: bool, to: str = "varying"
) -> list[jax.Array]:
    """This device's local shards of f of every matrix, where the mesh's axes are manual.

    f computes in the leaf's dtype; collectives may use a narrower one. With bfloat16 every number is rounded
    to 8 bits once on the way in and once on the way out: directions with singular values below 2⁻⁹ of the
    norm are lost, and the result is accurate to 2⁻⁹ of itself. `to` is "invarying" where types track what
    varies over the mesh, as in `jax.shard_map(check_vma=True)`.
    """
    results, sizes = list(shards), dict(plan.mesh)
    for exchange in plan.exchanges:
        compute = functools.partial(_compute, sizes, exchange, f, equivariant, to)
        for shard, pieces in _in_rounds(sizes, exchange, shards, compute):
            x = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
            results[shard.leaf] = _to_shard(x, shard).reshape(shards[shard.leaf].shape)
    return results


def _compute(
    sizes: Sizes,
    exchange: Exchange,
    f: Function,
    equivariant: bool,
    to: str,
    spans: Sequence[Span],
    pieces: Sequence[jax.Array],
) -> list[jax.Array]:
    """f of matrices: this replica's pieces `(owners, slots, *local_shape)` in, all replicas' out."""
    groups = [exchange.groups[span.group].part(span.parts) for span in spans]
    received = _all_to_all(exchange, pieces)
    received = _all_gather(exchange, exchange.roles.all_gather, received, "varying")
    wholes = [_whole(sizes, exchange, group, x) for group, x in zip(groups, received, strict=True)]
    alone = [k for k, span in enumerate(spans) if span.parts == 1]
    forms = [groups[k].form for k in alone]
    mapped = map_matrices(f, forms, [wholes[k] for k in alone], transpose=equivariant)
    results = dict(zip(alone, mapped, strict=True))
    for k, span in enumerate(spans):
        if span.parts > 1:
            results[k] = _shared(sizes, exchange, f, groups[k], span.parts, wholes[k])
    back = [_pieces(sizes, exchange, group, results[k]) for k, group in enumerate(groups)]
    return _all_gather(exchange, exchange.roles.replica, _all_to_all(exchange, back), to)


def _shared(
    sizes: Sizes, exchange: Exchange, f: Function, group: Group, parts: int, x: jax.Array
) -> jax.Array:
    assert isinstance(f, NewtonSchulz)  # only then has the plan divided matrices
    names = exchange.roles.owners
    return f.of_columns(x, Neighbours(names, devices(sizes, names), parts, group.repeat))


def _in_rounds(
    sizes: Sizes, exchange: Exchange, shards: Sequence[jax.Array], compute: Callable[..., list[jax.Array]]
) -> Iterable[tuple[LeafShard, list[jax.Array]]]:
    """For each leaf the pieces of its results, from each round that computed some."""
    replicas, owners = devices(sizes, exchange.roles.replica), devices(sizes, exchange.roles.all_to_all)
    count = replicas * owners
    packed = [_packed(group, group.room(count), shards) for group in exchange.groups]
    results: dict[LeafShard, list[jax.Array]] = {s: [] for group in exchange.groups for s in group.shards}
    in_flight: list[list[jax.Array]] = []
    for spans in exchange.rounds:
        places = [exchange.groups[span.group].matrices_of(span, count) for span in spans]
        pieces = []
        for span, (i, j) in zip(spans, places, strict=True):
            x = _cut(packed[span.group][i:j], span.parts, count)
            pieces.append(_own(x.reshape(replicas, owners, *x.shape[1:]), exchange.roles.replica))
        if len(in_flight) == PREFETCH:
            pieces, _ = jax.lax.optimization_barrier((pieces, in_flight.pop(0)))
        in_flight.append(compute(spans, pieces))
        for span, place, result in zip(spans, places, in_flight[-1], strict=True):
            x = _joined_parts(result.reshape(count, *result.shape[2:]), span.parts)
            for shard, part in _unpacked(exchange.groups[span.group], place, x):
                results[shard].append(part)
    return results.items()


def _cut(x: jax.Array, parts: int, owners: int) -> jax.Array:
    """Pieces `(matrices, rows, columns)` as those of each owner, `(owners, slots, rows, columns / parts)`."""
    if parts == 1:
        return x.reshape(owners, -1, *x.shape[1:])
    x = x.reshape(owners // parts, -1, x.shape[1], parts, x.shape[2] // parts).transpose(0, 3, 1, 2, 4)
    return x.reshape(owners, *x.shape[2:])


def _joined_parts(x: jax.Array, parts: int) -> jax.Array:
    """The inverse of `_cut`."""
    if parts == 1:
        return x.reshape(-1, *x.shape[2:])
    owners, slots, rows, columns = x.shape
    x = x.reshape(owners // parts, parts, slots, rows, columns).transpose(0, 2, 3, 1, 4)
    return x.reshape(-1, rows, parts * columns)


def _all_to_all(exchange: Exchange, packets: Sequence[jax.Array]) -> list[jax.Array]:
    """An all_to_all of packets `(owners, ...)`."""
    if not exchange.roles.all_to_all:
        return [*packets]

    def send(x):
        return jax.lax.all_to_all(x, exchange.roles.all_to_all, 0, 0, tiled=True)

    return _sent(exchange, send, packets)


def _all_gather(exchange: Exchange, names: Names, packets: Sequence[jax.Array], to: str) -> list[jax.Array]:
    """An all_gather of packets over some mesh axes, to `(devices, ...)`."""
    if not names:
        return [x[None] for x in packets]

    def send(x):
        return jax.lax.all_gather(x[0], names, to=to)

    return _sent(exchange, send, [x[None] for x in packets])


def _sent(
    exchange: Exchange, send: Callable[[jax.Array], jax.Array], packets: Sequence[jax.Array]
) -> list[jax.Array]:
    """Packets `(devices, ...)` sent as one; on TPUs one by one, where a row of many matrices is a copy."""

    def together(*packets):
        rows = [x.reshape(len(x), -1) for x in packets]
        sent = _in_comm_dtype(exchange, send, jnp.concatenate(rows, axis=1))
        parts = jnp.split(sent, np.cumsum([x.shape[1] for x in rows])[:-1], axis=1)
        return [part.reshape(len(part), *x.shape[1:]) for part, x in zip(parts, packets, strict=True)]

    def each(*packets):
        return [_in_comm_dtype(exchange, send, x) for x in packets]

    if len(packets) == 1:
        return each(*packets)
    return jax.lax.platform_dependent(*packets, tpu=each, default=together)


def _in_comm_dtype(exchange: Exchange, send: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`send` in the communication dtype; two-byte floats as integers, since some compilers widen floats."""
    dtype, is_short = exchange.comm_dtype, exchange.comm_dtype.itemsize == 2
    y = x.astype(dtype)
    y = send(jax.lax.bitcast_convert_type(y, jnp.uint16) if is_short else y)
    return (jax.lax.bitcast_convert_type(y, dtype) if is_short else y).astype(x.dtype)


def _packed(group: Group, count: int, shards: Sequence[jax.Array]) -> jax.Array:
    pieces = [_from_shard(shards[shard.leaf], shard, group.local_shape) for shard in group.shards]
    if empty := count - group.matrices:
        pieces.append(jnp.zeros((empty, *group.local_shape), pieces[0].dtype))
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def _own(x: jax.Array, names: Names) -> jax.Array:
    """This device's entry of an array with one for each device along some mesh axes."""
    return jax.lax.dynamic_index_in_dim(x, jax.lax.axis_index(names), keepdims=False) if names else x[0]


def _whole(sizes: Sizes, exchange: Exchange, group: Group, x: jax.Array) -> jax.Array:
    """Pieces `(all_gather, owners, slots, *local_shape)` assembled to matrices `(slots, *axes)`."""
    names = (*exchange.roles.all_gather, *exchange.roles.all_to_all)
    x = x.reshape(*(sizes[name] for name in names), *x.shape[2:]).transpose(_order(names, group))
    return x.reshape(x.shape[0], *group.whole(sizes))


def _pieces(sizes: Sizes, exchange: Exchange, group: Group, y: jax.Array) -> jax.Array:
    """The pieces of matrices that return to each owner, `(owners, slots, *local_shape)`."""
    names = (*exchange.roles.all_gather, *exchange.roles.all_to_all)
    shape = [len(y)]
    for over, size in zip(group.mesh_axes, group.local_shape, strict=True):
        shape += [*(sizes[name] for name in over), size]
    y = y.reshape(shape).transpose(inverse(_order(names, group)))
    y = y.reshape(-1, devices(sizes, exchange.roles.all_to_all), *y.shape[len(names) :])
    return _own(y, exchange.roles.all_gather)


def _order(names: Names, group: Group) -> list[int]:
    """The permutation of `(*names, slots, *local_shape)`: slots, then each axis after its mesh axes."""
    order = [len(names)]
    for k, over in enumerate(group.mesh_axes):
        order += [*map(names.index, over), len(names) + 1 + k]
    return order


def _from_shard(x: jax.Array, shard: LeafShard, local_shape: Shape) -> jax.Array:
    """A local shard as pieces `(matrices, *local_shape)`, padded with zeros."""
    shape = shard.local_shape[::-1] if shard.transposed else shard.local_shape
    x = x.reshape(shard.view).transpose(shard.order).reshape(shard.matrices, *shape)
    x = x.mT.conj() if shard.transposed else x
    padding = [(0, 0), *((0, full - own) for full, own in zip(local_shape, shard.local_shape, strict=True))]
    return x if local_shape == shard.local_shape else jnp.pad(x, padding)


def _to_shard(x: jax.Array, shard: LeafShard) -> jax.Array:
    """The inverse of `_from_shard`."""
    x = x[(slice(None), *map(slice, shard.local_shape))]
    x = x.mT.conj() if shard.transposed else x
    return x.reshape([shard.view[k] for k in shard.order]).transpose(inverse(shard.order))


def _unpacked(group: Group, span: tuple[int, int], x: jax.Array) -> Iterable[tuple[LeafShard, jax.Array]]:
    """The pieces of each leaf, of those of a span, `(matrices, *local_shape)`."""
    first, last = span
    ends = itertools.accumulate(shard.matrices for shard in group.shards)
    counts = [
        (shard, min(end, last) - max(end - shard.matrices, first))
        for shard, end in zip(group.shards, ends, strict=True)
    ]
    counts = [(shard, count) for shard, count in counts if count > 0]
    parts = split(x, [count for _, count in counts])
    return [(shard, part) for (shard, _), part in zip(counts, parts, strict=True)]
