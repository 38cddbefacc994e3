"""Work on the slots of stacks, divided by what it costs: over the devices of a mesh, and over turns.

Devices own equally many slots, but some slots are empty, and a size of which there is one matrix is at one
device. Matrices are sent from devices with much work to others for one computation, and the results back.
The turn of a matrix is the same over every mesh.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimorph._distributed.shardings import Names

WORTH = 0.9
"""At most so much of the work without sending; sending takes time too."""

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Balance:
    """What each device computes of stacks of one size in each turn.

    A number that is too large stands for no slot.

    Args:
      chosen: its slots, and behind those of the stack the matrices that it receives, `(turns, devices,
        most)`.
      rounds: exchanges of at most one matrix for each device: from which device to which, and which slot each
        sends, `(turns, devices)`. In a turn in which no device sends one there is no exchange.
    """

    chosen: np.ndarray
    rounds: Sequence[tuple[Sequence[Pair], np.ndarray]]

    def map(
        self,
        f: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
        names: Names,
        turns: tuple[Any, Any],
        x: jax.Array,
        y: jax.Array,
        default: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """`f(x, y)` of stacks over manual mesh axes; of slots without a turn it is `y` and `default`.

        The turns are those from the first number to before the second.
        """

        def turn(k, made):
            return self._turn(f, names, k, x, *made)

        return jax.lax.fori_loop(*turns, turn, (y, default))

    def _turn(
        self, f: Any, names: Names, turn: jax.Array, x: jax.Array, y: jax.Array, default: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        me, slots = jax.lax.axis_index(names), len(x)
        sent = [jnp.asarray(table)[turn, me] for _, table in self.rounds]

        def exchanged(k, x, to=1):
            pairs, table = self.rounds[k]
            used = table.min(axis=1) < slots
            send = functools.partial(jax.lax.ppermute, axis_name=names, perm=[pair[::to] for pair in pairs])
            return send(x) if used.all() else jax.lax.cond(jnp.asarray(used)[turn], send, jnp.zeros_like, x)

        def with_received(x):
            each = [exchanged(k, x.at[slot].get(mode="clip")) for k, slot in enumerate(sent)]
            return jnp.concatenate([x, *(a[None] for a in each)])

        x, y = map(with_received, (x, y))
        default = jnp.pad(default, [(0, len(sent)), *[(0, 0)] * (default.ndim - 1)])
        chosen = jnp.asarray(self.chosen)[turn, me]
        own = [each.at[chosen].get(mode="clip") for each in (x, y, default)]
        made = jax.lax.cond(chosen[0] < len(x), lambda x, y, _: f(x, y), lambda _, *same: tuple(same), *own)
        results = []
        for old, new in zip((y, default), made, strict=True):
            result = old.at[chosen].set(new, mode="drop")
            for k, slot in enumerate(sent):
                result = result.at[slot].set(exchanged(k, result[slots + k], to=-1), mode="drop")
            results.append(result[:slots])
        return results[0], results[1]


def balanced(costs: Sequence[float], numbers: Sequence[np.ndarray], every: int = 1) -> list[Balance] | None:
    """How the work is divided over turns and devices; None where one turn of each device's own is as good.

    The matrices have their turns one by one, those that cost most first. In every turn a device computes as
    many matrices of a size as any other, or none of them. They are at their owners where this keeps the work
    of the busiest device near the least that is possible, and otherwise at the devices with least to do.

    Args:
      costs: of one matrix, for each size.
      numbers: which of the matrices of a size a slot has, `(devices, slots)` for each size; -1 for none.
      every: the number of turns, if there are so many matrices.
    """
    if not numbers:
        return None
    counts = [int(np.sum(x >= 0)) for x in numbers]
    load = np.zeros((min(every, sum(counts)), len(numbers[0])))
    even = np.dot(costs, counts) / load.size
    plans, before = {}, 0
    for k in sorted(range(len(costs)), key=lambda k: -costs[k]):
        turn = np.where(numbers[k] < 0, -1, (before + numbers[k]) % len(load))
        own = np.stack([np.sum(turn == t, axis=1) for t in range(len(load))])
        most = -(-int(own.sum(1).max()) // len(own[0]))
        room = most * np.stack([_busy(*x, most, most * costs[k], even) for x in zip(own, load, strict=True)])
        load, before = load + room * costs[k], before + counts[k]
        plans[k] = _plan(turn, room)
    owners = sum(cost * x.shape[1] for cost, x in zip(costs, numbers, strict=True))
    if len(load) == 1 and load.max() >= WORTH * owners:
        return None
    return [plans[k] for k in range(len(costs))]


def _busy(own: np.ndarray, load: np.ndarray, most: int, cost: float, even: float) -> np.ndarray:
    """Which devices compute up to so many matrices in a turn: owners, if no device has more to do for it."""
    after = load + cost
    least = np.sort(after)[: -(-own.sum() // most)].max(initial=max(even, load.max()))
    order = np.lexsort((-own, np.maximum(after, least)))
    taken = np.where(own > 0, np.minimum(own, most), most)[order]
    busy = np.zeros(len(own), bool)
    busy[order[taken.cumsum() - taken < own.sum()]] = True
    return busy


def _plan(turn: np.ndarray, room: np.ndarray) -> Balance:
    """Every device computes so many in each turn: first its own; the others are sent where there is room."""
    devices, slots = turn.shape
    kept: dict[tuple[int, int], list[int]] = {}
    rounds: list[tuple[dict[int, int], np.ndarray]] = []
    for t in range(len(room)):
        own = [np.flatnonzero(x == t).tolist() for x in turn]
        kept |= {(t, d): own[d][: room[t, d]] for d in range(devices)}
        takers = (d for j in range(room.max()) for d in range(devices) if len(own[d]) <= j < room[t, d])
        for source, slot in [(d, slot) for d in range(devices) for slot in own[d][room[t, d] :]]:
            target = next(takers)
            fits = (_fits(pairs, source, target) and sent[t, source] == slots for pairs, sent in rounds)
            k = next((k for k, each in enumerate(fits) if each), len(rounds))
            if k == len(rounds):
                rounds.append(({}, np.full(room.shape, slots)))
            rounds[k][0][source], rounds[k][1][t, source] = target, slot
            kept[t, target].append(slots + k)
    chosen = np.full((*room.shape, room.max()), slots + len(rounds))
    for place, x in kept.items():
        chosen[place][: len(x)] = x
    return Balance(chosen, [([*pairs.items()], sent) for pairs, sent in rounds])


def _fits(pairs: dict[int, int], source: int, target: int) -> bool:
    """Whether with this pair too every device sends to one other, and receives from one."""
    return pairs.get(source) == target or (source not in pairs and target not in pairs.values())
