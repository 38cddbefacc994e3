"""Odd polynomials a σ + b σ³ + c σ⁵, one for each step, that push every singular value towards 1."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

Row = tuple[float, float, float]
Table = tuple[Row, ...]

MARGINS = {"bfloat16": 2.0**-8, "float16": 2.0**-10, "float32": 2.0**-20, "float64": 2.0**-40}
"""How far above 1 rounding to a dtype may leave the largest singular value; from coarse to fine."""

EXACT = "exact"
"""The dtype of a table that only exact arithmetic keeps in bounds."""

LIMIT = 120.0
"""Of the condition of what the Gram iteration accumulates between restarts: 100, and a little."""

_LARGEST = 2.5
"""Above 2 a step's best polynomial is no longer what it was made for, and the next makes it worse."""


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """A table of steps, checked when it is made.

        p(σ) = a σ + b σ³ + c σ⁵ in every step                     (1)
        sign-safe: a + b σ² + c σ⁴ > 0 wherever a step may begin    (2)

    Args:
      rows: (a, b, c) for each step.
      source: who found it, or how.
      lower: the smallest singular value, relative to the largest, that it is made for.
      dtype: the narrowest in which it is to work: the check leaves room for its rounding.

    Raises:
      ValueError: a row that is not three finite numbers, no rows, or a table that turns a sign or runs away,
        with the σ where it does.
    """

    rows: Table
    source: str = "given"
    lower: float = 1e-3
    dtype: str = "float32"

    def __post_init__(self):
        """Refuse a table that fails (2), or that runs away."""
        if self.dtype not in (*MARGINS, EXACT):
            raise ValueError(f"Coefficients: dtype must be one of {[*MARGINS]}, but is {self.dtype!r}.")
        object.__setattr__(self, "rows", tuple(checked_row(row) for row in self.rows))
        if not self.rows:
            raise ValueError("Coefficients: the table has no rows. Type at least one: ((a, b, c),).")
        wrong = None if self.dtype == EXACT else fault(self.rows, self.dtype)
        if wrong is not None:
            raise ValueError(f"Coefficients: {wrong}")

    def take(self, steps: int) -> "Coefficients":
        """The first rows, as many as there are steps; where there are too few the last one repeats."""
        rows = (*self.rows[:steps], *self.rows[-1:] * (steps - len(self.rows)))
        return dataclasses.replace(self, rows=rows)

    def __call__(self, sigma: np.ndarray) -> np.ndarray:
        """What becomes of singular values, in float64."""
        sigma = np.asarray(sigma, np.float64)
        for row in self.rows:
            sigma = sigma * _quotient(row, sigma)
        return sigma

    @property
    def slope(self) -> float:
        """What a small singular value is multiplied by."""
        return math.prod(a for a, _, _ in self.rows)

    @property
    def band(self) -> tuple[float, float]:
        """The smallest and the largest value that comes of σ in [lower, 1]."""
        values = self(
            np.concatenate([np.geomspace(self.lower, 1, 20_001), np.linspace(self.lower, 1, 20_001)])
        )
        return float(values.min()), float(values.max())

    def restarts(self, limit: float = LIMIT) -> tuple[int, ...]:
        """After which steps the Gram iteration should start anew: the fewest restarts that keep its factor's
        condition below the limit, placed so that the worst is least."""
        return _placed(self.rows, limit)

    def conditions(self, restarts: Sequence[int] | None = None) -> tuple[float, ...]:
        """The condition of the Gram iteration's factor at the end of each stretch between restarts."""
        bounds = [0, *(self.restarts() if restarts is None else restarts), len(self.rows)]
        return tuple(_condition(self.rows, i, j) for i, j in itertools.pairwise(bounds))

    def describe(self) -> str:
        """The figures by which tables are chosen, a line each."""
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
    """Which step turns a sign or runs away, and from which σ, within the rounding of a dtype."""
    top = 1 + MARGINS[dtype]
    for step, row in enumerate(rows, 1):
        where, low = _lowest(row, top)
        if low <= 0:
            return (
                f"step {step}, {row}, turns signs: from σ = {where:.6g}, within reach in {dtype}, it makes "
                f"{where * low:.3g}. Every step needs a + b σ² + c σ⁴ > 0."
            )
        where, high = highest(row, top)
        if high > _LARGEST:
            return (
                f"step {step}, {row}, runs away: from σ = {where:.6g}, within reach in {dtype}, it makes "
                f"{high:.3g}. Singular values should tend to 1."
            )
        top = high * (1 + MARGINS[dtype])
    return None


def checked_row(row: Sequence[float]) -> Row:
    """The row, if it is three finite numbers."""
    if len(row) != 3 or not all(math.isfinite(x) for x in row):
        raise ValueError(f"Coefficients: a row must be three finite numbers (a, b, c), but one is {row!r}.")
    a, b, c = map(float, row)
    return a, b, c


def _quotient(row: Row, sigma: np.ndarray) -> np.ndarray:
    """p(σ) / σ."""
    a, b, c = row
    squared = sigma * sigma
    return a + squared * (b + squared * c)


def value(row: Row, sigma: float) -> float:
    """p(σ)."""
    a, b, c = row
    return sigma * (a + sigma**2 * (b + sigma**2 * c))


def turns(row: Row) -> list[float]:
    """The positive σ at which p' is 0, in order."""
    a, b, c = row
    squares = np.roots(np.trim_zeros([5 * c, 3 * b, a], "f")) if any(row) else np.zeros(0)
    return sorted(math.sqrt(x.real) for x in squares if abs(x.imag) < 1e-12 * abs(x) + 1e-300 and x.real > 0)


def _lowest(row: Row, top: float) -> tuple[float, float]:
    """Where in [0, top], and how low, p(σ)/σ comes."""
    a, b, c = row
    inner = [math.sqrt(-b / (2 * c))] if c and -b / (2 * c) > 0 else []
    return min(((s, a + s**2 * (b + s**2 * c)) for s in (0.0, *inner, top) if s <= top), key=lambda x: x[1])


def highest(row: Row, top: float) -> tuple[float, float]:
    """Where in [0, top], and how high, p comes."""
    return max(((s, value(row, s)) for s in (*turns(row), top) if s <= top), key=lambda x: x[1])


def _spread() -> np.ndarray:
    """Singular values from 0 to 1, dense where a first step is steep."""
    return np.concatenate([[0.0], np.geomspace(1e-6, 1e-2, 500), np.linspace(1e-2, 1, 4000)])


@functools.lru_cache
def _condition(rows: Table, first: int, last: int) -> float:
    """max / min, over all σ in [0, 1], of what the steps from `first` to `last` multiply it by."""
    sigma = _spread()
    for row in rows[:first]:
        sigma = sigma * _quotient(row, sigma)
    factor = np.ones_like(sigma)
    for row in rows[first:last]:
        quotient = _quotient(row, sigma)
        sigma, factor = sigma * quotient, factor * quotient
    return float(factor.max() / factor.min())


@functools.lru_cache
def _placed(rows: Table, limit: float) -> tuple[int, ...]:
    count = len(_greedy(rows, limit))
    ends = range(1, len(rows) + 1)
    tighter = sorted({_condition(rows, i, j) for j in ends for i in range(j)})
    return next(placed for placed in (_greedy(rows, each) for each in tighter) if len(placed) <= count)


def _greedy(rows: Table, limit: float) -> tuple[int, ...]:
    """Stretches as long as the limit allows, and of one step where it allows none."""
    restarts, start = [], 0
    for last in range(1, len(rows) + 1):
        if last - start > 1 and _condition(rows, start, last) > limit:
            start = last - 1
            restarts.append(start)
    return tuple(restarts)
