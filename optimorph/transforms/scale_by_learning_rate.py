"""The step size, and the only change of sign."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimorph.core.checks import check_numbers
from optimorph.core.count import increment
from optimorph.core.tree import cast_like, map_updates, number, wide
from optimorph.core.types import ScalarOrSchedule


class LearningRateState(NamedTuple):
    """How many updates a learning rate schedule has seen."""

    count: jax.Array


def scale_by_learning_rate(learning_rate: ScalarOrSchedule) -> optax.GradientTransformation:
    """Turn a direction of ascent into a step of descent.

        u = -η g        (1)

    Args:
      learning_rate: η, at least 0, a number, an array, a tracer, or a schedule, which is called with the
        number of updates before this one.

    Raises:
      ValueError: η negative, when it is a concrete number.

    Equals:
      optax.scale_by_learning_rate(learning_rate)
    References:
      Cauchy 1847, "Méthode générale pour la résolution des systèmes d'équations simultanées".
    """
    check_numbers("scale_by_learning_rate", learning_rate=learning_rate)
    scheduled = callable(learning_rate)

    def init(params):
        return LearningRateState(jnp.zeros([], jnp.int32)) if scheduled else optax.EmptyState()

    def update(updates, state, params=None):
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def step(g):
            x = wide(g)
            return cast_like(-number(rate, x) * x, g)  # (1)

        if scheduled:
            state = LearningRateState(increment(state.count))
        return map_updates("scale_by_learning_rate", step, updates), state

    return optax.GradientTransformation(init, update)
