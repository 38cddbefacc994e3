"""The grids of learning rates that `optimorph race --sweep` tries, and the file that keeps the best."""

import itertools
from collections.abc import Iterator

from optimorph._racing.registry import OPTIMIZERS, LearningRates, recorded_learning_rates

Rates = tuple[float, ...]

_RATES: dict[str, tuple[Rates, ...]] = {
    "sgd": ((0.1, 5.0), (0.1, 5.0), (0.5, 10.0)),
    "momentum": ((0.02, 1.0), (0.02, 1.0), (0.1, 2.0)),
    "nesterov": ((0.02, 1.0), (0.02, 1.0), (0.1, 2.0)),
    "adagrad": ((0.02, 1.0), (0.02, 1.0), (0.05, 1.0), (0.1, 10.0)),
    "rmsprop": ((5e-4, 0.02), (1e-3, 0.05), (2e-3, 0.05), (2e-3, 0.1)),
    "adam": ((5e-4, 0.02), (2e-3, 0.1), (5e-3, 0.1), (5e-3, 0.2)),
    "adamw": ((2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3), (2e-3, 0.2), (2e-3, 0.05), (5e-3, 0.2)),
    "ademamix": ((1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3), (2e-3, 0.1), (1e-3, 0.02), (5e-3, 0.2)),
    "mars_adamw": ((1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01), (5e-3, 0.2), (5e-3, 0.1), (5e-3, 0.2)),
    "nadam": ((5e-4, 0.02), (2e-3, 0.1), (5e-3, 0.1), (5e-3, 0.2)),
    "nadamw": ((2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3), (5e-3, 0.5), (2e-3, 0.05), (5e-3, 0.2)),
    "laprop": ((1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3), (2e-3, 0.2), (2e-3, 0.05), (5e-3, 0.2)),
    "lion": ((2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3), (1e-4, 0.01), (5e-4, 0.02), (1e-3, 0.05)),
    "adamh": ((5e-4, 0.01), (0.02, 1.0), (0.02, 0.5), (5e-3, 0.1)),
    "muon": ((0.01, 0.1), (0.02, 0.2), (0.02, 0.2), (5e-3, 0.1)),
    "muonh": ((0.01, 0.2), (0.05, 1.0), (0.02, 0.5), (5e-3, 0.1)),
    "normuon": ((5e-3, 0.1), (0.01, 0.2), (0.02, 0.5), (5e-3, 0.1)),
    "adamuon": ((5e-4, 0.05), (0.01, 0.2), (5e-3, 0.1), (0.01, 0.2)),
    "muon2": ((5e-3, 0.1), (0.02, 0.5), (0.02, 0.5), (5e-3, 0.1)),
    "scion": ((1e-4, 2e-3), (2e-5, 5e-4), (1e-4, 2e-3), (1e-4, 2e-3)),
    "soap": ((2.5e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02), (2e-3, 0.5), (5e-3, 0.1), (0.01, 0.2)),
    "klsoap": ((5e-4, 0.02), (5e-3, 0.5), (5e-3, 0.1), (5e-3, 0.2)),
    "shampoo": ((5e-4, 0.05), (5e-3, 0.5), (2e-3, 0.1), (5e-3, 0.2)),
    "soap_muon": ((5e-3, 0.1), (0.02, 0.5), (0.01, 0.2), (0.02, 0.5)),
    "others": ((0.01, 0.2), (5e-3, 0.1), (5e-3, 0.1), (0.01,)),  # the only leaf of the quadratic is a matrix
}
"""Optimizer → its rates for text, digits, flights and quadratic. Two are the ends of a series 1, 2, 5 ..."""


def _grid(rates: Rates) -> Rates:
    low, high = rates[0], rates[-1]
    steps = [float(f"{digit}e{exponent}") for exponent in range(-6, 3) for digit in (1, 2, 5)]
    return tuple(rate for rate in steps if low <= rate <= high) if len(rates) == 2 else rates


GRIDS = {
    task: {name: _grid(rates[k]) for name, rates in _RATES.items() if k < len(rates)}
    for k, task in enumerate(("text", "digits", "flights", "quadratic"))
}
"""Task → optimizer → learning rates; `others` is the second rate of `adamw` and `muon`."""


def grid(name: str, task: str) -> Iterator[LearningRates]:
    pairs = itertools.product(GRIDS[task][name], others_grid(name, task))
    return (LearningRates(*pair) for pair in pairs)


def others_grid(name: str, task: str) -> tuple[float | None, ...]:
    """The second rates that a sweep tries; None if the optimizer has none."""
    if (tuned := OPTIMIZERS[name].others_of) in (name, None):
        return GRIDS[task]["others"] if tuned else (None,)
    return (recorded_learning_rates(task)[tuned].others,)


def at_edge(name: str, rates: LearningRates, task: str) -> bool:
    """Whether a rate is the lowest or highest of its grid, so that a better one may lie outside."""
    axes = [(rates.learning_rate, GRIDS[task][name]), (rates.others, others_grid(name, task))]
    return any(len(values) > 1 and rate in (values[0], values[-1]) for rate, values in axes)


def toml(task: str, steps: int, best: dict[str, LearningRates]) -> str:
    lines = [f"# optimorph race --task {task} --steps {steps} --sweep", f"[{task}]"]
    for name, rates in best.items():
        others = "" if rates.others is None else f", others = {rates.others}"
        lines.append(f"{name} = {{ learning_rate = {rates.learning_rate}{others} }}")
    return "\n".join(lines) + "\n"
