"""Booleans: all of them as one, and what happens if one holds."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from optimorph._core.numbers import is_trainable, types_of, upcast_dtype, varying
from optimorph._core.types import DTypeLike, PyTree


def all_of(flags: Iterable[jax.Array], dtype: DTypeLike) -> jax.Array:
    """Whether all flags hold, computed once however many leaves use it.

    XLA repeats cheap arithmetic, such as a conjunction of n booleans, in each of the n leaves that use it:
    the program and its compilation grow with n². It never repeats a square root. The dtype of the root should
    be one that the program uses anyway.
    """
    broken = jnp.max(jnp.asarray([~flag for flag in flags], dtype), initial=0)
    return jnp.sqrt(broken) == 0


def cond(so: jax.Array, true: Callable[[], Any], false: Callable[[], Any]) -> Any:
    """`jax.lax.cond` of branches whose results may vary over other axes, inside `jax.shard_map`."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return jax.lax.cond(so, true, false)
    kinds = types_of(true), types_of(false)
    both = (lambda branch=branch: jax.tree.map(varying, branch(), *kinds) for branch in (true, false))
    return jax.lax.cond(so, *both)


def real_dtype(tree: PyTree) -> DTypeLike:
    """The real dtype of arithmetic on a tree: that of its first leaf of real or complex numbers."""
    dtypes = (upcast_dtype(jnp.result_type(x)) for x in jax.tree.leaves(tree) if is_trainable(x))
    return jnp.finfo(next(dtypes, jnp.float32)).dtype
