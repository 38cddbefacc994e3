"""Step sizes as functions of the step count, beside those that optax has."""

import jax.numpy as jnp

from optimorph._core.checks import checked
from optimorph._core.types import Numeric, Schedule


@checked
def robbins_monro(initial_value: Numeric, exponent: Numeric = 1.0, offset: Numeric = 1.0) -> Schedule:
    """Steps that sum to infinity, so that any distance can be covered, while their squares do not.

        a(t) = a₀ / (1 + t / c)^p        (1)
        Σ a(t) = ∞,  Σ a(t)² < ∞         (2)  for 1/2 < p ≤ 1

    Under (2) stochastic approximation finds the root of a function that is seen only through noise.

    Args:
      initial_value: a₀ above 0, the first step.
      exponent: p in (1/2, 1].
      offset: c above 0, in steps: how long the first step lasts before the decay sets in.

    Raises:
      ValueError: an argument outside its range, when it is a concrete number.

    References:
      Robbins & Monro 1951, "A stochastic approximation method", section 3.
    """

    def schedule(count):
        t = jnp.asarray(count).astype(float)
        return initial_value / (1 + t / offset) ** exponent  # (1)

    return schedule


__all__ = ["robbins_monro"]
