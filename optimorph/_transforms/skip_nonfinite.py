"""Steps that went wrong, left out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._core.checks import abbreviated, check_integer
from optimorph._core.differences import checked_state
from optimorph._core.flags import all_of, real_dtype
from optimorph._core.numbers import as_made, in_dtype_of, increment, is_missing, is_trainable, with_type_of
from optimorph._core.paths import leaf_paths
from optimorph._core.roles import holds, scalar
from optimorph._core.wrapped import wrapped


class SkipState(NamedTuple):
    """The inner state, the number of skipped steps, and how many of them were the latest steps in a row."""

    inner: Any
    skipped: jax.Array
    consecutive: jax.Array
    roles = holds(
        skipped=scalar("skipped steps", "skipped"),
        consecutive=scalar("consecutive skipped steps", "consecutive_skips"),
    )


def skip_nonfinite(
    inner: optax.GradientTransformation, max_consecutive: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Skip every step in which a gradient, an update or the new state is NaN or infinite.

        u, s' = inner(g, s)
        u, s ← u, s'        (1)  if g and u are finite, and s' is finite wherever s is
        u, s ← 0, s         (2)  otherwise

    A skipped step changes no weight, no moment and no count of `inner`, so schedules do not advance. u and s'
    are checked too, because finite gradients may lead to infinite moments: the square of 1e25 is infinite in
    float32. Numbers that are already infinite in s, such as a best loss so far, are not checked. Put
    `skip_nonfinite` around the whole optimizer: a weight decay outside of it would not be skipped.

    One boolean decides for all leaves. Over a mesh it takes one all-reduce for all leaves that are sharded
    over the same axes. Under `jax.vmap` each run has its own boolean. Inside `jax.shard_map` each device sees
    only its own shards, so one device may skip a step that others take. The state is chosen by a select
    instead of a branch, because the compiler can fuse a select with the arithmetic before it.

    Args:
      inner: any transformation.
      max_consecutive: how many steps in a row may be skipped, at least 0. One more raises an error on the
        host, and the results of that step are lost. With None, the default, there is no limit. A limit needs
        a callback in the program. A program with a callback is not stored in the persistent compilation cache
        and cannot be exported.

    Raises:
      ValueError: `max_consecutive` that is not an integer of at least 0.
      jax.errors.JaxRuntimeError: more than `max_consecutive` steps skipped in a row; it names the leaves.

    References:
      Micikevicius et al. 2018, "Mixed precision training", arXiv:1710.03740, section 3.2.
    """
    inner = wrapped("skip_nonfinite", inner)
    if max_consecutive is not None:
        check_integer("skip_nonfinite", "max_consecutive", max_consecutive, 10, least=0, below=2**31)

    def init(params):
        return SkipState(inner.init(params), jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra):
        state = as_made(init, checked_state("skip_nonfinite", state, SkipState), params)
        out, after = inner.update(updates, state.inner, params, **extra)
        found = [*_sound("the gradient of", updates), *_sound("the update of", out)]
        found += _sound("the state's", after, jax.tree.leaves(state.inner))
        names, sound = [name for name, _ in found], [ok for _, ok in found]
        fine = all_of(sound, real_dtype(updates))
        skipped = jnp.where(fine, state.skipped, increment(state.skipped))
        consecutive = jnp.where(fine, 0, increment(state.consecutive))
        if max_consecutive is not None:
            report = _reporter(names, max_consecutive)
            jax.lax.cond(
                consecutive > max_consecutive,
                lambda: jax.debug.callback(report, consecutive, sound),
                lambda: None,
            )

        def chosen(new, old):
            return jax.lax.select(fine, new, in_dtype_of(old, new))

        def or_zero(u):
            return None if is_missing(u) else chosen(jnp.asarray(u), with_type_of(jnp.zeros_like(u), u))

        out = jax.tree.map(or_zero, out)  # (1), (2)
        after = jax.tree.map(chosen, after, state.inner)
        return out, SkipState(after, skipped, consecutive)

    return optax.GradientTransformationExtraArgs(init, update)


def _sound(what: str, tree: Any, before: list | None = None) -> list[tuple[str, jax.Array]]:
    """The name of every leaf of real or complex numbers, and whether all are finite, or were not `before`."""
    leaves, found = jax.tree.leaves(tree), []
    for path, new, old in zip(leaf_paths(tree), leaves, before or [None] * len(leaves), strict=True):
        if is_trainable(new):
            fine = jnp.isfinite(new) if old is None else jnp.isfinite(new) | ~jnp.isfinite(old)
            found.append((f"{what} {path!r}", jnp.all(fine)))
    return found


def _reporter(names: list[str], limit: int) -> Callable[[Any, Any], None]:
    def report(consecutive: Any, flags: Any) -> None:
        count = int(np.asarray(consecutive))
        if count <= limit:  # under vmap the host is called for every run
            return
        wrong = [name for name, ok in zip(names, np.asarray(flags), strict=True) if not ok]
        kinds = [kind for kind in ("the gradient", "the update", "the state") if wrong[0].startswith(kind)]
        wrong = [name for name in wrong if name.startswith(kinds[0])]  # all else follows from these
        raise FloatingPointError(
            f"skip_nonfinite: step {count} in a row was skipped, and max_consecutive is {limit}. Not "
            f"finite in it: {abbreviated(wrong, ', ')}. Lower the learning rate or clip the gradients, or "
            "type max_consecutive=None to skip any number of steps."
        )

    return report
