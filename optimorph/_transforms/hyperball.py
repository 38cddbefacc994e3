"""The step on a sphere: weights keep their norm."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimorph._core.checks import check_numbers, check_params
from optimorph._core.numbers import as_scalar, upcast
from optimorph._core.roles import roles_of
from optimorph._core.rule import Rule, called, rule_of, transform
from optimorph._core.types import AxesRules, Rules, ScalarOrSchedule
from optimorph._distributed.reductions import Reduction, reduction
from optimorph._routing.resolve import AxesOfLeaves
from optimorph._transforms.step import LearningRateState, scale_by_learning_rate


def hyperball(
    learning_rate: ScalarOrSchedule, axes: AxesRules | None = None, shardings: Rules | None = None
) -> optax.GradientTransformationExtraArgs:
    """Turn a direction of ascent into a step that keeps the norm of every matrix; the end of a chain.

        x = w - η ‖w‖ u / ‖u‖          (1)
        w ← ‖w‖ x / ‖x‖                (2)

    `hyperball` replaces the learning rate and the weight decay. The scale of u has no effect. If u is
    orthogonal to w, a small η is the angle of the step. ‖·‖ is the Frobenius norm of each matrix, in float32
    or wider; a leaf that is not a matrix has one norm. Weights and updates may be as small as 1e-30 and as
    large as 1e30. Over a mesh this takes all-reduces of six numbers for each matrix, or at most for each row
    or column of a fused kernel.

    A matrix of zeros takes the step -η u, and keeps its new norm from then on. A matrix whose u is zero does
    not change. A scalar parameter can only keep its absolute value, so it does not train. η should be far
    below 1: if ‖x‖ is nearly 0, rounding decides the norm.

    With `apply_updates(key=)` every bfloat16 weight is right on average, but the norm grows by the rounding
    noise, by about 0.3 % in 1,000 steps. The float32 weights of `split_weights` keep their norm.

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
    who = called("hyperball")
    check_numbers(who, learning_rate=learning_rate)
    steps: Any = rule_of(scale_by_learning_rate(learning_rate))
    own = AxesOfLeaves(who, axes, shardings)

    def begin(leaves):
        own.check(leaves)
        return steps.begin(leaves)

    def advance(state, leaves):
        rate, after = steps.advance(state, leaves)
        return (rate, *own.axes_and_shardings(leaves)), after

    def update(u, state, leaf, now):
        rate, forms, match = now
        check_params(who, leaf.weight, "it keeps the norms of the parameters")
        over, w = reduction(who, match, leaf, forms[leaf.index]), upcast(leaf.weight).astype(u.dtype)
        factors = _on_sphere(as_scalar(rate, u).real, *_norms(over, w, u))
        of_w, of_unit, length = (over.spread(x, u.shape).astype(u.dtype) for x in factors)
        return of_w * w - of_unit * (u / length), state  # (1), (2)

    return transform(who, Rule(roles_of(LearningRateState), update, begin=begin, advance=advance))


def _norms(over: Reduction, w: jax.Array, u: jax.Array) -> list[jax.Array]:
    """‖w‖, ‖u‖ and the cosine of the angle between them; 0 of zeros.

    Each product is summed twice, with both factors multiplied by 2⁴⁸ and by 2⁻⁴⁸. One of the two sums is in
    range, so no maxima must be known before.
    """
    scales = (jnp.asarray(2.0**48, u.dtype), jnp.asarray(2.0**-48, u.dtype))
    pairs = ((w, w), (u, u), (w, u))
    sums = over.sums(*[((c * a) * (c * b).conj()).real for a, b in pairs for c in scales])
    scales = [c.real for c in scales]
    fits = [jnp.abs(x) < 2.0**124 for x in sums[::2]]
    ww, uu, wu = (jnp.where(fit, *sums[2 * k : 2 * k + 2]) for k, fit in enumerate(fits))
    of_w, of_u, of_both = (jnp.where(fit, *scales) for fit in fits)
    norms = [jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0) / c for x, c in ((ww, of_w), (uu, of_u))]
    lengths = [of_both * jnp.where(x > 0, x, 1) for x in norms]
    return [*norms, wu / lengths[0] / lengths[1]]


def _on_sphere(eta: Any, w: jax.Array, u: jax.Array, cosine: jax.Array) -> tuple[jax.Array, ...]:
    """Of the norms and the cosine: a, b and c of the update a w - b u / c."""
    less = jnp.where(u > 0, 2 * eta * cosine - eta * eta, 0)  # 1 - ‖x‖² / ‖w‖²
    rest = jnp.where(less < 1, 1 - less, 1)
    ratio = 1 / jnp.sqrt(rest)  # ‖w‖ / ‖x‖
    of_w = less / rest / (ratio + 1)  # ratio - 1, without cancellation
    there = w > 0
    return jnp.where(there, of_w, 0), eta * jnp.where(there, ratio * w, 1), jnp.where(there & (u > 0), u, 1)
