"""One step for several gradients."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optimorph._core.checks import check_dtypes, check_integer, check_numbers, check_schedule
from optimorph._core.differences import TreeError, checked_state, other_state
from optimorph._core.flags import all_of, cond, real_dtype
from optimorph._core.moments import nodes_with
from optimorph._core.numbers import (
    NotScalarError,
    as_made,
    as_scalar,
    as_schedule,
    as_stored,
    cast_like,
    common,
    full_like,
    in_dtype_of,
    increment,
    is_absent,
    is_array,
    is_trainable,
    traced,
    types_of,
    upcast,
    varying_over,
    with_type_of,
)
from optimorph._core.roles import Role, holds, scalar
from optimorph._core.rule import Leaves, aligned, arrays, map_updates
from optimorph._core.shown import shown
from optimorph._core.types import DTypeLike, Mask, PyTree
from optimorph._core.wrapped import wrapped
from optimorph._routing.rules import check_mask, masked_leaves


class MultiStepsState(NamedTuple):
    """The inner state, the mean of the gradients so far, their number and weight, and the steps taken."""

    inner: Any
    mean: PyTree
    window_count: jax.Array
    weight: jax.Array
    steps: jax.Array
    roles = holds(
        mean=Role("mean of multi_steps", tree=True),
        window_count=scalar("gradients in the window of multi_steps"),
        weight=scalar("weight of the window of multi_steps"),
        steps=scalar("steps of multi_steps"),
    )


def multi_steps(
    inner: optax.GradientTransformation,
    every_k: int | Callable[[Any], Any],
    *,
    maximum: Mask | None = None,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Take one step for the mean of k gradients. Between two steps the updates are zero.

        n ← n + 1,  W ← W + w,  ḡ ← ḡ + (w / W) (g - ḡ)    (1)
        u, s ← inner(ḡ, s)  and  n, W, ḡ ← 0, 0, 0         (2)  if W > 0, and n ≥ k or `flush`
        u ← 0                                              (3)  otherwise

    The gradients since the last step are called the window. `update` takes two more arguments:

        updates, state = tx.update(gradients, state, params, weight=tokens, flush=last)

    `weight` is w, a number of at least 0. The default is 1. If the loss is a mean over tokens, pass the
    number of tokens: ḡ is then the gradient of the mean over all tokens of the k microbatches. A gradient of
    weight 0 adds 1 to n and is not used otherwise. If a traced weight is negative or not finite, its gradient
    is left out. Inside `jax.shard_map`, pass the mean gradient and the sum of the weights of all devices.

    `flush` takes the step at once, for the last microbatch of an epoch. If there is no further gradient, pass
    any gradient with weight 0. A window without a gradient takes no step.

    Without these arguments the updates are those of `optax.MultiSteps`, with these differences:

    - `inner` runs only when a step is taken. It gets the mean in float32 or wider.
    - With k = 1 there is no buffer, and the state is that of `inner`.
    - A gradient with a NaN or an infinity is left out, and the window waits for another gradient. With k = 1
      such a gradient reaches `inner`. `skip_nonfinite` around `multi_steps` works for every k, and counts the
      gradients that are left out. Inside `jax.shard_map`, if one device leaves out a gradient, all do.
    - A state inside may have a method `observe(sound, **extra)`. It gets the extra arguments of the gradients
      between two steps. `clip_attention_logits` keeps the largest logits this way.

    A step passes the extra arguments of its own call to `inner`, even if the weight of that call is 0. To
    flush, pass those of the last batch. States with a method `observe` also get `sound`, whether the gradient
    is used.

    A leaf whose gradient is None has a gradient of zeros, so some of the k gradients may lack a leaf. If the
    mean of a leaf is exactly zero and its last gradient was None, its update is zero, even if `inner` returns
    another update, such as weight decay. If this holds for every leaf that the last gradient lacks, `inner`
    gets None for these leaves, so transformations of this library keep their moments. Otherwise `inner` gets
    zeros. A transformation of optax that cannot process None gets zeros too. Leaves that are None in the
    parameters, or integers, stay None.

    Args:
      inner: any transformation.
      every_k: k, an integer of at least 1, or a function from the number of steps taken to such an integer.
        In a compiled program a k below 1 has the effect of 1.
      maximum: the leaves for which `inner` gets the elementwise maximum of the gradients instead of the mean,
        as a mask of `add_decayed_weights`. The magnitudes that scale FP8 numbers are such leaves:
        `{"*amax*": True, "*": False}`. A gradient of weight 0 is left out of the maximum; other weights have
        no effect on it.
      accumulator_dtype: the dtype of the stored mean. The default is float32, or the parameter's dtype if
        that is wider. In bfloat16 the mean takes half the bytes, and changes below 1/512 of it are lost.

    Raises:
      ValueError: `every_k` that is not an integer of at least 1; at `update`, a weight that is negative or
        not a number, a `flush` that is not a boolean, or a function that does not return an integer.

    Equals:
      optax.MultiSteps(inner, every_k)
    References:
      (1) Welford 1962, "Note on a method for calculating corrected sums of squares and products"; with
      weights: West 1979, "Updating mean and variance estimates: an improved method".
    """
    who = "multi_steps"
    if callable(every_k):
        check_schedule(who, "every_k", every_k)
    else:
        check_integer(who, "every_k", every_k, 4, below=2**31)
    check_dtypes(who, accumulator_dtype=accumulator_dtype)
    if not callable(every_k) and every_k == 1:
        return _of_one(who, wrapped(who, inner), maximum)
    inner = wrapped(who, inner, wide=True)
    k_at = as_schedule(every_k)
    by_maximum = False if maximum is None else maximum

    def init(params):
        leaves = arrays(who, params)
        check_mask(who, maximum, leaves, "maximum")
        mean, weight = _zeros(leaves, accumulator_dtype), jnp.zeros([], real_dtype(params))
        count, steps = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        k_now(steps)
        return MultiStepsState(inner.init(params), mean, count, weight, steps)

    def k_now(steps):
        try:
            k = k_at(steps)
        except NotScalarError as error:
            raise ValueError(f"{who}: every_k: {error}") from error
        if not jnp.issubdtype(jnp.result_type(k), jnp.integer):
            raise ValueError(
                f"{who}: every_k must return an integer, but returned {jnp.result_type(k)}. Type "
                "lambda steps: jnp.round(schedule(steps)).astype(int)."
            )
        if not isinstance(k, Tracer) and k < 1:
            raise ValueError(f"{who}: every_k must return an integer of at least 1, but returned {k}.")
        return jnp.asarray(k).astype(jnp.int32)

    def update(updates, state, params=None, *, weight=1.0, flush=False, **extra):
        state = as_made(init, checked_state(who, state, MultiStepsState), params)
        _check_arguments(who, weight, flush)
        try:
            gs, tree, means = aligned(who, updates, state.mean)
        except TreeError as error:
            if params is not None:
                aligned(who, updates, params)  # if these match, the state does not
                raise other_state(who) from error
            raise
        largest = masked_leaves(who, by_maximum, Leaves(tree, means), "maximum")
        lacking = [g is None and is_array(m) for g, m in zip(gs, means, strict=True)]
        pairs = zip(gs, means, lacking, largest, strict=True)
        gs = [(jnp.asarray(m) if top else jnp.zeros_like(m)) if none else g for g, m, none, top in pairs]
        updates, missing = tree.unflatten(gs), tree.unflatten(lacking)

        weight, before = jnp.asarray(weight, jnp.result_type(state.weight)), jnp.asarray(state.weight)
        fit = (weight > 0) & jnp.isfinite(weight)
        sound = _on_all_devices((_all_finite(updates) & fit) | (weight == 0))
        added = sound & fit
        total = jnp.where(added, before + weight, before)
        share = weight / jnp.where(added, total, 1)

        def add(g, mean, top):
            g, m = common(upcast(g), mean)
            g = with_type_of(g, m)
            w = as_scalar(share, m)
            new = jnp.where(before == 0, g, jnp.maximum(g, m)) if top else m + (w * g - w * m)  # (1)
            return jnp.where(added, new, m)

        mean = map_updates(who, add, updates, state.mean, tree.unflatten(largest))
        count = jnp.asarray(state.window_count) + sound.astype(jnp.int32)
        due = (total > 0) & ((count >= k_now(jnp.asarray(state.steps))) | jnp.asarray(flush, bool))
        due = _on_all_devices(due)

        def take(absent, **extra):
            """The step, in which `inner` gets None for leaves that the window lacks, if they are `absent`."""

            def given(g, m, none):
                return None if none and absent else with_type_of(m.astype(upcast(g).dtype), g)

            def narrow(g, u, m, none):
                if none:
                    u = jnp.zeros_like(m) if u is None else jnp.where(jnp.any(m != 0), u, jnp.zeros_like(u))
                return with_type_of(cast_like(u, g), g)

            means = map_updates(who, given, updates, mean, missing)
            out, after = inner.update(means, state.inner, params, **extra)
            out = map_updates(who, narrow, updates, out, mean, missing)
            return out, jax.tree.map(with_type_of, after, state.inner)

        def step():
            told = extra | ({"sound": added} if nodes_with(state.inner, "observe") else {})
            with_zeros, without = (functools.partial(take, absent, **told) for absent in (False, True))
            if not any(lacking) or traced(without) is None:
                return with_zeros()
            rest = map_updates(who, lambda _, m, none: m if none else None, updates, mean, missing)
            unseen = all_of([~jnp.any(m != 0) for m in jax.tree.leaves(rest)], real_dtype(rest))
            return cond(_on_all_devices(unseen), without, with_zeros)

        wait = functools.partial(_waited, who, step, updates, state.inner, added, extra)
        out, after = cond(due, step, wait)  # (2), (3)
        kept = jax.tree.map(lambda m: as_stored(jnp.where(due, 0, m), accumulator_dtype), mean)
        count, weight = jnp.where(due, 0, count), jnp.where(due, 0, total)
        steps = jnp.where(due, increment(state.steps), state.steps)
        return out, MultiStepsState(after, kept, count, weight, steps)

    return optax.GradientTransformationExtraArgs(init, update)


def _of_one(
    who: str, inner: optax.GradientTransformationExtraArgs, maximum: Mask | None
) -> optax.GradientTransformationExtraArgs:
    """k = 1: `inner` itself, which does not see gradients of weight 0."""

    def init(params):
        check_mask(who, maximum, arrays(who, params), "maximum")
        return inner.init(params)

    def update(updates, state, params=None, *, weight=1.0, flush=False, **extra):
        _check_arguments(who, weight, flush)

        def step():
            out, after = inner.update(updates, state, params, **extra)
            return out, jax.tree.map(with_type_of, after, state)

        if not isinstance(weight, Tracer) and weight > 0:
            return inner.update(updates, state, params, **extra)
        fit = _on_all_devices((weight > 0) & jnp.isfinite(weight))
        return cond(fit, step, functools.partial(_waited, who, step, updates, state, fit, extra))

    return optax.GradientTransformationExtraArgs(init, update)


def _check_arguments(who: str, weight: Any, flush: Any) -> None:
    check_numbers(who, weight=weight)
    if not (is_array(flush) and jnp.issubdtype(jnp.result_type(flush), jnp.bool_) and not np.ndim(flush)):
        raise ValueError(f"{who}: flush must be one boolean, but is {shown(flush)}. Type flush=True.")


def _waited(who: str, step: Any, updates: PyTree, state: PyTree, sound: Any, extra: dict[str, Any]) -> Any:
    """(3), in the types of a step; the inner state is the old one, but for what it observes."""
    shapes, after = types_of(step)
    nothing = map_updates(
        who, lambda g, u: with_type_of(jnp.zeros_like(g, dtype=u.dtype), u), updates, shapes
    )
    return nothing, jax.tree.map(in_dtype_of, _observed(state, sound, extra), after)


def _observes(node: Any) -> bool:
    return hasattr(node, "observe")


def _observed(state: Any, sound: jax.Array, extra: dict[str, Any]) -> Any:
    """The inner state, after every state in it that has a method `observe` has seen the extra arguments."""

    def seen(node: Any) -> Any:
        return node.observe(sound, **extra) if _observes(node) else node

    return jax.tree.map(seen, state, is_leaf=_observes)


def _zeros(leaves: Leaves, dtype: DTypeLike | None) -> PyTree:
    return leaves.structure.unflatten(
        full_like(w, 0.0, dtype) if is_trainable(w) else (w if is_absent(w) else None) for w in leaves.values
    )


def _all_finite(tree: PyTree) -> jax.Array:
    return all_of([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)], real_dtype(tree))


def _on_all_devices(so: jax.Array) -> jax.Array:
    """Whether it is so on all devices. This differs from `so` only inside `jax.shard_map`."""
    axes = jax.sharding.get_abstract_mesh().manual_axes  # with those of one device, over which types vary too
    return jax.lax.pmin(varying_over(so.astype(jnp.int32), axes), axes) == 1 if axes else so
