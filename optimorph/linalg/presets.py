"""Tables by name."""

from collections.abc import Callable, Sequence

from optimorph.linalg.coefficients import Coefficients, checked_row
from optimorph.linalg.polar_express import polar_express

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

PRESETS: dict[str, Callable[[int], Coefficients]] = {
    "polar_express": lambda steps: polar_express(steps=steps),
    "jordan": JORDAN.take,
    "you": YOU.take,
    "cans": lambda steps: polar_express(steps=steps, safety=0.0, cushion=0.0),
}
"""Name → number of steps → table."""


def table(coefficients: str | Coefficients | Sequence[Sequence[float]], steps: int) -> Coefficients:
    """The table of a preset's name, or of rows, for a number of steps.

    Raises:
      ValueError: an unknown name, rows that `Coefficients` refuses, or fewer than one step.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"NewtonSchulz: steps must be a whole number of at least 1, but is {steps!r}.")
    if isinstance(coefficients, Coefficients):
        return coefficients.take(steps)
    if not isinstance(coefficients, str):
        return Coefficients(tuple(map(checked_row, coefficients))).take(steps)
    if coefficients not in PRESETS:
        raise ValueError(
            f"NewtonSchulz: no coefficients are called {coefficients!r}. Type one of "
            f"{', '.join(map(repr, PRESETS))}, linalg.polar_express(...), or the rows: ((a, b, c), ...)."
        )
    return PRESETS[coefficients](steps)
