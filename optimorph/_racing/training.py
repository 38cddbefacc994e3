"""Train several optimizers on the same batches, a few steps of each in turn."""

import dataclasses
import math
import threading
from collections.abc import Callable

import optax

from optimorph._racing.registry import LearningRates
from optimorph._racing.run import CompiledTask, Run
from optimorph._racing.task import Task

NUM_EVALS = 10  # evaluations of the held-out loss during one run
TURN_STEPS = 25  # steps that an optimizer takes, at most, before the next optimizer continues


@dataclasses.dataclass
class Entry:
    """An optimizer in a race: its learning rates, if they are known, and one run for each seed."""

    name: str
    optimizer: optax.GradientTransformation
    rates: LearningRates | None = None
    runs: list[Run] = dataclasses.field(default_factory=list)

    @property
    def step(self) -> int:
        return sum(run.step for run in self.runs)

    @property
    def seconds(self) -> float:
        return math.fsum(seconds for run in self.runs for seconds in run.step_seconds)


OnStep = Callable[[Entry], None]
"""Called with an entry after its program is compiled, and after each step and evaluation."""


def train_all(
    task: Task, entries: list[Entry], steps: int, seeds: int, on_step: OnStep, stop: threading.Event
) -> None:
    """Train every entry with every seed. Once `stop` is set, training ends after the current step."""
    compiled = CompiledTask(task)
    for seed in range(seeds):
        for entry in entries:
            if not stop.is_set():
                entry.runs.append(Run(compiled, entry.optimizer, seed))
                entry.runs[-1].warm_up()
                on_step(entry)
        _train_seed(entries, steps, on_step, stop)
    for entry in entries:  # a stop can come between two evaluations
        for run in entry.runs:
            run.evaluate()
        if entry.runs:
            on_step(entry)


def _train_seed(entries: list[Entry], steps: int, on_step: OnStep, stop: threading.Event) -> None:
    """Train one seed. The entries take turns, so that other load on the machine slows all of them equally."""
    eval_every = max(1, steps // NUM_EVALS)
    turn_steps = min(eval_every, TURN_STEPS)
    for _ in range(0, steps, turn_steps):
        for entry in entries:
            if stop.is_set():
                return
            run = entry.runs[-1]
            for step in range(run.step + 1, min(run.step + turn_steps, steps) + 1):
                if stop.is_set() or run.diverged:
                    break
                run.take_step(keep_update=run.seed == 0 and (step % eval_every == 0 or step == steps))
                on_step(entry)
            if run.step == steps or run.step // eval_every > run.steps[-1] // eval_every:
                run.evaluate()
                on_step(entry)
