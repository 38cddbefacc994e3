"""Matrices of one shape, whatever leaves they come from, as one stack."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]


def together(
    f: Callable[[jax.Array], jax.Array], stacks: Sequence[jax.Array], *, turn: bool
) -> list[jax.Array]:
    """`f` of every stack, called once for each distinct shape and dtype: programs grow with those alone.

    Args:
      f: a function of stacks `(batch, n, m)` that treats each matrix by itself.
      stacks: arrays `(*batch, n, m)`.
      turn: whether f(xᴴ) = f(x)ᴴ, so that high and wide matrices may go together.
    """
    buckets: dict[tuple[Shape, jnp.dtype], list[int]] = {}
    wide = [_turned(x) if turn and x.shape[-2] > x.shape[-1] else x for x in stacks]
    for k, x in enumerate(wide):
        buckets.setdefault((x.shape[-2:], x.dtype), []).append(k)
    found: dict[int, jax.Array] = {}
    for members in buckets.values():
        flat = [wide[k].reshape(-1, *wide[k].shape[-2:]) for k in members]
        counts = [len(x) for x in flat]
        done = f(flat[0] if len(flat) == 1 else jnp.concatenate(flat))
        ends = [sum(counts[: j + 1]) for j in range(len(counts))]
        for k, part in zip(members, jnp.split(done, ends[:-1]), strict=True):
            part = part.reshape(wide[k].shape)
            found[k] = _turned(part) if part.shape != stacks[k].shape or wide[k] is not stacks[k] else part
    return [found[k] for k in range(len(stacks))]


def _turned(x: jax.Array) -> jax.Array:
    return x.mT.conj()
