"""Who races: the optimizers by name, as their learning rates make them."""

import importlib.resources
import tomllib
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import optimorph as om
from optimorph._racing.task import Task
from optimorph.routing.reading import leaf_axes

B2 = 0.99  # of adam, adamw and muon's adamw: a short run forgets faster


class Rates(NamedTuple):
    """A peak learning rate and, where the optimizer has one, another for leaves that are not matrices."""

    learning_rate: Any  # a number, or in a sweep an array
    others: Any = None

    def __str__(self):
        """As the table shows it."""
        return f"{self.learning_rate:.3g}" + ("" if self.others is None else f" / {self.others:.3g}")


def _adamw(rate, others, task):
    """The same leaves apart as `muon` has them, so that both are tuned alike."""
    matrix = leaf_axes("adamw", None)
    return om.partition(
        lambda path, shape: "other" if matrix(path, shape) is None else "matrix",
        {
            "matrix": om.adamw(rate, b2=B2, weight_decay=task.weight_decay),
            "other": om.adamw(others, b2=B2, weight_decay=0.0),
        },
    )


def _muon(rate, others, task):
    return om.muon(rate, weight_decay=task.weight_decay, others=om.adamw(others, b2=B2, weight_decay=0.0))


MAKERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": lambda rate, others, task: om.sgd(rate),
    "momentum": lambda rate, others, task: om.sgd(rate, task.momentum["momentum"]),
    "nesterov": lambda rate, others, task: om.sgd(rate, task.momentum["nesterov"], nesterov=True),
    "adagrad": lambda rate, others, task: om.adagrad(rate),
    "rmsprop": lambda rate, others, task: om.rmsprop(rate),
    "adam": lambda rate, others, task: om.adam(rate, b2=B2),
    "adamw": _adamw,
    "muon": _muon,
}
"""Name → (schedule, schedule of other leaves, task) → optimizer."""

WITH_OTHERS = ("adamw", "muon")


def make(name: str, task: Task, rates: Rates, steps: int) -> optax.GradientTransformation:
    """The optimizer of this name, with the task's schedule over this many steps."""
    others = None if rates.others is None else task.schedule(rates.others, steps)
    return MAKERS[name](task.schedule(rates.learning_rate, steps), others, task)


def tuned(task: Task) -> dict[str, Rates]:
    """The learning rates of theory, where there is one, and of the table file beside this module."""
    text = importlib.resources.files("optimorph._racing").joinpath("learning_rates.toml").read_text()
    table = tomllib.loads(text)[task.name]
    known = {name: Rates(rate) for name, rate in task.theory.items()}
    return {name: known[name] if name in known else Rates(**table[name]) for name in MAKERS}
