"""Means over the sides of matrices, and norms that are kept."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._core.checks import check_function, is_one_of
from optimorph._core.differences import other_state
from optimorph._core.numbers import evaluated, full_like, is_absent, upcast, with_type_of
from optimorph._core.roles import holds, relabeled
from optimorph._core.rule import Leaf, Rule, arrays, called, map_updates, pointwise, rule_of, transform
from optimorph._core.shown import shown
from optimorph._core.types import AxesRules, Rules
from optimorph._core.wrapped import wrapped
from optimorph._distributed.reductions import reduction
from optimorph._distributed.shardings import Match, Spec, local_shard, local_shard_spec
from optimorph._routing.resolve import AxesOfLeaves
from optimorph.linalg import Axes


class MeanState(NamedTuple):
    """The inner state. Its arrays have one number for each mean; leaves without means have None."""

    inner: Any
    averages = holds(inner="")


def mean(
    over: str,
    inner: optax.GradientTransformation | None = None,
    axes: AxesRules | None = None,
    shardings: Rules | None = None,
    *,
    where: Callable[[int, int], bool] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replace every number by the mean over its row, its column, or its matrix.

        u_io = inner(1/|I| Σ_i g_io)        (1)  "i": one mean for each output
        u_io = inner(1/|O| Σ_o g_io)        (2)  "o": one mean for each input
        u_io = inner(1/|I O| Σ_io g_io)     (3)  "io": one mean for each matrix

        chain(square(), mean("i", ema(0.95)), root())       # a second moment for each output

    `inner` gets one number for each mean, so its state is small. Each matrix of a stack and each block of a
    fused kernel has its own means. A leaf that is not a matrix has one mean. Over a mesh the means are those
    of whole matrices; this takes all-reduces of one number for each mean.

    Args:
      over: the sides of matrices, "i" (inputs), "o" (outputs) or "io".
      inner: a transformation of the means, leaf by leaf. By default the means are returned.
      axes: how leaves read as matrices, as in `muon`. Inside `route_matrices` its `axes` are used.
      shardings: the shardings of the leaves, needed inside `jax.shard_map`, as in `muon`.
      where: a function (inputs, outputs) → whether to compute the means of matrices of this size; the others
        become 0. A leaf of n numbers that is not a matrix has n inputs and one output. By default all
        matrices have means.

    Raises:
      ValueError: another `over`; an `inner` that does not work leaf by leaf; at `init`, a spec that does not
        fit its leaf; inside `compress_state`, which may only be put around other transforms of the chain.

    References:
      Shazeer & Stern 2018, "Adafactor", arXiv:1804.04235; Li et al. 2025, "NorMuon", arXiv:2510.05491.
    """
    who = called("mean")
    rule = pointwise(lambda g: g) if inner is None else rule_of(inner)
    if where is not None:
        check_function(who, "where", where, "the numbers of inputs and outputs", 1, 1)
        where = functools.partial(evaluated, where)
    if not is_one_of(over, ("i", "o", "io")):
        raise ValueError(f"{who}: over must be 'i', 'o' or 'io', but is {shown(over)}. Type mean('i').")
    if rule is None:
        raise ValueError(
            f"{who}: inner must be a transform of this library that works leaf by leaf, but is "
            f"{shown(inner)}. Type mean('i', ema(0.95)), for example."
        )
    own = AxesOfLeaves(who, axes, shardings)

    def begin(leaves):
        own.check(leaves)
        return MeanState(rule.filled(rule.begin(leaves)))

    def init(leaf):
        form, match = own.of(leaf)
        if not np.any(_chosen(who, where, form, match, leaf)[0]):
            return None
        over_leaf = reduction(who, match, leaf, form, over)
        w = over_leaf.mean(full_like(leaf.weight))  # of zeros: it has the shape and the sharding of a mean
        return MeanState(rule.filled(rule.init(leaf._replace(weight=w))))

    def advance(shared, leaves):
        now, inner = rule.advance(shared.inner, leaves)
        return (now, *own.axes_and_shardings(leaves)), MeanState(rule.filled(inner))

    def update(g, state, leaf, now):
        now, forms, match = now
        form = forms[leaf.index]
        chosen, spec = _chosen(who, where, form, match, leaf)
        if not np.any(chosen):
            return jnp.zeros_like(g), state
        over_leaf = reduction(who, match, leaf, form, over)
        m = over_leaf.mean(g)
        moments = zip(rule.roles, rule.slots(state.inner), strict=True)
        if any(role.tree and role.shaped and np.shape(x) != m.shape for role, x in moments):
            raise other_state(who)
        u, inner = rule.update(m, state.inner, leaf._replace(weight=None), now)  # (1-3)
        u = with_type_of(jnp.broadcast_to(over_leaf.spread(u, g.shape), g.shape), g)
        u = u if np.all(chosen) else jnp.where(local_shard(chosen, spec), u, 0)
        return u, MeanState(rule.filled(inner))

    roles = relabeled(MeanState(rule.state))
    return transform(who, Rule(_of_other_shape(roles), update, init, begin, advance))


def keep_norm(
    inner: optax.GradientTransformation, axes: AxesRules | None = None, shardings: Rules | None = None
) -> optax.GradientTransformationExtraArgs:
    """Apply a transformation and then restore the norm of every matrix.

        u = ‖g‖ / ‖inner(g)‖ inner(g)        (1)

    ‖·‖ is the Frobenius norm of each matrix, in float32 or wider; the sum of squares must not overflow. A
    leaf that is not a matrix has one norm. A matrix of zeros does not change. Over a mesh this takes
    all-reduces of two numbers for each matrix.

    Args:
      inner: any transformation.
      axes: how leaves read as matrices, as in `muon`. Inside `route_matrices` its `axes` are used.
      shardings: the shardings of the leaves, needed inside `jax.shard_map`, as in `muon`.

    Raises:
      ValueError: at `init`, a spec that does not fit its leaf, or a leaf that no rule decides.

    References:
      Li et al. 2025, "NorMuon", arXiv:2510.05491, algorithm 1.
    """
    who = called("keep_norm")
    inner, own = wrapped(who, inner, wide=True), AxesOfLeaves(who, axes, shardings)

    def init(params):
        own.check(arrays(who, params))
        return inner.init(params)

    def update(updates, state, params=None, **extra):
        out, state = inner.update(map_updates(who, upcast, updates), state, params, **extra)
        us = jax.tree.structure(updates, is_leaf=is_absent).flatten_up_to(out)

        def rescaled(g, s, leaf, now):
            forms, match = now
            u, over = us[leaf.index], reduction(who, match, leaf, forms[leaf.index])
            sums = over.sums(*[(x * x.conj()).real for x in (g, u)])
            gg, uu = (over.spread(x, g.shape) for x in sums)
            there = (gg > 0) & (uu > 0)
            ratio = jnp.sqrt(jnp.where(there, gg, 1) / jnp.where(there, uu, 1))
            return jnp.where(there, ratio, 0).astype(u.dtype) * u, s  # (1)

        rule = Rule(
            optax.EmptyState(), rescaled, advance=lambda s, leaves: (own.axes_and_shardings(leaves), s)
        )
        out, _ = transform(who, rule).update(updates, optax.EmptyState(), params)
        return out, state

    return optax.GradientTransformationExtraArgs(init, update)


def _chosen(
    who: str, where: Callable[[int, int], bool] | None, form: Axes | None, match: Match | None, leaf: Leaf
) -> tuple[np.ndarray, Spec]:
    """Whether each number's matrix has means, to broadcast against the whole leaf, and how it is divided."""
    spec, shape = local_shard_spec(who, match, leaf.path, np.shape(leaf.leaves.values[leaf.index]))
    if where is None or form is None:
        return np.array(where is None or where(math.prod(shape), 1)), ()
    return form.spread(where, shape), spec


def _of_other_shape(state: Any) -> Any:
    return jax.tree.map(lambda role: dataclasses.replace(role, shaped=False) if role.tree else role, state)
