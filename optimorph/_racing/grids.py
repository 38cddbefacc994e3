"""The grids of learning rates that `optimorph race --sweep` tries, and the file that keeps the best."""

import itertools
from collections.abc import Iterator

from optimorph._racing.registry import WITH_OTHERS, LearningRates

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
    "others": (0.01,),  # the only leaf is a matrix
}

GRIDS = {"text": _TEXT, "digits": _DIGITS, "quadratic": _QUADRATIC}
"""Task → optimizer → learning rates; `others` is the second rate of every optimizer that has one."""


def grid(name: str, task: str) -> Iterator[LearningRates]:
    """The learning rates that a sweep of an optimizer tries."""
    others = GRIDS[task]["others"] if name in WITH_OTHERS else (None,)
    return (LearningRates(*pair) for pair in itertools.product(GRIDS[task][name], others))


def at_edge(name: str, rates: LearningRates, task: str) -> bool:
    """Whether a rate is the lowest or highest of its grid, so that a better one may lie outside."""
    axes = [(rates.learning_rate, GRIDS[task][name]), (rates.others, GRIDS[task]["others"])]
    return any(len(values) > 1 and rate in (values[0], values[-1]) for rate, values in axes)


def toml(task: str, steps: int, best: dict[str, LearningRates]) -> str:
    """A task's section of `learning_rates.toml`."""
    lines = [f"# optimorph race --task {task} --steps {steps} --sweep", f"[{task}]"]
    for name, rates in best.items():
        others = "" if rates.others is None else f", others = {rates.others}"
        lines.append(f"{name} = {{ learning_rate = {rates.learning_rate}{others} }}")
    return "\n".join(lines) + "\n"
