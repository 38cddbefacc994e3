"""Odd quintics a σ + b σ³ + c σ⁵ that push every singular value towards 1."""

import math
from collections.abc import Sequence

Row = tuple[float, float, float]
Table = tuple[Row, ...]

_JORDAN = ((3.4445, -4.7750, 2.0315),)
"""Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Steep, not convergent."""

_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.875, -1.25, 0.375),
)
"""Amsel et al. 2025, arXiv:2505.16932, section 3, for σ in [1e-3, 1]. The last row, the limit of the
construction, stands for all that follow."""

_SAFETY = 1.01
"""Room for rounding above σ = 1 in every step but the last (the same paper, section 3.4)."""

PRESETS = ("jordan", "polar_express")


def table(coefficients: str | Sequence[Sequence[float]], steps: int) -> Table:
    """The rows for a number of steps; where there are too few, the last one repeats.

    Raises:
      ValueError: an unknown name, a row that is not three finite numbers, no rows, or fewer than one step.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"NewtonSchulz: steps must be a whole number of at least 1, but is {steps!r}.")
    if not isinstance(coefficients, str):
        return _extend(tuple(_row(row) for row in coefficients), steps)
    if coefficients not in PRESETS:
        raise ValueError(
            f"NewtonSchulz: no coefficients are called {coefficients!r}. Type one of "
            f"{', '.join(map(repr, PRESETS))}, or the rows themselves: ((a, b, c), ...)."
        )
    if coefficients == "jordan":
        return _JORDAN * steps
    rows = _extend(_POLAR_EXPRESS, steps)
    return (*(_shrink(row) for row in rows[:-1]), rows[-1])


def _extend(rows: Table, steps: int) -> Table:
    if not rows:
        raise ValueError("NewtonSchulz: the table has no rows. Type at least one: ((a, b, c),).")
    return (*rows[:steps], *rows[-1:] * (steps - len(rows)))


def _row(row: Sequence[float]) -> Row:
    if len(row) != 3 or not all(math.isfinite(x) for x in row):
        raise ValueError(f"NewtonSchulz: a row must be three finite numbers (a, b, c), but one is {row!r}.")
    a, b, c = map(float, row)
    return a, b, c


def _shrink(row: Row) -> Row:
    a, b, c = row
    return a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5
