"""Matrices of one shape, whatever leaves they come from, as one stack.

Nearly equal shapes are not padded to one here: that never takes fewer operations. Over a mesh, where places
would stay empty, it may, and `placement` does.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from optimorph.linalg.axes import Axes, Shape


def together(
    f: Callable[[jax.Array], jax.Array], stacks: Sequence[jax.Array], *, turn: bool
) -> list[jax.Array]:
    """`f` of every stack, called once for each distinct shape and dtype: programs grow with those alone.

    Args:
      f: a function of stacks `(batch, n, m)` that treats each matrix by itself, to arrays `(batch, ...)`.
      stacks: arrays `(*batch, n, m)`.
      turn: whether f(xᴴ) = f(x)ᴴ, so that high and wide matrices may go together.
    """
    wide = [_turned(x) if turn and x.shape[-2] > x.shape[-1] else x for x in stacks]
    buckets: dict[tuple[Shape, jnp.dtype], list[int]] = {}
    for k, x in enumerate(wide):
        if x.size:
            buckets.setdefault((x.shape[-2:], x.dtype), []).append(k)
    found = dict(enumerate(wide))
    for members in buckets.values():
        flat = [wide[k].reshape(-1, *wide[k].shape[-2:]) for k in members]
        done = f(flat[0] if len(flat) == 1 else jnp.concatenate(flat))
        for k, part in zip(members, parts(done, list(map(len, flat))), strict=True):
            found[k] = part.reshape(*wide[k].shape[:-2], *part.shape[1:])
    return [x if wide[k] is stacks[k] else _turned(x) for k, x in found.items()]


def of_matrices(
    f: Callable[[jax.Array], jax.Array], forms: Sequence[Axes], arrays: Sequence[jax.Array], *, turn: bool
) -> list[jax.Array]:
    """`f` of every matrix of arrays, read by their forms, in as few calls as `together` makes."""
    stacks = [form.matrices(x) for form, x in zip(forms, arrays, strict=True)]
    results = iter(together(f, [x for each in stacks for x in each], turn=turn))
    return [
        form.array([next(results) for _ in each], x.shape)
        for form, x, each in zip(forms, arrays, stacks, strict=True)
    ]


def parts(stack: jax.Array, counts: Sequence[int]) -> list[jax.Array]:
    """Consecutive parts, taken from positions that are data and not code.

    Compilers reuse one kernel for all parts of a size, where constant positions would make each its own: 400
    parts compile in a tenth of the time. The barrier keeps the positions from being folded into the code.
    """
    if len(counts) == 1:
        return [stack[: counts[0]]]
    starts = np.cumsum([0, *counts[:-1]])
    positions = jax.lax.optimization_barrier([np.array([start, 0], np.int32) for start in starts])
    zeros = [jnp.int32(0)] * (stack.ndim - 1)
    return [
        jax.lax.dynamic_slice(
            stack, (position[0], *zeros), (count, *stack.shape[1:]), allow_negative_indices=False
        )
        for position, count in zip(positions, counts, strict=True)
    ]


def _turned(x: jax.Array) -> jax.Array:
    return x.mT.conj()
