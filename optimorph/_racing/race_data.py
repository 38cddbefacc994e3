"""What a race leaves, as plain figures: written to a file and read again."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R", bound="Record")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: means over the seeds, in a stopped race over those that came furthest."""

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
        """Whether any seed ended with a loss that is no number."""
        return not math.isfinite(self.loss)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One seed of an optimizer: the held-out loss after so many steps and seconds of training."""

    optimizer: str
    seed: int
    steps: list[int]
    seconds: list[float]
    losses: list[float]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A learning rate that was tried, and the loss that it led to."""

    optimizer: str
    learning_rate: float
    others: float | None
    loss: float
    steps: int


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The singular values of an update of a leaf's matrices, over the largest, evenly thinned."""

    optimizer: str
    path: str
    rows: int
    columns: int
    values: list[float]
    effective_rank: float


@dataclasses.dataclass(frozen=True)
class Record:
    """Everything that was measured.

    Args:
      task: its name.
      title: what was trained.
      measure: what the loss is, with its unit.
      steps: that were asked for.
      seeds: that were asked for.
      finished: False if it was stopped early.
      machine: where and with what it was measured.
      rows: the table, best first.
      curves: one for every optimizer and seed.
      trials: the learning rates that were tried before.
      spectra: of the last updates of the first seed.
      log_loss: whether the loss axis of pictures is logarithmic; None: the range of the losses decides.
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
        """All optimizers in the order of tables and legends: best first, or by the lowest loss of a sweep."""
        tried = sorted(self.trials, key=lambda trial: trial.loss if math.isfinite(trial.loss) else math.inf)
        placed = [row.name for row in self.rows] + [each.optimizer for each in (*tried, *self.curves)]
        return list(dict.fromkeys(placed))

    def write_json(self, path: Path) -> None:
        """All of it; a loss that is no number is null."""
        content = _plain(dataclasses.asdict(self))
        content |= content.pop("machine")
        text = json.dumps(content, indent=1, allow_nan=False)
        path.write_text(re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n")

    @classmethod
    def read(cls: type[R], path: Path) -> R:
        """What `write_json` wrote."""
        content = json.loads(path.read_text())
        own = {field.name for field in dataclasses.fields(cls)} - {"machine"}
        given: dict[str, Any] = {key: content[key] for key in own & set(content)}
        for key, kind in {"rows": Row, "curves": Curve, "trials": Trial, "spectra": Spectrum}.items():
            given[key] = [_read(kind, each) for each in content.get(key, [])]
        return cls(machine={key: each for key, each in content.items() if key not in own}, **given)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(kind: type, found: dict[str, Any]) -> Any:
    nan = float("nan")
    if found.get("loss", 0.0) is None:
        found = found | {"loss": nan}
    if "losses" in found:
        found = found | {"losses": [nan if loss is None else loss for loss in found["losses"]]}
    return kind(**found)
