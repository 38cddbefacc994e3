"""The step on a sphere: weights keep their norm."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimorph._core.checks import check_numbers, check_params
from optimorph._core.numbers import as_float32, as_scalar, as_schedule, increment, upcast
from optimorph._core.roles import roles_of
from optimorph._core.rule import Rule, transform
from optimorph._core.types import AxesRules, Rules, ScalarOrSchedule
from optimorph._distributed.reductions import reduction
from optimorph._routing.resolve import AxesOfLeaves
from optimorph._transforms.step import LearningRateState


def hyperball(
    learning_rate: ScalarOrSchedule, axes: AxesRules | None = None, shardings: Rules | None = None
) -> optax.GradientTransformationExtraArgs:
    """Turn a direction of ascent into a step that keeps the norm of every matrix; the end of a chain.

        x = w - η ‖w‖ u / ‖u‖          (1)
        w ← ‖w‖ x / ‖x‖                (2)

    It replaces the learning rate and the weight decay. The scale of u has no effect. If u is orthogonal to w,
    a small η is the angle of the step. ‖·‖ is the Frobenius norm of each matrix, in float32 or wider; a leaf
    that is not a matrix has one norm. Over a mesh this takes all-reduces of five numbers for each matrix.

    A matrix of zeros takes the step -η u, and keeps its new norm from then on. A matrix whose u is zero does
    not change. A scalar parameter can only keep its absolute value, so it does not train. η should be far
    below 1: if ‖x‖ is nearly 0, rounding decides the norm. With `apply_updates(key=)` the norm of bfloat16
    weights is kept on average.

    Args:
      learning_rate: η, at least 0, a number, an array, a tracer or a schedule. The last value is in the
        state.
      axes: how leaves read as matrices, as in `muon`. Inside `route_matrices` its `axes` are used.
      shardings: the shardings of the leaves, needed inside `jax.shard_map`, as in `muon`.

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
        over, w = reduction(who, match, leaf, forms[leaf.index]), upcast(leaf.weight).astype(u.dtype)
        sizes = over.maxima(*[jax.lax.stop_gradient(jnp.abs(x)) for x in (w, u)])
        sizes = [over.spread(size, u.shape) for size in sizes]
        scales = [jnp.where(size > 0, size, 1).astype(u.dtype) for size in sizes]
        x, y = w / scales[0], u / scales[1]  # whose squares are numbers
        sums = over.sums(*[(a * b.conj()).real for a, b in ((x, x), (x, y), (y, y))])
        sums = [over.spread(x, u.shape) for x in sums]
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
