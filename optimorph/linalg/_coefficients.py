"""Tables of odd polynomials a σ + b σ³ + c σ⁵, one per step, that drive every singular value to 1."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from optimorph._core.shown import shown

Row = tuple[float, float, float]
Table = tuple[Row, ...]

MARGINS = {"bfloat16": 2.0**-8, "float16": 2.0**-10, "float32": 2.0**-20, "float64": 2.0**-40}
"""Dtype → how far rounding may raise the largest singular value above 1; from coarse to fine."""

EXACT = "exact"
"""The `dtype` of a table that is safe in exact arithmetic only."""

MAX_CONDITION = 120.0
"""The largest condition number of the Gram iteration's factor between restarts."""

_MAX_VALUE = 2.5
"""The largest value that a step may return. Polynomials are made for values up to 2, and diverge beyond."""


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """The coefficients of a Newton-Schulz iteration, a row for each step, checked on construction.

        p(σ) = a σ + b σ³ + c σ⁵ in every step                     (1)
        sign-safe: a + b σ² + c σ⁴ > 0 for every σ within reach     (2)

    Args:
      rows: (a, b, c) for each step.
      source: the origin of the table.
      lower: the smallest singular value, relative to the largest, for which the table is made.
      dtype: the narrowest dtype in which the table must be safe. The check allows for its rounding.

    Raises:
      ValueError: a row that is not three finite numbers, an empty table, or a table that turns the sign of a
        singular value or diverges. The error names that singular value.
    """

    rows: Table
    source: str = "given"
    lower: float = 1e-3
    dtype: str = "float32"

    def __post_init__(self):
        if self.dtype not in (*MARGINS, EXACT):
            raise ValueError(f"Coefficients: dtype must be one of {[*MARGINS]}, but is {shown(self.dtype)}.")
        object.__setattr__(self, "rows", checked_rows("Coefficients", self.rows))
        if not self.rows:
            raise ValueError("Coefficients: the table has no rows. Type at least one: ((a, b, c),).")
        if self.dtype != EXACT and (wrong := fault(self.rows, self.dtype)):
            raise ValueError(f"Coefficients: {wrong}")

    def take(self, steps: int) -> "Coefficients":
        """The table for a number of steps: its first rows. If there are too few, the last row is repeated."""
        rows = (*self.rows[:steps], *self.rows[-1:] * (steps - len(self.rows)))
        return dataclasses.replace(self, rows=rows)

    def __call__(self, sigma: np.ndarray) -> np.ndarray:
        """The singular values after all steps, in float64."""
        sigma = np.asarray(sigma, np.float64)
        for row in self.rows:
            sigma = value(row, sigma)
        return sigma

    @property
    def slope(self) -> float:
        """The factor by which a small singular value grows."""
        return math.prod(a for a, _, _ in self.rows)

    @property
    def band(self) -> tuple[float, float]:
        """The smallest and the largest value after all steps, for σ in [lower, 1]."""
        sigma = np.concatenate([space(self.lower, 1, 20_001) for space in (np.geomspace, np.linspace)])
        values = self(sigma)
        return float(values.min()), float(values.max())

    def restarts(self, limit: float = MAX_CONDITION) -> tuple[int, ...]:
        """The steps after which the Gram iteration restarts.

        These are the fewest restarts that keep its factor's condition below the limit, placed so that the
        worst condition is smallest.
        """
        return _restarts(self.rows, limit)

    def conditions(self, restarts: Sequence[int] | None = None) -> tuple[float, ...]:
        """The condition number of the Gram iteration's factor before each restart, and at the end."""
        bounds = [0, *(self.restarts() if restarts is None else restarts), len(self.rows)]
        return tuple(_condition(self.rows, i, j) for i, j in itertools.pairwise(bounds))

    def describe(self) -> str:
        """The properties of the table, one per line."""
        low, high = self.band
        restarts = self.restarts()
        conditions = ", ".join(f"{condition:.3g}" for condition in self.conditions(restarts))
        lines = {
            "source": self.source,
            "steps": str(len(self.rows)),
            "safe in": self.dtype,
            f"σ in [{self.lower:g}, 1] becomes": f"[{low:.4f}, {high:.4f}]",
            "worst |1 - σ|": f"{max(1 - low, high - 1):.4f}",
            "slope at 0": f"{self.slope:.4g}",
            "Gram restarts after": ", ".join(map(str, restarts)) or "no step",
            "condition before each": conditions,
        }
        return "\n".join(f"{name:<24} {value}" for name, value in lines.items())


def fault(rows: Table, dtype: str) -> str | None:
    """The first step that flips a sign or diverges, and from which σ, within the rounding of a dtype."""
    top = 1 + MARGINS[dtype]
    for step, row in enumerate(rows, 1):
        where, low = _lowest(row, top)
        if low <= 0:
            return (
                f"step {step}, {row}, flips signs: it turns σ = {where:.6g} into {where * low:.3g}. Singular "
                f"values of this size occur in {dtype}. Every step needs a + b σ² + c σ⁴ > 0."
            )
        where, high = highest(row, top)
        if high > _MAX_VALUE:
            return (
                f"step {step}, {row}, diverges: it turns σ = {where:.6g} into {high:.3g}. Singular values "
                f"of this size occur in {dtype}, and should tend to 1."
            )
        top = high * (1 + MARGINS[dtype])
    return None


def checked_rows(who: str, rows: Iterable[Sequence[float]]) -> Table:
    """The rows of a table as numbers of Python."""
    try:
        known = [tuple(map(float, row)) for row in rows]
    except (TypeError, ValueError):
        raise ValueError(
            f"{who}: a table has rows of three numbers, but this is {shown(rows)}. Type ((a, b, c),) for one."
        ) from None
    for row in known:
        if len(row) != 3 or not all(map(math.isfinite, row)):
            raise ValueError(f"{who}: a row must be three finite numbers (a, b, c), but one is {shown(row)}.")
    return tuple((a, b, c) for a, b, c in known)


def _quotient(row: Row, sigma: Any) -> Any:
    a, b, c = row
    return a + sigma**2 * (b + sigma**2 * c)


def value(row: Row, sigma: Any) -> Any:
    """p(σ), of a number or an array."""
    return sigma * _quotient(row, sigma)


def critical_points(row: Row) -> list[float]:
    """The positive σ with p'(σ) = 0, in order."""
    a, b, c = row
    squares = np.roots(np.trim_zeros([5 * c, 3 * b, a], "f")) if any(row) else np.zeros(0)
    return sorted(math.sqrt(x.real) for x in squares if abs(x.imag) < 1e-12 * abs(x) + 1e-300 and x.real > 0)


def _lowest(row: Row, top: float) -> tuple[float, float]:
    """The σ in [0, top] where p(σ)/σ is smallest, and that value."""
    _, b, c = row
    inner = [math.sqrt(-b / (2 * c))] if c and -b / (2 * c) > 0 else []
    return min(((s, _quotient(row, s)) for s in (0.0, *inner, top) if s <= top), key=lambda x: x[1])


def highest(row: Row, top: float) -> tuple[float, float]:
    """The σ in [0, top] where p is largest, and that value."""
    return max(((s, value(row, s)) for s in (*critical_points(row), top) if s <= top), key=lambda x: x[1])


@functools.lru_cache
def _condition(rows: Table, first: int, last: int) -> float:
    """max / min, over σ in [0, 1], of the factor by which the steps from `first` to `last` multiply σ."""
    sigma = np.concatenate([[0.0], np.geomspace(1e-6, 1e-2, 500), np.linspace(1e-2, 1, 4000)])
    for row in rows[:first]:
        sigma = value(row, sigma)
    factor = np.ones_like(sigma)
    for row in rows[first:last]:
        quotient = _quotient(row, sigma)
        sigma, factor = sigma * quotient, factor * quotient
    return float(factor.max() / factor.min())


@functools.lru_cache
def _restarts(rows: Table, limit: float) -> tuple[int, ...]:
    count = len(_greedy(rows, limit))
    ends = range(1, len(rows) + 1)
    tighter = sorted({_condition(rows, i, j) for j in ends for i in range(j)})
    return next(restarts for restarts in (_greedy(rows, x) for x in tighter) if len(restarts) <= count)


def _greedy(rows: Table, limit: float) -> tuple[int, ...]:
    """Each stretch between restarts as long as the limit allows, but at least one step."""
    restarts, start = [], 0
    for last in range(1, len(rows) + 1):
        if last - start > 1 and _condition(rows, start, last) > limit:
            start = last - 1
            restarts.append(start)
    return tuple(restarts)


JORDAN = Coefficients(
    ((3.4445, -4.7750, 2.0315),) * 5,
    'Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; steep, not convergent',
    dtype="bfloat16",
)

YOU = Coefficients(
    (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "You 2025, five triples for five steps",
    lower=1e-2,
    dtype="bfloat16",
)
