"""Step sizes and momenta from the theory of quadratic losses, and how fast they converge.

The eigenvalues of the Hessian are in [μ, L], and R = L/μ is its condition number. After k steps the error is
about ρᵏ times the first error, so it takes 1 / ln(1/ρ) steps to divide the error by e.
"""

import math
from typing import NamedTuple

from optimorph._core.checks import check_numbers


class Tuning(NamedTuple):
    """Arguments for `sgd`, and the factor by which each step multiplies the error in the long run."""

    learning_rate: float
    momentum: float
    contraction: float

    @property
    def steps_per_e(self) -> float:
        """The number of steps that divide the error by e."""
        return -1 / math.log(self.contraction) if self.contraction > 0 else 0.0


def gradient_descent(smoothness: float, strong_convexity: float) -> Tuning:
    """The best constant learning rate without momentum. About R/2 steps divide the error by e.

        η = 2 / (L + μ),  ρ = (R - 1) / (R + 1)        (1)

    Args:
      smoothness: L above 0, the largest eigenvalue.
      strong_convexity: μ in (0, L], the smallest.

    Raises:
      ValueError: an eigenvalue that is not positive, or μ > L.

    References:
      Polyak 1964, "Some methods of speeding up the convergence of iteration methods", section 2.
    """
    ratio = _condition("gradient_descent", smoothness, strong_convexity)
    return Tuning(2 / (smoothness + strong_convexity), 0.0, (ratio - 1) / (ratio + 1))  # (1)


def polyak(smoothness: float, strong_convexity: float) -> Tuning:
    """The best learning rate and momentum of the heavy ball, `sgd`. About √R/2 steps divide the error by e.

        η = 4 / (√L + √μ)²,  ρ = (√R - 1) / (√R + 1),  β = ρ²        (1)

    Args:
      smoothness: L above 0, the largest eigenvalue.
      strong_convexity: μ in (0, L], the smallest.

    Raises:
      ValueError: an eigenvalue that is not positive, or μ > L.

    References:
      Polyak 1964, "Some methods of speeding up the convergence of iteration methods", theorem 9.
    """
    root = math.sqrt(_condition("polyak", smoothness, strong_convexity))
    step = 4 / (math.sqrt(smoothness) + math.sqrt(strong_convexity)) ** 2
    rate = (root - 1) / (root + 1)
    return Tuning(step, rate**2, rate)  # (1)


def nesterov(smoothness: float, strong_convexity: float) -> Tuning:
    """Nesterov's constants for `sgd(nesterov=True)`. About √R steps divide the error by e.

        η = 1 / L,  β = (√R - 1) / (√R + 1),  ρ = 1 - 1/√R        (1)

    ρ is exact for quadratics. For other smooth, strongly convex functions √ρ is proved.

    Args:
      smoothness: L above 0, the largest eigenvalue.
      strong_convexity: μ in (0, L], the smallest.

    Raises:
      ValueError: an eigenvalue that is not positive, or μ > L.

    References:
      Nesterov 2004, "Introductory lectures on convex optimization", scheme 2.2.11 and theorem 2.2.3;
      ρ for quadratics: Lessard, Recht & Packard 2016, arXiv:1408.3595, proposition 1.
    """
    root = math.sqrt(_condition("nesterov", smoothness, strong_convexity))
    return Tuning(1 / smoothness, (root - 1) / (root + 1), 1 - 1 / root)  # (1)


def _condition(who: str, smoothness: float, strong_convexity: float) -> float:
    check_numbers(who, smoothness=smoothness, strong_convexity=strong_convexity)
    if strong_convexity > smoothness:
        raise ValueError(
            f"{who}: strong_convexity must be at most smoothness, but {strong_convexity} > {smoothness}. "
            "Type the largest eigenvalue first."
        )
    return smoothness / strong_convexity


__all__ = ["Tuning", "gradient_descent", "nesterov", "polyak"]
__dir__ = __all__.copy  # dir() shows the public names alone
