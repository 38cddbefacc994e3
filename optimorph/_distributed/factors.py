"""The factors of all leaves: where they are stored, and how their bases are refreshed together."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from optimorph._core.types import Shape
from optimorph._distributed.evenly import together
from optimorph.linalg import Axes
from optimorph.linalg._kronecker import FIRST_STEPS, Kronecker, orthogonal_iteration

FIRST_VALUE = 0.1
"""Every tracked eigenvalue before the second step."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the factors of a leaf are stored: those of its stacks one below the other.

    Args:
      form: how the leaf reads as matrices.
      batch: the axes that count the matrices of a stack.
      rows, columns: of each stack, one unless blocks are unequal; 0 for a side without a factor.
    """

    form: Axes
    batch: Shape
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def zeros(self, dtype: Any, tracked: bool) -> Kronecker:
        """The arrays of a leaf at first: no factors, and the parameter's own bases."""
        sides = self.rows, self.columns
        real = jnp.finfo(dtype).dtype

        def identities(sizes):
            blocks = jnp.concatenate([jnp.eye(n, max(sizes), dtype=dtype) for n in sizes])
            return jnp.array(jnp.broadcast_to(blocks, (*self.batch, *blocks.shape)))

        factors = [jnp.zeros((*self.batch, sum(sizes), max(sizes)), dtype) for sizes in sides]
        values = [
            jnp.full((*self.batch, sum(sizes)), FIRST_VALUE, real) if tracked else None for sizes in sides
        ]
        return Kronecker(*factors, *map(identities, sides), *values)

    def split(self, arrays: Kronecker) -> list[Kronecker]:
        """The factors of each stack."""

        def part(x, k, sizes):
            rows = slice(sum(sizes[:k]), sum(sizes[: k + 1]))
            if x is None or len(sizes) == 1:
                return x
            return x[..., rows] if x.ndim == len(self.batch) + 1 else x[..., rows, : sizes[k]]

        return [
            Kronecker(*(part(x, k, sizes) for x, sizes in zip(arrays, self._sides * 3, strict=True)))
            for k in range(len(self.rows))
        ]

    def joined(self, stacks: Sequence[Kronecker]) -> Kronecker:
        """The arrays of a leaf, from the factors of each stack."""
        if len(stacks) == 1:
            return stacks[0]

        def one(*parts):
            if parts[0].ndim == len(self.batch) + 1:
                return jnp.concatenate(parts, axis=-1)
            widest = max(x.shape[-1] for x in parts)
            pads = [[(0, 0)] * (x.ndim - 1) + [(0, widest - x.shape[-1])] for x in parts]
            return jnp.concatenate([jnp.pad(x, pad) for x, pad in zip(parts, pads, strict=True)], axis=-2)

        return jax.tree.map(one, *stacks)

    def check(self, arrays: Kronecker) -> None:
        """Raise a ValueError if these are not the arrays of such a leaf."""
        for x, sizes in zip(arrays, self._sides * 3, strict=True):
            if x is not None and x.shape[len(self.batch)] != sum(sizes):
                raise ValueError(f"a factor has shape {x.shape}, not {sum(sizes)} rows")

    @property
    def _sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.rows, self.columns


def layout_of(form: Axes, shape: Shape, max_dim: int | None, block_size: int | None) -> Layout:
    """The layout of a leaf; sides longer than `max_dim` have no factor."""
    form = form if block_size is None else form.in_blocks(shape, block_size)
    stacks = form.stacks(shape)
    longest = math.inf if max_dim is None else max_dim
    rows, columns = (tuple(s[k] if s[k] <= longest else 0 for s in stacks) for k in (-2, -1))
    return Layout(form, stacks[0][:-2], rows, columns)


def refreshed(
    mesh: AbstractMesh | None,
    stacks: Sequence[Kronecker],
    count: jax.Array,
    every: int,
    sort: bool,
    spread: bool,
) -> tuple[list[Kronecker], list[tuple[jax.Array, jax.Array]]]:
    """The factors of stacks with newer bases, and the order of their rows and columns.

    At every k-th step one orthogonal iteration of all factors, or with `spread` in every step one of a k-th
    of those of each size; in the first step several of all. Factors of one size are one stack.
    """
    bases: dict[tuple[int, int], Any] = {
        (k, side): stack[side + 2] for k, stack in enumerate(stacks) for side in (0, 1) if stack[side].size
    }
    orders = {key: _in_order(x) for key, x in bases.items()}
    steps = jnp.where(count == 0, FIRST_STEPS, 1)

    def refresh(bases, orders):
        bases, orders = dict(bases), dict(orders)
        alike: dict[Any, list[tuple[int, int]]] = {}
        for key, x in bases.items():
            alike.setdefault((x.shape[-1], x.dtype), []).append(key)
        for keys in alike.values():
            factors = _stack([stacks[k][side] for k, side in keys])
            held = _stack([bases[key] for key in keys])
            iterate = functools.partial(_iterated, mesh, steps=steps, sort=sort)
            made = _in_turn(iterate, factors, held, count, every) if spread else iterate(factors, held)
            ends = np.cumsum([math.prod(bases[key].shape[:-2]) for key in keys])[:-1]
            for key, q, order in zip(keys, *(jnp.split(x, ends) for x in made), strict=True):
                bases[key], orders[key] = q.reshape(bases[key].shape), order.reshape(orders[key].shape)
        return bases, orders

    if spread:
        bases, orders = refresh(bases, orders)
    else:
        bases, orders = jax.lax.cond(count % every == 0, refresh, lambda *same: same, bases, orders)

    def of_side(k, side):
        basis: Any = stacks[k][side + 2]
        none = jnp.zeros((*basis.shape[:-2], 0), jnp.int32)
        return bases.get((k, side), basis), orders.get((k, side), none)

    new, order = [], []
    for k, stack in enumerate(stacks):
        (left, rows), (right, columns) = of_side(k, 0), of_side(k, 1)
        new.append(stack._replace(left_basis=left, right_basis=right))
        order.append((rows, columns))
    return new, order


def _iterated(
    mesh: AbstractMesh | None, factors: jax.Array, bases: jax.Array, *, steps: jax.Array, sort: bool
) -> tuple[jax.Array, jax.Array]:
    """`orthogonal_iteration`; over a mesh each device computes a share of the factors."""
    many = jnp.broadcast_to(steps, len(factors))

    def iterate(factors, bases, steps):
        return orthogonal_iteration(factors, bases, steps[0], sort=sort)

    return together(mesh, iterate, [(factors, bases, many)], [factors.shape[:1]])[0]


def _in_turn(
    iterate: Callable[..., Any], factors: jax.Array, bases: jax.Array, count: jax.Array, every: int
) -> tuple[jax.Array, jax.Array]:
    """`iterate` of a k-th of the factors; in the first step of all of them."""
    size = -(-len(factors) // every)
    turns = -(-len(factors) // size)
    turn = count % every
    first = jnp.where(count == 0, 0, jnp.minimum(turn, turns))
    last = jnp.where(count == 0, turns, jnp.minimum(turn + 1, turns))

    def one(k, carry):
        start = jnp.minimum(k * size, len(factors) - size)
        own = [jax.lax.dynamic_slice_in_dim(x, start, size) for x in (factors, carry[0])]
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(x, y, start, 0)
            for x, y in zip(carry, iterate(*own), strict=True)
        )

    return jax.lax.fori_loop(first, last, one, (bases, _in_order(bases)))


def _in_order(bases: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(bases.shape[-1], dtype=jnp.int32), bases.shape[:-1])


def _stack(squares: Sequence[jax.Array]) -> jax.Array:
    flat = [x.reshape(-1, *x.shape[-2:]) for x in squares]
    return flat[0] if len(flat) == 1 else jnp.concatenate(flat)
