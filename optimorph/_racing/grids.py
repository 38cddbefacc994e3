"""The grids of learning rates that `optimorph race --sweep` tries, and the file that keeps the best."""

import itertools
from collections.abc import Iterator

from optimorph._racing.registry import OTHERS_OF, WITH_OTHERS, LearningRates, recorded_learning_rates

Grid = dict[str, tuple[float, ...]]

_TEXT: Grid = {
    "sgd": (0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
    "momentum": (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    "nesterov": (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    "adagrad": (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    "rmsprop": (5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02),
    "adam": (5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02),
    "adamw": (2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    "ademamix": (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3),
    "mars_adamw": (1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01),
    "nadam": (5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02),
    "nadamw": (2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    "laprop": (1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    "lion": (2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3),
    "adamh": (5e-4, 1e-3, 2e-3, 5e-3, 0.01),
    "muon": (0.01, 0.02, 0.05, 0.1),
    "muonh": (0.01, 0.02, 0.05, 0.1, 0.2),
    "normuon": (5e-3, 0.01, 0.02, 0.05, 0.1),
    "adamuon": (5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05),
    "muon2": (5e-3, 0.01, 0.02, 0.05, 0.1),
    "scion": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
    "soap": (2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02),
    "klsoap": (5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02),
    "shampoo": (5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05),
    "soap_muon": (5e-3, 0.01, 0.02, 0.05, 0.1),
    "others": (0.01, 0.02, 0.05, 0.1, 0.2),
}

_DIGITS: Grid = _TEXT | {
    "rmsprop": (1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05),
    "adam": (2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1),
    "adamw": (2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2),
    "ademamix": (2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1),
    "mars_adamw": (5e-3, 0.01, 0.02, 0.05, 0.1, 0.2),
    "nadam": (2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1),
    "nadamw": (5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    "laprop": (2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2),
    "lion": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01),
    "adamh": (0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    "muon": (0.02, 0.05, 0.1, 0.2),
    "muonh": (0.05, 0.1, 0.2, 0.5, 1.0),
    "normuon": (0.01, 0.02, 0.05, 0.1, 0.2),
    "adamuon": (0.01, 0.02, 0.05, 0.1, 0.2),
    "muon2": (0.02, 0.05, 0.1, 0.2, 0.5),
    "scion": (2e-5, 5e-5, 1e-4, 2e-4, 5e-4),
    "soap": (2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    "klsoap": (5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    "shampoo": (5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    "soap_muon": (0.02, 0.05, 0.1, 0.2, 0.5),
    "others": (0.005, 0.01, 0.02, 0.05, 0.1),
}

_FLIGHTS: Grid = {
    "sgd": (0.5, 1.0, 2.0, 5.0, 10.0),
    "momentum": (0.1, 0.2, 0.5, 1.0, 2.0),
    "nesterov": (0.1, 0.2, 0.5, 1.0, 2.0),
    "adagrad": (0.05, 0.1, 0.2, 0.5, 1.0),
    "rmsprop": (2e-3, 5e-3, 0.01, 0.02, 0.05),
    "adam": (5e-3, 0.01, 0.02, 0.05, 0.1),
    "adamw": (2e-3, 5e-3, 0.01, 0.02, 0.05),
    "ademamix": (1e-3, 2e-3, 5e-3, 0.01, 0.02),
    "mars_adamw": (5e-3, 0.01, 0.02, 0.05, 0.1),
    "nadam": (5e-3, 0.01, 0.02, 0.05, 0.1),
    "nadamw": (2e-3, 5e-3, 0.01, 0.02, 0.05),
    "laprop": (2e-3, 5e-3, 0.01, 0.02, 0.05),
    "lion": (5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02),
    "adamh": (0.02, 0.05, 0.1, 0.2, 0.5),
    "muon": (0.02, 0.05, 0.1, 0.2),
    "muonh": (0.02, 0.05, 0.1, 0.2, 0.5),
    "normuon": (0.02, 0.05, 0.1, 0.2, 0.5),
    "adamuon": (5e-3, 0.01, 0.02, 0.05, 0.1),
    "muon2": (0.02, 0.05, 0.1, 0.2, 0.5),
    "scion": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
    "soap": (5e-3, 0.01, 0.02, 0.05, 0.1),
    "klsoap": (5e-3, 0.01, 0.02, 0.05, 0.1),
    "shampoo": (2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1),
    "soap_muon": (0.01, 0.02, 0.05, 0.1, 0.2),
    "others": (5e-3, 0.01, 0.02, 0.05, 0.1),
}

_QUADRATIC: Grid = {
    "adagrad": (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
    "rmsprop": (2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1),
    "adam": (5e-3, 0.01, 0.02, 0.05, 0.1, 0.2),
    "adamw": (5e-3, 0.01, 0.02, 0.05, 0.1, 0.2),
    "ademamix": (5e-3, 0.01, 0.02, 0.05, 0.1, 0.2),
    "mars_adamw": (5e-3, 0.01, 0.02, 0.05, 0.1, 0.2),
    "nadam": (5e-3, 0.01, 0.02, 0.05, 0.1, 0.2),
    "nadamw": (5e-3, 0.01, 0.02, 0.05, 0.1, 0.2),
    "laprop": (5e-3, 0.01, 0.02, 0.05, 0.1, 0.2),
    "lion": (1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05),
    "adamh": (5e-3, 0.01, 0.02, 0.05, 0.1),
    "muon": (5e-3, 0.01, 0.02, 0.05, 0.1),
    "muonh": (5e-3, 0.01, 0.02, 0.05, 0.1),
    "normuon": (5e-3, 0.01, 0.02, 0.05, 0.1),
    "adamuon": (0.01, 0.02, 0.05, 0.1, 0.2),
    "muon2": (5e-3, 0.01, 0.02, 0.05, 0.1),
    "scion": (1e-4, 2e-4, 5e-4, 1e-3, 2e-3),
    "soap": (0.01, 0.02, 0.05, 0.1, 0.2),
    "klsoap": (5e-3, 0.01, 0.02, 0.05, 0.1, 0.2),
    "shampoo": (5e-3, 0.01, 0.02, 0.05, 0.1, 0.2),
    "soap_muon": (0.02, 0.05, 0.1, 0.2, 0.5),
    "others": (0.01,),  # the only leaf is a matrix
}

GRIDS = {"text": _TEXT, "digits": _DIGITS, "flights": _FLIGHTS, "quadratic": _QUADRATIC}
"""Task → optimizer → learning rates; `others` is the second rate of `adamw` and `muon`."""


def grid(name: str, task: str) -> Iterator[LearningRates]:
    """The learning rates that a sweep of an optimizer tries."""
    pairs = itertools.product(GRIDS[task][name], others_grid(name, task))
    return (LearningRates(*pair) for pair in pairs)


def others_grid(name: str, task: str) -> tuple[float | None, ...]:
    """The second rates that a sweep tries; None if the optimizer has none."""
    if name in OTHERS_OF:
        return (recorded_learning_rates(task)[OTHERS_OF[name]].others,)
    return GRIDS[task]["others"] if name in WITH_OTHERS else (None,)


def at_edge(name: str, rates: LearningRates, task: str) -> bool:
    """Whether a rate is the lowest or highest of its grid, so that a better one may lie outside."""
    axes = [(rates.learning_rate, GRIDS[task][name]), (rates.others, others_grid(name, task))]
    return any(len(values) > 1 and rate in (values[0], values[-1]) for rate, values in axes)


def toml(task: str, steps: int, best: dict[str, LearningRates]) -> str:
    """A task's section of `learning_rates.toml`."""
    lines = [f"# optimorph race --task {task} --steps {steps} --sweep", f"[{task}]"]
    for name, rates in best.items():
        others = "" if rates.others is None else f", others = {rates.others}"
        lines.append(f"{name} = {{ learning_rate = {rates.learning_rate}{others} }}")
    return "\n".join(lines) + "\n"
