"""The optimizers that can race, by name, and their tuned learning rates."""

import importlib.resources
import tomllib
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import optimorph as om
from optimorph._racing.task import Task
from optimorph._routing.resolve import leaf_axes

B2 = 0.99  # of adam, adamw and muon's adamw; a short training needs a shorter average than 0.999 gives


class LearningRates(NamedTuple):
    """A peak learning rate, and for some optimizers a second one for the leaves that are not matrices."""

    learning_rate: Any  # a number, or an array during a sweep
    others: Any = None

    def __str__(self):
        return f"{self.learning_rate:.3g}" + ("" if self.others is None else f" / {self.others:.3g}")


def _adamw(rate, others, task):
    """AdamW with `muon`'s two groups of leaves, so that both optimizers have the same two rates to tune."""
    matrix = leaf_axes("adamw", None)
    return om.partition(
        lambda path, shape: "other" if matrix(path, shape) is None else "matrix",
        {
            "matrix": om.adamw(rate, b2=B2, weight_decay=task.weight_decay),
            "other": om.adamw(others, b2=B2, weight_decay=0.0),
        },
    )


def _muon(rate, others, task):
    adamw = om.adamw(others, b2=B2, weight_decay=0.0)
    return om.muon(rate, weight_decay=task.weight_decay, others=adamw)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": lambda rate, others, task: om.sgd(rate),
    "momentum": lambda rate, others, task: om.sgd(rate, task.momentum["momentum"]),
    "nesterov": lambda rate, others, task: om.sgd(rate, task.momentum["nesterov"], nesterov=True),
    "adagrad": lambda rate, others, task: om.adagrad(rate),
    "rmsprop": lambda rate, others, task: om.rmsprop(rate),
    "adam": lambda rate, others, task: om.adam(rate, b2=B2),
    "adamw": _adamw,
    "muon": _muon,
}
"""Name → function (schedule, schedule of the other leaves, task) → optimizer."""

WITH_OTHERS = ("adamw", "muon")
"""The optimizers that have a second learning rate."""


def make_optimizer(name: str, task: Task, rates: LearningRates, steps: int) -> optax.GradientTransformation:
    """The named optimizer, with the task's schedule over `steps` steps."""
    others = None if rates.others is None else task.schedule(rates.others, steps)
    return OPTIMIZERS[name](task.schedule(rates.learning_rate, steps), others, task)


def tuned_learning_rates(task: Task) -> dict[str, LearningRates]:
    """Name → learning rates: those of `task.theory` where given, otherwise those of `learning_rates.toml`."""
    text = importlib.resources.files("optimorph._racing").joinpath("learning_rates.toml").read_text()
    table = tomllib.loads(text)[task.name] | {name: {"learning_rate": r} for name, r in task.theory.items()}
    return {name: LearningRates(**table[name]) for name in OPTIMIZERS}
