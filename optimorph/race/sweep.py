"""The learning rates of the table: every grid point trained, judged on data that races never show."""

import itertools
import math
import threading
from collections.abc import Callable, Iterator

from optimorph.race.contestants import WITH_OTHERS, Rates, make
from optimorph.race.run import Run, Track
from optimorph.race.task import Task

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

SEED = 1000  # no race uses it


def grid(name: str, task: str) -> Iterator[Rates]:
    """The learning rates that a sweep tries for an optimizer."""
    others = GRIDS[task]["others"] if name in WITH_OTHERS else (None,)
    return (Rates(*pair) for pair in itertools.product(GRIDS[task][name], others))


def sweep(
    task: Task,
    names: list[str],
    steps: int,
    tried: Callable[[str, Rates, float], None],
    stop: threading.Event,
) -> dict[str, Rates]:
    """The best rates of each whole grid by the tuning loss after `steps`; `tried` hears of every point."""
    track = Track(task, "tuning")
    best: dict[str, Rates] = {}
    for name in names:
        scores: dict[Rates, float] = {}
        for rates in grid(name, task.name):
            run = Run(track, make(name, task, rates, steps), SEED)
            while run.step < steps:
                if stop.is_set():
                    return best
                run.take_step()
            run.look()
            scores[rates] = run.losses[-1] if math.isfinite(run.losses[-1]) else math.inf
            tried(name, rates, run.losses[-1])
        best[name] = min(scores, key=scores.__getitem__)
    return best


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
