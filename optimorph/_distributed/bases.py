"""The bases of all factors, refreshed together: one QR decomposition for each size of factor.

Over a mesh every device decomposes the factors of its own slots. Where this gives one device more to do than
others, because slots are empty, factors are sent elsewhere: a QR of n x n costs n³, and sending it n². A
refresh that is spread over steps has turns, which cost about the same.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from optimorph._core.numbers import varying
from optimorph._distributed.balance import Balance, balanced
from optimorph._distributed.shardings import Names
from optimorph._distributed.stacks import at_owners, filled
from optimorph.linalg._kronecker import FIRST_STEPS, Kronecker, orthogonal_iteration

Pairs = dict[str, tuple[jax.Array | None, jax.Array | None]]
"""For each size of matrix, what there is of the left and of the right side; None without a factor."""


def refreshed(
    mesh: AbstractMesh | None,
    kept: dict[str, Kronecker],
    matrices: dict[str, int],
    count: jax.Array,
    whole: jax.Array,
    every: int,
    *,
    sort: bool,
    spread: bool,
) -> tuple[dict[str, Kronecker], Pairs]:
    """Stacks of factors with newer bases, and the order of their rows and columns.

    At every k-th step one orthogonal iteration of all factors, or with `spread` of each factor in one of k
    steps; in the first step several of all, and one of all where `whole`. `matrices` is how many slots of
    each size are not empty.
    """
    factors = {key: (k.left, k.right) for key, k in kept.items()}
    bases = {key: (k.left_basis, k.right_basis) for key, k in kept.items()}
    bases = jax.tree.map(varying, bases, factors)
    orders = jax.tree.map(varying, jax.tree.map(_in_order, bases), factors)
    turns = every if spread else 1
    plans = _plans(mesh, bases, matrices, turns)

    def refresh(bases, orders):
        names = () if mesh is None else mesh.axis_names
        f = functools.partial(_refreshed, every=turns, sort=sort, names=names, plans=plans)
        return at_owners(mesh, f, factors, bases, orders, about=(count, whole))

    if spread and plans:
        bases, orders = refresh(bases, orders)
    else:
        bases, orders = jax.lax.cond(whole | (count % every == 0), refresh, lambda *same: same, bases, orders)
    return {
        key: k._replace(left_basis=bases[key][0], right_basis=bases[key][1]) for key, k in kept.items()
    }, orders


def _refreshed(
    factors: Pairs,
    bases: Pairs,
    orders: Pairs,
    count: jax.Array,
    whole: jax.Array,
    *,
    every: int,
    sort: bool,
    names: Names,
    plans: list[Balance] | None,
) -> tuple[Pairs, Pairs]:
    flat, structure = jax.tree.flatten(bases)
    order, matrices = jax.tree.leaves(orders), jax.tree.leaves(factors)
    turns = _turns(count, whole, every, len(plans[0].chosen) if plans else 1)
    iterate = functools.partial(orthogonal_iteration, steps=FIRST_STEPS, sort=sort, again=count == 0)
    for number, members in enumerate(_alike(flat)):
        p, q, by = (jnp.concatenate([each[k] for k in members]) for each in (matrices, flat, order))
        made = plans[number].map(iterate, names, turns, p, q, by) if plans else iterate(p, q)
        ends = np.cumsum([len(flat[k]) for k in members])[:-1]
        for k, new, moved in zip(members, *(jnp.split(x, ends) for x in made), strict=True):
            flat[k], order[k] = new, moved
    return structure.unflatten(flat), structure.unflatten(order)


def _turns(count: jax.Array, whole: jax.Array, every: int, number: int) -> tuple[Any, Any]:
    """The first turn of a step and the end of the last one; all turns where `whole`."""
    if every == 1:
        return 0, 1
    turn = count % every
    return jnp.where(whole, 0, turn), jnp.where(whole, number, jnp.minimum(turn + 1, number))


def _alike(bases: Sequence[jax.Array]) -> list[list[int]]:
    found: dict[Any, list[int]] = {}
    for k, x in enumerate(bases):
        found.setdefault((x.shape[1], x.dtype), []).append(k)
    return [*found.values()]


def _plans(
    mesh: AbstractMesh | None, bases: Pairs, matrices: dict[str, int], every: int
) -> list[Balance] | None:
    """Who decomposes when what of each of `_alike`; None where each does its own at once."""
    flat = jax.tree.leaves_with_path(bases)
    alike = _alike([x for _, x in flat])

    def numbers(members):
        each, first = [], 0
        for path, x in (flat[k] for k in members):
            number = np.arange(filled(len(x), mesh)).reshape(1 if mesh is None else mesh.size, -1)
            count = matrices[path[0].key]
            each.append(np.where(number < count, first + number, -1))
            first += count
        return np.concatenate(each, axis=1)

    costs = [float(flat[members[0]][1].shape[1]) ** 3 for members in alike]
    return balanced(costs, [numbers(members) for members in alike], every)


def _in_order(basis: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(basis.shape[-1], dtype=jnp.int32), basis.shape[:-1])
