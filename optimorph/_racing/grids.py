"""The learning rates that `optimorph race --sweep` tries, and how it keeps the best."""

import itertools
from collections.abc import Iterator

from optimorph._racing.contestants import WITH_OTHERS, Rates

Grid = dict[str, tuple[float, ...]]

_TEXT: Grid = {
    "sgd": (0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
    "momentum": (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    "nesterov": (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    "adagrad": (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    "rmsprop": (5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02),
    "adam": (5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02),
    "adamw": (2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    "muon": (0.01, 0.02, 0.05, 0.1),
    "others": (0.01, 0.02, 0.05, 0.1, 0.2),
}

_DIGITS: Grid = _TEXT | {
    "rmsprop": (1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05),
    "adam": (2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1),
    "adamw": (2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2),
    "muon": (0.02, 0.05, 0.1, 0.2),
    "others": (0.005, 0.01, 0.02, 0.05, 0.1),
}

_QUADRATIC: Grid = {
    "adagrad": (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
    "rmsprop": (2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1),
    "adam": (5e-3, 0.01, 0.02, 0.05, 0.1, 0.2),
    "adamw": (5e-3, 0.01, 0.02, 0.05, 0.1, 0.2),
    "muon": (5e-3, 0.01, 0.02, 0.05, 0.1),
    "others": (0.01,),  # there is one matrix and nothing else
}

GRIDS = {"text": _TEXT, "digits": _DIGITS, "quadratic": _QUADRATIC}
"""Task → optimizer → learning rates; `others` is for the second rate of all who have one."""


def grid(name: str, task: str) -> Iterator[Rates]:
    """The learning rates that a sweep tries for an optimizer."""
    others = GRIDS[task]["others"] if name in WITH_OTHERS else (None,)
    return (Rates(*pair) for pair in itertools.product(GRIDS[task][name], others))


def at_edge(name: str, rates: Rates, task: str) -> bool:
    """Whether the best point of a grid is at its rim, so that a better one may lie outside."""
    sides = [(rates.learning_rate, GRIDS[task][name]), (rates.others, GRIDS[task]["others"])]
    return any(len(values) > 1 and rate in (values[0], values[-1]) for rate, values in sides)


def toml(task: str, steps: int, best: dict[str, Rates]) -> str:
    """The table file's section of a task."""
    lines = [f"# optimorph race --task {task} --steps {steps} --sweep", f"[{task}]"]
    for name, rates in best.items():
        others = "" if rates.others is None else f", others = {rates.others}"
        lines.append(f"{name} = {{ learning_rate = {rates.learning_rate}{others} }}")
    return "\n".join(lines) + "\n"
