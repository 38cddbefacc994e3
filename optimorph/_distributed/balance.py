"""Work on the slots of stacks, divided over a mesh by what it costs.

Devices own equally many slots, but some slots are empty, and a size of which there is one matrix is at one
device. Matrices are sent from devices with much work to others for one computation, and the results back.
"""

import collections
import dataclasses
import itertools
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
    """What each device computes of stacks of one size.

    A number that is too large stands for no slot.

    Args:
      chosen: its slots, and behind those of the stack the matrices that it receives, `(devices, most)`.
      rounds: exchanges of at most one matrix for each device: from which device to which, and which slot each
        sends.
    """

    chosen: np.ndarray
    rounds: Sequence[tuple[Sequence[Pair], np.ndarray]]

    def map(
        self,
        f: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
        names: Names,
        x: jax.Array,
        y: jax.Array,
        default: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """`f(x, y)` of stacks over manual mesh axes; of empty slots it is `y` and `default`."""
        me, slots = jax.lax.axis_index(names), len(x)

        def with_received(x):
            sent = [(x.at[jnp.asarray(s)[me]].get(mode="clip"), pairs) for pairs, s in self.rounds]
            return jnp.concatenate([x, *(jax.lax.ppermute(a[None], names, pairs) for a, pairs in sent)])

        x, y = map(with_received, (x, y))
        default = jnp.pad(default, [(0, len(self.rounds)), *[(0, 0)] * (default.ndim - 1)])
        chosen = jnp.asarray(self.chosen)[me]
        own = [each.at[chosen].get(mode="clip") for each in (x, y, default)]
        made = jax.lax.cond(chosen[0] < len(x), lambda x, y, _: f(x, y), lambda _, *same: tuple(same), *own)
        results = []
        for old, new in zip((y, default), made, strict=True):
            result = old.at[chosen].set(new, mode="drop")
            for k, (pairs, sent) in enumerate(self.rounds):
                back = jax.lax.ppermute(result[slots + k], names, [pair[::-1] for pair in pairs])
                result = result.at[jnp.asarray(sent)[me]].set(back, mode="drop")
            results.append(result[:slots])
        return results[0], results[1]


def balanced(costs: Sequence[float], filled: Sequence[np.ndarray]) -> list[Balance] | None:
    """How the work is divided; None where this saves nothing.

    Every device computes as many matrices of a size as any, or none of them. The size that costs most is
    first, and its matrices are at the devices that have least to do.

    Args:
      costs: of one matrix, for each size.
      filled: which slots have a matrix, boolean `(devices, slots)` for each size.
    """
    if not filled:
        return None
    plans, load = {}, np.zeros(len(filled[0]))
    for k in sorted(range(len(costs)), key=lambda k: -costs[k]):
        own, total = filled[k].sum(1), int(filled[k].sum())
        most = -(-total // len(own))
        busy = np.lexsort((-own, load))[: -(-total // most)]
        room = np.zeros_like(own)
        room[busy] = most
        room[busy[-1]] -= most * len(busy) - total
        load[busy] += most * costs[k]
        plans[k] = _plan(filled[k], room)
    before = sum(cost * x.shape[1] for cost, x in zip(costs, filled, strict=True))
    return [plans[k] for k in range(len(costs))] if load.max() < WORTH * before else None


def _plan(filled: np.ndarray, room: np.ndarray) -> Balance:
    """Every device computes so many: first its own; what is too much goes where there is room."""
    slots = filled.shape[1]
    own = [np.flatnonzero(x) for x in filled]
    kept = [[*x[:most]] for x, most in zip(own, room, strict=True)]
    givers = [(d, int(slot)) for d, x in enumerate(own) for slot in x[room[d] :]]
    takers = [d for d, x in enumerate(kept) for _ in range(room[d] - len(x))]
    taken: dict[Any, set[int]] = collections.defaultdict(set)
    rounds: list[tuple[list[Pair], np.ndarray]] = []
    for (source, slot), target in zip(givers, takers, strict=True):
        used = taken["from", source], taken["to", target]
        k = next(k for k in itertools.count() if k not in used[0] | used[1])
        if k == len(rounds):
            rounds.append(([], np.full(len(own), slots)))
        pairs, sent = rounds[k]
        pairs.append((source, target))
        sent[source] = slot
        kept[target].append(slots + k)
        for each in used:
            each.add(k)
    chosen = np.full((len(own), max(room)), slots + len(rounds))
    for d, x in enumerate(kept):
        chosen[d, : len(x)] = x
    return Balance(chosen, rounds)
