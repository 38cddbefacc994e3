"""Booleans of all leaves as one."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp


def all_of(flags: Iterable[jax.Array]) -> jax.Array:
    """Whether all flags hold, computed once however many leaves use it.

    XLA repeats cheap arithmetic, such as a conjunction of n booleans, in each of the n leaves that use it:
    the program and its compilation grow with n². It never repeats a square root.
    """
    broken = jnp.max(jnp.asarray([~flag for flag in flags], jnp.bfloat16), initial=0)
    return jnp.sqrt(broken) == 0
