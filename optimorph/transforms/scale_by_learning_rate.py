"""The step size, and the only change of sign."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimorph.core.checks import check_numbers
from optimorph.core.count import as_schedule, increment, reading
from optimorph.core.dtypes import cast_like, wide
from optimorph.core.tree import map_updates, number
from optimorph.core.types import ScalarOrSchedule


class LearningRateState(NamedTuple):
    """How many updates there have been, and the last one's rate (before it, the first one's), to be read."""

    count: jax.Array
    learning_rate: jax.Array


def scale_by_learning_rate(learning_rate: ScalarOrSchedule) -> optax.GradientTransformation:
    """Turn a direction of ascent into a step of descent.

        u = -η g        (1)

    Args:
      learning_rate: η, at least 0, a number, an array, a tracer, or a schedule, which is called with the
        number of updates before this one. What it was is in the state, in float32: `probes.read` shows it.

    Raises:
      ValueError: η negative, when it is a concrete number.

    Equals:
      optax.scale_by_learning_rate(learning_rate)
    References:
      Cauchy 1847, "Méthode générale pour la résolution des systèmes d'équations simultanées".
    """
    check_numbers("scale_by_learning_rate", learning_rate=learning_rate)
    rate_at = as_schedule(learning_rate)

    def init(params):
        count = jnp.zeros([], jnp.int32)
        return LearningRateState(count, reading(rate_at(count)))

    def update(updates, state, params=None):
        rate = rate_at(state.count)

        def step(g):
            x = wide(g)
            return cast_like(-number(rate, x) * x, g)  # (1)

        out = map_updates("scale_by_learning_rate", step, updates)
        return out, LearningRateState(increment(state.count), reading(rate))

    return optax.GradientTransformation(init, update)
