"""The optimal table for a lower bound and a number of steps."""

import functools
from collections.abc import Sequence

import numpy as np

from optimorph._core.checks import check_integer, check_numbers, is_one_of
from optimorph._core.shown import shown
from optimorph.linalg._coefficients import (
    EXACT,
    MARGINS,
    Coefficients,
    Row,
    critical_points,
    fault,
    highest,
    value,
)

_CUSHION = 0.02407327424182761
"""The cushion of the published Polar Express table."""


def polar_express(
    lower: float = 1e-3,
    steps: int = 5,
    *,
    degree: int = 5,
    safety: float = 0.02,
    cushion: float = _CUSHION,
) -> Coefficients:
    """Compute a table of coefficients, in which each step is the best polynomial after the previous steps.

        p = argmin max |1 - p(σ)|, σ in [max(l, κ u), u], p odd of the degree      (1)
        l ← p(l),  u ← 2 - l;  at first l = lower, u = 1                            (2)
        where κ u > l, p is scaled so that p(l) + max p = 2                         (3)
        σ ← σ / (1 + safety) in every step but the last                             (4)

    [l, u] is the interval of the singular values. With a cushion κ of 0 the composition of all steps is
    optimal. A larger cushion makes the first steps gentler and the result less accurate. `safety` keeps
    singular values that rounding lifts above 1 from diverging.

    Args:
      lower: the smallest singular value, relative to the largest, that should become 1; in (0, 1).
      steps: the number of steps, at least 1.
      degree: 3 or 5.
      safety: the relative margin in (4), at least 0.
      cushion: κ in [0, 1).

    Equals:
      optimal_composition(l=lower, num_iters=steps, cushion=cushion) of NoahAmsel/PolarExpress,
        polar_express.py at 5454910, with safety=0
      the table of arXiv:2505.16932, algorithm 1, with safety=0
      the table of CANS, arXiv:2506.10935, with cushion=0 and safety=0
    References:
      Amsel et al. 2025, arXiv:2505.16932, section 3 and algorithm 1; Grishina et al. 2025, arXiv:2506.10935.
    """
    check_numbers("polar_express", lower=lower, safety=safety, cushion=cushion)
    check_integer("polar_express", "steps", steps, 5)
    if not is_one_of(degree, (3, 5)):
        raise ValueError(f"polar_express: degree must be 3 or 5, but is {shown(degree)}. Type degree=5.")
    return _composed(float(lower), steps, degree, float(safety), float(cushion))


@functools.lru_cache
def _composed(lower: float, steps: int, degree: int, safety: float, cushion: float) -> Coefficients:
    rows, low, high = [], lower, 1.0
    for step in range(steps):
        row = _best(max(low, cushion * high), high, degree)  # (1)
        if cushion * high > low:
            middle = (value(row, low) + highest(row, high)[1]) / 2
            row = _divided(row, [middle] * 3)  # (3)
        low = value(row, low)  # (2)
        high = 2 - low
        room = 1.0 if step == steps - 1 else 1 + safety
        rows.append(_divided(row, [room, room**3, room**5]))  # (4)
    source = f"polar_express({lower:g}, {steps}, degree={degree}, safety={safety:g}, cushion={cushion:g})"
    safe = (dtype for dtype in MARGINS if fault(tuple(rows), dtype) is None)
    return Coefficients(tuple(rows), source, lower, next(safe, EXACT))


def _best(lower: float, upper: float, degree: int) -> Row:
    """The odd polynomial closest to 1 on [lower, upper], by the Remez exchange on [lower/upper, 1].

        p(xₖ) = 1 - (-1)ᵏ E at one point more than there are coefficients      (1)

    The inner points are those with p' = 0.
    """
    low, powers = lower / upper, np.arange(1, degree + 1, 2)
    count = len(powers)
    best = np.array([12, -4] if degree == 3 else [15, -10, 3]) / 8  # the limit as low tends to 1
    points = low + (1 - low) * np.array([0, 1 / 2, 1] if degree == 3 else [0, 1 / 4, 3 / 4, 1])
    for _ in range(100 if 1 - low > 5e-6 else 0):
        signs = (-1.0) ** np.arange(count + 1)
        system = np.column_stack([points[:, None] ** powers, signs])
        best = np.linalg.solve(system, np.ones(count + 1))[:-1]  # (1)
        inner = [x for x in critical_points(_padded(best)) if low < x < 1]
        if len(inner) != count - 1 or np.allclose(inner, points[1:-1], rtol=1e-14, atol=0):
            break
        points[1:-1] = inner
    return _padded(best / upper**powers)


def _padded(coefficients: np.ndarray) -> Row:
    a, b, c, *_ = *map(float, coefficients), 0.0
    return a, b, c


def _divided(row: Row, by: Sequence[float]) -> Row:
    a, b, c = (x / y for x, y in zip(row, by, strict=True))
    return a, b, c
