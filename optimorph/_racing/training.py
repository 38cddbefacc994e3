"""The laps: everybody trains on the same batches, a few steps each in turn."""

import dataclasses
import threading
from collections.abc import Callable

import optax

from optimorph._racing.contestants import Rates
from optimorph._racing.run import Run, Track
from optimorph._racing.task import Task

LOOKS = 10  # times that the held-out loss is looked at
TURN = 25  # steps that a contestant takes before it is the next one's turn


@dataclasses.dataclass
class Contestant:
    """An optimizer, its learning rates as far as they are known, and its runs, one a seed."""

    name: str
    optimizer: optax.GradientTransformation
    rates: Rates | None = None
    runs: list[Run] = dataclasses.field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps taken over all seeds."""
        return sum(run.step for run in self.runs)

    @property
    def seconds(self) -> float:
        """Training time over all seeds."""
        return sum(sum(run.model_seconds) + sum(run.update_seconds) for run in self.runs)

    @property
    def loss(self) -> float:
        """The newest held-out loss."""
        return self.runs[-1].losses[-1] if self.runs else float("nan")


def hold(
    task: Task,
    contestants: list[Contestant],
    steps: int,
    seeds: int,
    moved: Callable[[Contestant], None],
    stop: threading.Event,
) -> None:
    """Train everyone with every seed; `moved` hears of every step, and `stop` ends it after one."""
    track = Track(task)
    for seed in range(seeds):
        for one in contestants:
            if not stop.is_set():
                one.runs.append(Run(track, one.optimizer, seed))
                one.runs[-1].warm_up()
                moved(one)
        if not stop.is_set():
            _lap(contestants, steps, moved, stop)
    for one in contestants:  # a stop may have come between two evaluations
        for run in one.runs:
            run.look()
        if one.runs:
            moved(one)


def _lap(
    contestants: list[Contestant], steps: int, moved: Callable[[Contestant], None], stop: threading.Event
) -> None:
    """One seed's training, in turns, so that nobody has the machine's quiet minutes to himself."""
    stride = max(1, steps // LOOKS)
    turn = min(stride, TURN)
    for _ in range(0, steps, turn):
        for one in contestants:
            run = one.runs[-1]
            for _ in range(min(turn, steps - run.step)):
                if stop.is_set() or run.diverged:
                    break
                ahead = run.step + 1
                run.take_step(keep=run.seed == 0 and (ahead % stride == 0 or ahead == steps))
                moved(one)
            if run.step == steps or run.step // stride > run.steps[-1] // stride:
                run.look()
                moved(one)
        if stop.is_set():
            return
