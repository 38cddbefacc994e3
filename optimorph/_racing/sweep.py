"""Learning rates, tried: every point trained, and judged by the loss on held-out data."""

import math
import threading
from collections.abc import Callable, Sequence

import jax

from optimorph._racing.contestants import Rates
from optimorph._racing.lanes import Maker, by_turns, lane_bytes, losses, side_by_side, widened
from optimorph._racing.record import Trial
from optimorph._racing.run import Run, Track
from optimorph._racing.task import Task

SEED = 1000  # no race uses it
_DECIDES = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)
"""How a maker fails that needs to know its rate: one that compares it, for example."""


class Sweep:
    """Tries the points of one optimizer after another's on the same task.

    Args:
      task: what is trained.
      part: the held-out data that judge.
      steps: of every training.
      stop: ends it after a step; points of a program of all then count as far as they came.
      sweep_bytes: all points of an optimizer train in one program if by `lane_bytes` they need no more; else
        in one program by turns, and each in its own if its maker must know the rate.
    """

    def __init__(self, task: Task, part: str, steps: int, stop: threading.Event, sweep_bytes: int):
        """Compile nothing yet."""
        self.task, self.part, self.steps, self.stop, self.bytes = task, part, steps, stop, sweep_bytes
        self.track = Track(task, part)

    def tries(
        self, name: str, make: Maker, points: Sequence[Rates], tried: Callable[[Trial], None]
    ) -> list[Trial]:
        """A trial a point that was trained; `tried` hears of each."""
        try:
            size = lane_bytes(self.task, make, points[0])
        except _DECIDES:
            return self._in_turn(name, points, [make(rates) for rates in points], tried)
        if len(points) > 1 and size * len(points) <= self.bytes:
            return self._at_once(name, points, make, tried)
        return self._in_turn(name, points, by_turns(make, points), tried)

    def _at_once(self, name, points, make, tried):
        run = Run(Track(widened(self.task, len(points)), self.part), side_by_side(make, points), SEED)
        self._train(run)
        found = losses(self.task, self.part, run.params)
        trials = [
            _trial(name, rates, float(loss), run.step) for rates, loss in zip(points, found, strict=True)
        ]
        for trial in trials:
            tried(trial)
        return trials if run.step else []

    def _in_turn(self, name, points, optimizers, tried):
        trials = []
        for rates, optimizer in zip(points, optimizers, strict=True):
            run = Run(self.track, optimizer, SEED)
            self._train(run)
            if self.stop.is_set():
                break
            run.look()
            trials.append(_trial(name, rates, run.losses[-1], run.step))
            tried(trials[-1])
        return trials

    def _train(self, run: Run) -> None:
        while run.step < self.steps and not self.stop.is_set():
            run.take_step()


def best(trials: Sequence[Trial]) -> Rates:
    """The rates of the lowest loss."""
    first = min(trials, key=lambda trial: trial.loss if math.isfinite(trial.loss) else math.inf)
    return Rates(first.learning_rate, first.others)


def _trial(name: str, rates: Rates, loss: float, steps: int) -> Trial:
    return Trial(
        name, float(rates.learning_rate), None if rates.others is None else float(rates.others), loss, steps
    )
