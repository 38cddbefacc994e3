"""The optimizers that can race, by name, and their tuned learning rates."""

import importlib.resources
import tomllib
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import optimorph as om
from optimorph._racing.task import Task
from optimorph._routing.resolve import leaf_axes

B2 = 0.99  # for 0.999, and for AdEMAMix's 0.9999: a short training needs a shorter average


class LearningRates(NamedTuple):
    """A peak learning rate, and for some optimizers a second one for the leaves that are not matrices."""

    learning_rate: Any  # a number, or an array during a sweep
    others: Any = None

    def __str__(self):
        return f"{self.learning_rate:.3g}" + ("" if self.others is None else f" / {self.others:.3g}")


class Racer(NamedTuple):
    """An optimizer that can race.

    Args:
      make: (schedule, schedule of the other leaves, task) → optimizer.
      others_of: the optimizer whose tuned rate of the other leaves it has, as both have the same AdamW for
        them; None if all leaves have one rate.
    """

    make: Callable[[Any, Any, Task], optax.GradientTransformation]
    others_of: str | None = None


def _alone(recipe: Callable[..., Any], **arguments: Any) -> Racer:
    """A recipe for all leaves."""
    return Racer(lambda rate, others, task: recipe(rate, **arguments))


def _beside_adamw(recipe: Callable[..., Any], **arguments: Any) -> Racer:
    """A recipe with weight decay for the leaves that `muon` takes for matrices, and AdamW for the others."""

    def make(rate: Any, others: Any, task: Task) -> optax.GradientTransformation:
        return _partitioned(recipe(rate, weight_decay=task.weight_decay, **arguments), others)

    return Racer(make, "adamw")


def _partitioned(matrices: optax.GradientTransformation, others: Any) -> optax.GradientTransformation:
    matrix = leaf_axes("race", None)
    return om.partition(
        lambda path, shape: "other" if matrix(path, shape) is None else "matrix",
        {"matrix": matrices, "other": _adamw_of_others(others)},
    )


def _for_matrices(recipe: Callable[..., Any], **arguments: Any) -> Racer:
    """A recipe that gives matrices to one transform itself, and the others to the AdamW that it is given."""

    def make(rate: Any, others: Any, task: Task) -> optax.GradientTransformation:
        adamw = _adamw_of_others(others)
        return recipe(rate, weight_decay=task.weight_decay, others=adamw, **arguments)

    return Racer(make, "muon")


def _adamw_of_others(rate: Any) -> optax.GradientTransformation:
    return om.adamw(rate, b2=B2, weight_decay=0.0)


OPTIMIZERS: dict[str, Racer] = {
    "sgd": _alone(om.sgd),
    "momentum": Racer(lambda rate, others, task: om.sgd(rate, task.momentum["momentum"])),
    "nesterov": Racer(lambda rate, others, task: om.sgd(rate, task.momentum["nesterov"], nesterov=True)),
    "adagrad": _alone(om.adagrad),
    "rmsprop": _alone(om.rmsprop),
    "adam": _alone(om.adam, b2=B2),
    "nadam": _alone(om.nadam, b2=B2),
    "adamw": _beside_adamw(om.adamw, b2=B2),
    "nadamw": _beside_adamw(om.nadamw, b2=B2),
    "laprop": _beside_adamw(om.laprop, b2=B2),
    "lion": _beside_adamw(om.lion),
    "adamh": Racer(lambda rate, others, task: _partitioned(om.adamh(rate, b2=B2), others), "adamw"),
    "ademamix": _beside_adamw(om.ademamix, b2=B2, b3=B2),
    "mars_adamw": _beside_adamw(om.mars_adamw),
    "muon": _for_matrices(om.muon),
    "muonh": Racer(lambda rate, others, task: om.muonh(rate, others=_adamw_of_others(others)), "muon"),
    "normuon": _for_matrices(om.normuon),
    "adamuon": _for_matrices(om.adamuon),
    "muon2": _for_matrices(om.muon2),
    "scion": _alone(om.scion),
    "soap": _for_matrices(om.soap),
    "klsoap": _for_matrices(om.klsoap),
    "shampoo": _for_matrices(om.shampoo),
    "soap_muon": _for_matrices(om.soap_muon, every=10),
}
"""Name → its optimizer."""

DEFAULT = ("sgd", "momentum", "rmsprop", "adam", "adamw", "muon", "muonh", "normuon")
"""The optimizers of a race that names none."""


def make_optimizer(name: str, task: Task, rates: LearningRates, steps: int) -> optax.GradientTransformation:
    others = None if rates.others is None else task.schedule(rates.others, steps)
    return OPTIMIZERS[name].make(task.schedule(rates.learning_rate, steps), others, task)


def tuned_learning_rates(task: Task) -> dict[str, LearningRates]:
    """Name → learning rates: those of `task.theory` where given, otherwise those of `learning_rates.toml`."""
    theory = {name: LearningRates(rate) for name, rate in task.theory.items()}
    found = recorded_learning_rates(task.name) | theory
    return {name: found[name] for name in OPTIMIZERS}


def recorded_learning_rates(task: str) -> dict[str, LearningRates]:
    text = importlib.resources.files("optimorph._racing").joinpath("learning_rates.toml").read_text()
    return {name: LearningRates(**rates) for name, rates in tomllib.loads(text)[task].items()}
