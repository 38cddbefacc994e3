"""The step on a sphere: weights keep their norm."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._core.checks import check_numbers, check_params
from optimorph._core.numbers import as_float32, as_scalar, as_schedule, increment, upcast
from optimorph._core.roles import roles_of
from optimorph._core.rule import Rule, transform
from optimorph._core.types import AxesRules, Rules, ScalarOrSchedule
from optimorph._distributed.shardings import shards_of
from optimorph._routing.resolve import AxesOfLeaves
from optimorph._transforms.step import LearningRateState
from optimorph.linalg import Axes


def hyperball(
    learning_rate: ScalarOrSchedule, axes: AxesRules | None = None, shardings: Rules | None = None
) -> optax.GradientTransformationExtraArgs:
    """Turn a direction of ascent into a step that keeps the norm of every matrix; the last of a chain.

        x = w - η ‖w‖ u / ‖u‖          (1)
        w ← ‖w‖ x / ‖x‖                (2)

    It takes the place of the learning rate and of weight decay. The scale of u is irrelevant, and a small η
    is the angle of a step that is orthogonal to w. ‖·‖ is the Frobenius norm of each matrix, in float32 or
    wider; a leaf that is no matrix has one norm. ‖x‖² = ‖w‖² - 2 s ⟨w, u⟩ + s² ‖u‖² needs three sums, and
    over a mesh all_reduces of five numbers a matrix.

    A matrix of zeros has no norm to keep: it takes the step -η u, and keeps the norm that it then has. A
    matrix whose u is zero stays. A number by itself keeps its absolute value, so that it does not train. η
    should be far below 1: where ‖x‖ is nearly 0, rounding decides the norm. The norm of bfloat16 weights is
    kept on average, with `apply_updates(key=)`.

    Args:
      learning_rate: η, at least 0, a number, an array, a tracer or a schedule. The last one is in the state.
      axes: how leaves read as matrices, as that of `muon`. Inside `route_matrices` its axes count.
      shardings: those of the leaves inside `jax.shard_map`, as that of `muon`.

    Raises:
      ValueError: η negative, when it is a concrete number; at `update`, params missing; inside
        `compress_state`, which belongs around the transforms before it.

    References:
      Wen et al. 2026, "Hyperball optimization", arXiv:2606.16899 (MuonH, AdamH).
    """
    who = "hyperball"
    check_numbers(who, learning_rate=learning_rate)
    rate_at = as_schedule(learning_rate)
    own = AxesOfLeaves(who, axes, shardings)

    def begin(leaves):
        own.check(leaves)
        count = jnp.zeros([], jnp.int32)
        return LearningRateState(count, as_float32(rate_at(count)))

    def advance(state, leaves):
        rate = rate_at(state.count)
        after = LearningRateState(increment(state.count), as_float32(rate))
        return (rate, *own.axes_and_shardings(leaves)), after

    def update(u, state, leaf, now):
        rate, forms, match = now
        if leaf.weight is None:
            check_params(who, None, "the norm that it keeps is theirs")
        if leaf.part:
            raise ValueError(f"compress_state: put {who} outside, because norms are those of whole matrices.")
        form, w = forms[leaf.index], upcast(leaf.weight).astype(u.dtype)
        names = _shards(who, match, leaf.path, np.shape(leaf.leaves.values[leaf.index]), form)
        sizes = [jax.lax.stop_gradient(_over(jnp.max, jnp.abs(x), form)) for x in (w, u)]
        sizes = jax.lax.pmax(sizes, names) if names else sizes
        scales = [jnp.where(size > 0, size, 1).astype(u.dtype) for size in sizes]
        x, y = w / scales[0], u / scales[1]  # whose squares are numbers
        sums = [_over(jnp.sum, (a * b.conj()).real, form) for a, b in ((x, x), (x, y), (y, y))]
        sums = jax.lax.psum(sums, names) if names else sums
        eta, size = as_scalar(rate, u), sizes[0]
        return jnp.where(size > 0, size.astype(u.dtype) * _on_sphere(x, y, eta, *sums), -eta * u), state

    return transform(who, Rule(roles_of(LearningRateState), update, begin=begin, advance=advance))


def _on_sphere(
    w: jax.Array, u: jax.Array, eta: Any, ww: jax.Array, wu: jax.Array, uu: jax.Array
) -> jax.Array:
    """The update, from ‖w‖², ⟨w, u⟩ and ‖u‖²."""
    ww = jnp.where(ww > 0, ww, 1)
    s = eta.real * jnp.sqrt(ww / jnp.where(uu > 0, uu, 1))
    more = 2 * s * wu - s * s * uu  # ‖w‖² - ‖x‖²
    xx = jnp.where(ww > more, ww - more, 1)
    ratio = jnp.sqrt(ww / xx)  # ‖w‖ / ‖x‖
    less = more / xx / (ratio + 1)  # ratio - 1, without cancellation
    return less.astype(w.dtype) * w - (ratio * s).astype(u.dtype) * u  # (1), (2)


def _over(reduce: Callable[..., jax.Array], x: jax.Array, form: Axes | None) -> jax.Array:
    """A reduction over the matrix of each number, in a shape that broadcasts against the array."""
    if form is None:
        return reduce(x, keepdims=True, initial=0)
    sides = [(k, axis) for k, axis in enumerate(form.parts) if axis.letter != "b"]
    x = reduce(x, tuple(k for k, axis in sides if axis.whole), keepdims=True, initial=0)
    for k, axis in sides:
        if not axis.whole:  # of what is left, a number for each index of the axis
            shape, times = x.shape, axis.repetitions(x.shape[k])
            if times != 1:
                x = x.reshape(*shape[:k], times, -1, *shape[k + 1 :])
            inner = k + (times != 1)
            ends = np.cumsum(axis.blocks)[:-1] * (x.shape[inner] // sum(axis.blocks))
            over = (k, inner) if axis.interleaved else inner
            parts = [
                jnp.broadcast_to(reduce(part, over, keepdims=True, initial=0), part.shape)
                for part in jnp.split(x, ends, axis=inner)
            ]
            x = jnp.concatenate(parts, axis=inner).reshape(shape)
    return x


def _shards(who: str, match: Any, path: str, shape: tuple[int, ...], form: Axes | None) -> tuple[str, ...]:
    """Inside `jax.shard_map`, the mesh axes that divide the matrices of a leaf."""
    spec, _ = shards_of(who, match, path, shape)
    if not spec:
        return ()
    letters = ["o"] * len(spec) if form is None else [axis.letter for axis in form.parts]
    if form is not None and any(
        names and not axis.whole for names, axis in zip(spec, form.parts, strict=True)
    ):
        raise ValueError(
            f"{who}: inside jax.shard_map the blocks of {path!r} are divided. Type axes without blocks."
        )
    return tuple(name for names, letter in zip(spec, letters, strict=True) if letter != "b" for name in names)
