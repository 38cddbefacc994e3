"""All matrices of one shape as one stack, whatever leaves they come from.

Nearly equal shapes are not padded to a common one: on one device that never saves operations. Over a mesh it
can fill idle slots, and `placement` does it there.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from optimorph._core.types import Shape
from optimorph.linalg import Axes


def map_by_shape(
    f: Callable[[jax.Array], jax.Array], stacks: Sequence[jax.Array], *, transpose: bool
) -> list[jax.Array]:
    """`f` of every stack, called once per distinct shape and dtype: the program grows with those only.

    `f` is a function of stacks `(batch, n, m)` to arrays `(batch, ...)` that treats each matrix alone.
    With `transpose` f(xᴴ) = f(x)ᴴ, so that tall and wide matrices can share a stack.
    """
    wide = [_transposed(x) if transpose and x.shape[-2] > x.shape[-1] else x for x in stacks]
    groups: dict[tuple[Shape, jnp.dtype], list[int]] = {}
    for k, x in enumerate(wide):
        if x.size:
            groups.setdefault((x.shape[-2:], x.dtype), []).append(k)
    results = list(wide)
    for members in groups.values():
        flat = [wide[k].reshape(-1, *wide[k].shape[-2:]) for k in members]
        stack = f(flat[0] if len(flat) == 1 else jnp.concatenate(flat))
        for k, part in zip(members, split(stack, list(map(len, flat))), strict=True):
            results[k] = part.reshape(*wide[k].shape[:-2], *part.shape[1:])
    return [x if wide[k] is stacks[k] else _transposed(x) for k, x in enumerate(results)]


def map_matrices(
    f: Callable[[jax.Array], jax.Array],
    forms: Sequence[Axes],
    arrays: Sequence[jax.Array],
    *,
    transpose: bool,
) -> list[jax.Array]:
    """`f` of every matrix of arrays, read by their forms, in as few calls as `map_by_shape` makes."""
    stacks = [form.matrices(x) for form, x in zip(forms, arrays, strict=True)]
    results = iter(map_by_shape(f, [x for pieces in stacks for x in pieces], transpose=transpose))
    return [
        form.array([next(results) for _ in pieces], x.shape)
        for form, x, pieces in zip(forms, arrays, stacks, strict=True)
    ]


def split(stack: jax.Array, counts: Sequence[int]) -> list[jax.Array]:
    """Consecutive parts of a stack, sliced at positions that are data and not constants.

    Compilers reuse one kernel for all parts of a size; constant positions would make one kernel each: 400
    parts compile in a tenth of the time. The barrier keeps the positions from being constant-folded.
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


def _transposed(x: jax.Array) -> jax.Array:
    return x.mT.conj()
