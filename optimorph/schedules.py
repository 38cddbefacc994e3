"""Schedules that optax does not have: step sizes, factors and decays as functions of the step count."""

import math

import jax.numpy as jnp

from optimorph._core.checks import check_integer, checked
from optimorph._core.numbers import as_scalar
from optimorph._core.types import Numeric, Schedule


@checked
def robbins_monro(initial_value: Numeric, exponent: Numeric = 1.0, offset: Numeric = 1.0) -> Schedule:
    """Step sizes with an infinite sum, so that any distance can be covered, and a finite sum of squares.

        a(t) = a₀ / (1 + t / c)^p        (1)
        Σ a(t) = ∞,  Σ a(t)² < ∞         (2)  for 1/2 < p ≤ 1

    Under (2) stochastic approximation converges to the root of a function that is measured with noise.

    Args:
      initial_value: a₀ above 0, the first step.
      exponent: p in (1/2, 1].
      offset: c above 0, the number of steps after which the step size is a₀ / 2^p.

    Raises:
      ValueError: an argument outside its range, when it is a concrete number.

    References:
      Robbins & Monro 1951, "A stochastic approximation method", section 3.
    """

    def schedule(count):
        t = jnp.asarray(count).astype(float)
        a, p, c = (as_scalar(x, t) for x in (initial_value, exponent, offset))
        return a / (1 + t / c) ** p  # (1)

    return schedule


@checked
def linear_warmup(final_value: Numeric, steps: int) -> Schedule:
    """A number that grows linearly to its final value. In the first step it is 1/T of the final value.

        a(t) = min(1, (t + 1) / T) a        (1)

    Args:
      final_value: a at least 0.
      steps: T, an integer of at least 1. Step T is the first with the final value.

    Raises:
      ValueError: a below 0, when it is a concrete number, or `steps` that is not an integer of at least 1.

    References:
      Pagliardini et al. 2024, "The AdEMAMix optimizer", arXiv:2409.03137, section 3 (of α).
    """
    check_integer("linear_warmup", "steps", steps, 1000)

    def schedule(count):
        t = jnp.asarray(count).astype(float)
        return jnp.minimum(1, (t + 1) / steps) * as_scalar(final_value, t)  # (1)

    return schedule


@checked
def decay_warmup(b1: Numeric, b3: Numeric, steps: int) -> Schedule:
    """A decay that grows from β₁ to β₃ such that the half-life of the average grows linearly.

        f(β) = ln ½ / ln(β + 10⁻⁸) - 1                 (1)
        s = (t + 1) / T                                (2)
        β(t) = f⁻¹((1 - s) f(β₁) + s f(β₃))            (3)  s < 1
        β(t) = β₃                                      (4)  otherwise

    Args:
      b1: β₁ in [0, 1).
      b3: β₃ in [0, 1).
      steps: T, an integer of at least 1.

    Raises:
      ValueError: an argument outside its range, when it is a concrete number.

    References:
      Pagliardini et al. 2024, "The AdEMAMix optimizer", arXiv:2409.03137, appendix A.1, and its published
      program, which has the 10⁻⁸: a β of 0 has a half-life too.
    """
    check_integer("decay_warmup", "steps", steps, 1000)

    def schedule(count):
        t = jnp.asarray(count).astype(float)

        def half_life(beta):  # (1), but for the -1, which (3) takes back
            log = math.log if isinstance(beta, int | float) else jnp.log
            return math.log(0.5) / log(as_scalar(beta, t) + 1e-8)

        share = (t + 1) / steps  # (2)
        between = 0.5 ** (1 / ((1 - share) * half_life(b1) + share * half_life(b3)))  # (3)
        return jnp.where(share < 1, between, as_scalar(b3, t))  # (4)

    return schedule


__all__ = ["decay_warmup", "linear_warmup", "robbins_monro"]
__dir__ = __all__.copy  # dir() shows the public names alone
