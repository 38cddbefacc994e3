"""One step for several gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimorph._core.checks import check_dtypes, check_schedule, check_transforms, is_integer
from optimorph._core.differences import checked_state
from optimorph._core.flags import all_of, real_dtype
from optimorph._core.numbers import (
    NotScalarError,
    as_scalar,
    as_schedule,
    cast_like,
    full_like,
    increment,
    is_absent,
    upcast,
    with_type_of,
)
from optimorph._core.roles import Role, holds, scalar
from optimorph._core.rule import aligned, arrays, map_updates
from optimorph._core.types import DTypeLike, PyTree
from optimorph._distributed.shardings import manual_axes


class MultiStepsState(NamedTuple):
    """The inner state, the mean of the gradients so far, how many they are, and the steps taken."""

    inner: Any
    mean: PyTree
    count: jax.Array
    steps: jax.Array
    roles = holds(
        mean=Role("mean of multi_steps", tree=True),
        count=scalar("gradients in the window of multi_steps"),
        steps=scalar("steps of multi_steps"),
    )


def multi_steps(
    inner: optax.GradientTransformation,
    every_k: int | Callable[[Any], Any],
    *,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Give a transformation the mean of every k gradients; between them the updates are zero.

        n ← n + 1,  ḡ ← ḡ + (g - ḡ) / n          (1)
        u, s ← inner(ḡ, s)  and  n, ḡ ← 0, 0      (2)  if n ≥ k
        u ← 0                                     (3)  otherwise

    The numbers are those of `optax.MultiSteps`, and the rest is not. `inner` is computed at every kth
    gradient alone, and sees their mean in float32 or wider, however narrow they are. With k = 1 it is `inner`
    itself, without a buffer for the mean of one. And a gradient with a NaN or an infinity in it is left out
    as if it had never come: the step waits for another in its place. (With k = 1 it reaches `inner`: put
    `skip_nonfinite` around, whatever k is, and what is left out is counted as well.) Inside `jax.shard_map` a
    gradient is left out on all devices if it is so on one: they step together. A leaf may be None in all k
    gradients, or in none. A state inside with a method `observe(sound, **extra)` is handed the extra
    arguments of the gradients between steps: `clip_attention_logits` keeps the largest logits.

    Args:
      inner: any transformation.
      every_k: k, an integer of at least 1, or a function of the number of steps taken to one.
      accumulator_dtype: of the stored mean; float32 or the parameter's own dtype, whichever is wider. In
        bfloat16 it takes half the bytes and forgets what is below 1/512 of it.

    Raises:
      ValueError: `every_k` below 1, or no integer.

    Equals:
      optax.MultiSteps(inner, every_k)
    References:
      (1) Welford 1962, "Note on a method for calculating corrected sums of squares and products".
    """
    check_transforms("multi_steps", inner)
    _check_k(every_k)
    check_dtypes("multi_steps", accumulator_dtype=accumulator_dtype)
    inner = optax.with_extra_args_support(inner)
    if not callable(every_k) and every_k == 1:
        return inner
    k_at = as_schedule(every_k)

    def init(params):
        count, steps = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return MultiStepsState(inner.init(params), _zeros(params, accumulator_dtype), count, steps)

    def k_now(state):
        try:
            return jnp.asarray(k_at(jnp.asarray(state.steps))).astype(jnp.int32)
        except NotScalarError as error:
            raise ValueError(f"multi_steps: every_k: {error}") from error

    def update(updates, state, params=None, **extra):
        state = checked_state("multi_steps", state, MultiStepsState)
        gs, tree, _ = aligned("multi_steps", updates, state.mean)
        updates, count = tree.unflatten(gs), jnp.asarray(state.count) + 1

        def add(g, mean):
            if is_absent(g):
                return mean
            m = upcast(mean)
            n = as_scalar(count, m)
            g = with_type_of(upcast(g).astype(m.dtype), m)
            return m + (g / n - m / n)

        mean = jax.tree.map(add, updates, state.mean, is_leaf=is_absent)  # (1)
        sound = _on_all_devices(_all_finite(updates))
        due = sound & (count >= k_now(state))

        def step():
            g = map_updates(
                "multi_steps", lambda g, m: with_type_of(m.astype(upcast(g).dtype), g), updates, mean
            )
            out, after = inner.update(g, state.inner, params, **extra)
            out = map_updates("multi_steps", lambda g, u: with_type_of(cast_like(u, g), g), updates, out)
            return out, jax.tree.map(with_type_of, after, state.inner)

        def wait():
            shapes, _ = jax.eval_shape(step)
            nothing = map_updates(
                "multi_steps", lambda g, u: jnp.zeros_like(g, dtype=u.dtype), updates, shapes
            )
            return nothing, _observed(state.inner, sound, extra)

        out, after = jax.lax.cond(due, step, wait)  # (2), (3)
        kept = jax.tree.map(
            lambda new, old: cast_like(jnp.where(due, 0, jnp.where(sound, new, upcast(old))), old),
            mean,
            state.mean,
        )
        n = jnp.where(due, 0, jnp.where(sound, count, state.count))
        steps = jnp.where(due, increment(state.steps), state.steps)
        return out, MultiStepsState(after, kept, n, steps)

    return optax.GradientTransformationExtraArgs(init, update)


def _observed(state: Any, sound: jax.Array, extra: dict[str, Any]) -> Any:
    """The inner state, in which states that want to know of gradients between steps do."""

    def observes(node: Any) -> bool:
        return hasattr(node, "observe")

    def seen(node: Any) -> Any:
        return node.observe(sound, **extra) if observes(node) else node

    return jax.tree.map(seen, state, is_leaf=observes)


def _zeros(params: PyTree, dtype: DTypeLike | None) -> PyTree:
    leaves, tree = arrays("multi_steps", params)
    return tree.unflatten(w if is_absent(w) else full_like(w, 0.0, dtype) for w in leaves)


def _all_finite(tree: PyTree) -> jax.Array:
    return all_of([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)], real_dtype(tree))


def _on_all_devices(so: jax.Array) -> jax.Array:
    """Whether it is so everywhere: in one device's own program, of all of them."""
    axes = tuple(manual_axes())
    return jax.lax.pmin(so.astype(jnp.int32), axes) == 1 if axes else so


def _check_k(every_k: Any) -> None:
    if callable(every_k):
        check_schedule("multi_steps", "every_k", every_k)
    elif not is_integer(every_k, 1, 2**31):
        raise ValueError(
            f"multi_steps: every_k must be an integer of at least 1, but is {every_k!r}. Type every_k=4, for "
            "example."
        )
