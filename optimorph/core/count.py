"""Counting steps, and numbers that depend on the count."""

import jax
import jax.numpy as jnp
import optax

from optimorph.core.types import Numeric, ScalarOrSchedule, Schedule


def increment(count: jax.Array) -> jax.Array:
    """One step more; the largest integer stays where it is."""
    return jnp.asarray(optax.safe_increment(count))


def as_schedule(value: ScalarOrSchedule) -> Schedule:
    """A function of the count, also of a number that does not change.

    In x64 mode the count is given as int64, whose quotients are float64: those of int32 are float32.
    """
    return (lambda count: value(count.astype(int))) if callable(value) else lambda count: value


def reading(value: Numeric) -> jax.Array:
    """A number as states keep it for people to read, in float32."""
    return jnp.asarray(value, jnp.float32)
