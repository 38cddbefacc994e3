"""The bases of all factors, refreshed together: one QR decomposition for each size of factor."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from optimorph._distributed.stacks import at_owners
from optimorph.linalg._kronecker import FIRST_STEPS, Kronecker, orthogonal_iteration

Pairs = dict[str, tuple[jax.Array | None, jax.Array | None]]
"""For each size of matrix, what there is of the left and of the right side; None without a factor."""


def refreshed(
    mesh: AbstractMesh | None,
    kept: dict[str, Kronecker],
    count: jax.Array,
    every: int,
    *,
    sort: bool,
    spread: bool,
) -> tuple[dict[str, Kronecker], Pairs]:
    """Stacks of factors with newer bases, and the order of their rows and columns.

    At every k-th step one orthogonal iteration of all factors, or with `spread` in every step one of a k-th
    of those of each size that a device owns; in the first step several of all.
    """
    factors = {key: (k.left, k.right) for key, k in kept.items()}
    bases = {key: (k.left_basis, k.right_basis) for key, k in kept.items()}
    orders = jax.tree.map(_in_order, bases)

    def refresh(bases, orders):
        f = functools.partial(_refreshed, every=every if spread else None, sort=sort)
        return at_owners(mesh, f, factors, bases, orders, about=(count,))

    if spread:
        bases, orders = refresh(bases, orders)
    else:
        bases, orders = jax.lax.cond(count % every == 0, refresh, lambda *same: same, bases, orders)
    return {
        key: k._replace(left_basis=bases[key][0], right_basis=bases[key][1]) for key, k in kept.items()
    }, orders


def _refreshed(
    factors: Pairs, bases: Pairs, orders: Pairs, count: jax.Array, *, every: int | None, sort: bool
) -> tuple[Pairs, Pairs]:
    """The bases of factors, and their orders; with `every`, of some of each size in turn."""
    flat, structure = jax.tree.flatten(bases)
    order, matrices = jax.tree.leaves(orders), jax.tree.leaves(factors)
    alike: dict[Any, list[int]] = {}
    for k, x in enumerate(flat):
        alike.setdefault((x.shape[-1], x.dtype), []).append(k)
    steps = jnp.where(count == 0, FIRST_STEPS, 1)
    iterate = functools.partial(orthogonal_iteration, steps=steps, sort=sort)
    for members in alike.values():
        p, q, by = (jnp.concatenate([each[k] for k in members]) for each in (matrices, flat, order))
        made = iterate(p, q) if every is None else _in_turn(iterate, p, q, by, count, every)
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
    first = jnp.where(count == 0, 0, jnp.minimum(turn, turns))
    last = jnp.where(count == 0, turns, jnp.minimum(turn + 1, turns))

    def one(k, carry):
        start = jnp.minimum(k * size, len(p) - size)
        own: Sequence[jax.Array] = [jax.lax.dynamic_slice_in_dim(x, start, size) for x in (p, carry[0])]
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, y, start, 0)
            for x, y in zip(carry, iterate(*own), strict=True)
        )

    return jax.lax.fori_loop(first, last, one, (q, order))


def _in_order(basis: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(basis.shape[-1], dtype=jnp.int32), basis.shape[:-1])
