"""The measurements of a race, and the JSON file that keeps them."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar

from optimorph._racing.palette import Style, styles
from optimorph._racing.registry import LearningRates

R = TypeVar("R", bound="RaceData")


@dataclasses.dataclass(frozen=True)
class Row:
    """One optimizer's row of the table: means over its seeds.

    In a race that was stopped, only the seeds with the most steps and the seeds that diverged count.
    """

    name: str
    seeds: int
    steps: int
    loss: float
    spread: float
    steps_per_second: float
    optimizer_ms: float
    state_bytes_per_parameter: float
    compile_seconds: float
    learning_rate: float | None
    others_learning_rate: float | None

    @property
    def diverged(self) -> bool:
        """Whether the loss of any seed is not finite."""
        return not math.isfinite(self.loss)


@dataclasses.dataclass(frozen=True)
class Curve:
    """The held-out losses of one optimizer and seed, with the steps and seconds of training before each."""

    optimizer: str
    seed: int
    steps: list[int]
    seconds: list[float]
    losses: list[float]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A learning rate that was tried, and its final loss."""

    optimizer: str
    learning_rate: float
    others: float | None
    loss: float
    steps: int

    @property
    def rates(self) -> LearningRates:
        return LearningRates(self.learning_rate, self.others)

    @property
    def finite_or_inf(self) -> float:
        return self.loss if math.isfinite(self.loss) else math.inf


Layer = tuple[str, int, int]
"""The path of a weight, its rows and its columns."""


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Singular values of one leaf's update, divided by the largest; long spectra are subsampled evenly."""

    optimizer: str
    path: str
    rows: int
    columns: int
    values: list[float]
    effective_rank: float

    @property
    def layer(self) -> Layer:
        return self.path, self.rows, self.columns


LISTS = {"rows": Row, "curves": Curve, "trials": Trial, "spectra": Spectrum}


@dataclasses.dataclass(frozen=True)
class RaceData:
    """All measurements of a race or a sweep.

    Args:
      task: the name of the task.
      title: what was trained.
      measure: what the loss is, with its unit.
      steps: steps requested for each run.
      seeds: seeds requested for each optimizer.
      finished: False if the race was stopped early.
      machine: date, hardware and versions.
      rows: the table, lowest loss first.
      curves: one for each optimizer and seed.
      trials: the learning rates that a sweep tried.
      spectra: of the last updates of the first seed.
      log_loss: whether plots have a logarithmic loss axis; None: the range of the losses decides.
    """

    task: str
    title: str
    measure: str
    steps: int
    seeds: int
    finished: bool
    machine: dict[str, Any]
    rows: list[Row]
    curves: list[Curve]
    trials: list[Trial] = dataclasses.field(default_factory=list)
    spectra: list[Spectrum] = dataclasses.field(default_factory=list)
    log_loss: bool | None = None

    @property
    def names(self) -> list[str]:
        """All optimizers, in the order of tables and legends: lowest final loss first."""
        trials = sorted(self.trials, key=lambda trial: trial.finite_or_inf)
        names = [row.name for row in self.rows] + [entry.optimizer for entry in (*trials, *self.curves)]
        return list(dict.fromkeys(names))

    @property
    def styles(self) -> dict[str, Style]:
        return styles(list(dict.fromkeys(entry.optimizer for entry in (*self.curves, *self.trials))))

    def write_json(self, path: Path) -> None:
        """Write everything as JSON. A number that is not finite is written as null."""
        text = json.dumps(dataclasses.asdict(self))
        content = json.loads(text, parse_constant=lambda name: None)  # NaN and Infinity
        content |= content.pop("machine")
        text = json.dumps(content, indent=1, allow_nan=False)
        path.write_text(re.sub(r"\[[^][{}]*\]", lambda match: " ".join(match[0].split()), text) + "\n")

    @classmethod
    def read(cls: type[R], path: Path) -> R:
        content = json.loads(path.read_text(), object_hook=_nan_for_null)
        fields = {field.name for field in dataclasses.fields(cls)} - {"machine"}
        values: dict[str, Any] = {key: content[key] for key in fields & set(content)}
        values |= {key: [cls_(**item) for item in content.get(key, [])] for key, cls_ in LISTS.items()}
        return cls(machine={key: content[key] for key in content if key not in fields}, **values)


def _nan_for_null(content: dict[str, Any]) -> dict[str, Any]:
    if "loss" in content and content["loss"] is None:
        content["loss"] = math.nan
    if "losses" in content:
        content["losses"] = [math.nan if loss is None else loss for loss in content["losses"]]
    return content
