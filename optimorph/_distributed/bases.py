"""The bases of all factors, refreshed together: one QR decomposition for each size of factor.

Over a mesh every device decomposes the factors of its own slots. Where this gives one device more to do than
others, because slots are empty, factors are sent elsewhere: a QR of n x n costs n³, and sending it n².
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

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
    every: int,
    *,
    sort: bool,
    spread: bool,
) -> tuple[dict[str, Kronecker], Pairs]:
    """Stacks of factors with newer bases, and the order of their rows and columns.

    At every k-th step one orthogonal iteration of all factors, or with `spread` in every step one of a k-th
    of those of each size that a device owns; in the first step several of all. `matrices` is how many slots
    of each size are not empty.
    """
    factors = {key: (k.left, k.right) for key, k in kept.items()}
    bases = {key: (k.left_basis, k.right_basis) for key, k in kept.items()}
    orders = jax.tree.map(_in_order, bases)
    plans = None if spread or mesh is None else _plans(mesh, bases, matrices)

    def refresh(bases, orders):
        f = functools.partial(_refreshed, every=every if spread else None, sort=sort, plans=plans)
        return at_owners(mesh, f, factors, bases, orders, about=(count,))

    if spread:
        bases, orders = refresh(bases, orders)
    else:
        bases, orders = jax.lax.cond(count % every == 0, refresh, lambda *same: same, bases, orders)
    return {
        key: k._replace(left_basis=bases[key][0], right_basis=bases[key][1]) for key, k in kept.items()
    }, orders


def _refreshed(
    factors: Pairs,
    bases: Pairs,
    orders: Pairs,
    count: jax.Array,
    *,
    every: int | None,
    sort: bool,
    plans: tuple[Names, list[Balance]] | None,
) -> tuple[Pairs, Pairs]:
    """The bases of factors, and their orders; with `every`, of some of each size in turn."""
    flat, structure = jax.tree.flatten(bases)
    order, matrices = jax.tree.leaves(orders), jax.tree.leaves(factors)
    steps = jnp.where(count == 0, FIRST_STEPS, 1)
    iterate = functools.partial(orthogonal_iteration, steps=steps, sort=sort)
    for number, members in enumerate(_alike(flat)):
        p, q, by = (jnp.concatenate([each[k] for k in members]) for each in (matrices, flat, order))
        if every is not None:
            made = _in_turn(iterate, p, q, by, count, every)
        else:
            made = plans[1][number].map(iterate, plans[0], p, q, by) if plans else iterate(p, q)
        ends = np.cumsum([len(flat[k]) for k in members])[:-1]
        for k, new, moved in zip(members, *(jnp.split(x, ends) for x in made), strict=True):
            flat[k], order[k] = new, moved
    return structure.unflatten(flat), structure.unflatten(order)


def _in_turn(
    iterate: Callable[..., Any], p: jax.Array, q: jax.Array, order: jax.Array, count: jax.Array, every: int
) -> tuple[jax.Array, jax.Array]:
    """`iterate` of a k-th of the factors; in the first step of all of them."""
    size = -(-len(p) // every)
    turns = -(-len(p) // size)
    turn = count % every
    last = jnp.where(count == 0, turns, jnp.minimum(turn + 1, turns))

    def one(k, carry):  # slices that would end too late are moved to the end
        own: Sequence[jax.Array] = [jax.lax.dynamic_slice_in_dim(x, k * size, size) for x in (p, carry[0])]
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, y, k * size, 0)
            for x, y in zip(carry, iterate(*own), strict=True)
        )

    return jax.lax.fori_loop(turn, last, one, (q, order))


def _alike(bases: Sequence[jax.Array]) -> list[list[int]]:
    """The stacks whose factors are decomposed together."""
    found: dict[Any, list[int]] = {}
    for k, x in enumerate(bases):
        found.setdefault((x.shape[1], x.dtype), []).append(k)
    return [*found.values()]


def _plans(mesh: AbstractMesh, bases: Pairs, matrices: dict[str, int]) -> tuple[Names, list[Balance]] | None:
    """The mesh axes, and who decomposes what of each of `_alike`; None where that is the owners."""
    flat = jax.tree.leaves(bases)
    counts = [matrices[path[0].key] for path, _ in jax.tree.leaves_with_path(bases)]
    full = [
        (np.arange(filled(len(x), mesh)) < count).reshape(mesh.size, -1)
        for x, count in zip(flat, counts, strict=True)
    ]
    alike = _alike(flat)
    costs = [float(flat[members[0]].shape[1]) ** 3 for members in alike]
    plans = balanced(costs, [np.concatenate([full[k] for k in members], axis=1) for members in alike])
    return None if plans is None else (mesh.axis_names, plans)


def _in_order(basis: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(basis.shape[-1], dtype=jnp.int32), basis.shape[:-1])
