"""Train several optimizers on the same batches, a few steps of each in turn.

A run is one optimizer with one seed. The times of gradient and update are measured separately.
"""

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

from optimorph._racing.registry import LearningRates
from optimorph._racing.task import Task

NUM_EVALS = 10  # evaluations of the held-out loss during one run
TURN_STEPS = 25  # steps that an optimizer takes, at most, before the next optimizer continues
WARM_UP_STEPS = 3  # steps that are not timed


class CompiledTask:
    """The compiled loss and gradient of a task, and the compiled updates. All runs share them.

    `part` is the held-out data that evaluate the parameters.
    """

    def __init__(self, task: Task, part: str = "validation"):
        self.task = task
        self.gradient = jax.jit(jax.value_and_grad(task.loss))
        self._loss = jax.jit(task.loss)
        self._held_out = task.held_out(part)
        self._compiled: dict[Callable[..., Any], tuple[Callable[..., Any], float]] = {}

    def held_out_loss(self, params: Any) -> float:
        return float(np.mean([self._loss(params, batch) for batch in self._held_out]))

    def compile(
        self, update: Callable[..., Any], gradients: Any, state: Any, params: Any
    ) -> tuple[Callable[..., Any], float]:
        """A compiled function (gradients, state, params) → (state, params), and the seconds to compile it.

        Each `update` is compiled only once. State and parameters keep their sharding.
        """

        def apply(gradients, state, params):
            updates, state = update(gradients, state, params)
            return state, optax.apply_updates(params, updates)

        if update not in self._compiled:
            start = time.perf_counter()
            shardings = jax.tree.map(_sharding, (state, params))
            step = jax.jit(apply, donate_argnums=(1, 2), out_shardings=shardings)
            compiled = step.lower(gradients, state, params).compile()
            self._compiled[update] = compiled, time.perf_counter() - start
        return self._compiled[update]


class Run:
    """The training of one optimizer with one seed, its losses and its costs.

    `steps`, `losses` and `seconds` have one number for each evaluation, `model_seconds` and `update_seconds`
    one for each step.
    """

    def __init__(self, compiled: CompiledTask, optimizer: optax.GradientTransformation, seed: int):
        self.compiled, self.seed = compiled, seed
        self.params = _copy(compiled.task.init(seed))
        self.state = _copy(optimizer.init(self.params))
        self.batches: Iterator[Any] = compiled.task.batches(seed)
        self.steps: list[int] = [0]
        self.losses: list[float] = [compiled.held_out_loss(self.params)]
        self.seconds: list[float] = [0.0]
        self.model_seconds: list[float] = []
        self.update_seconds: list[float] = []
        self.kept_update: Any = None
        self._update = jax.jit(optimizer.update)
        self._batch = next(self.batches)
        _, gradients = jax.block_until_ready(compiled.gradient(self.params, self._batch))
        self._apply, self.compile_seconds = compiled.compile(
            optimizer.update, gradients, self.state, self.params
        )

    @property
    def step(self) -> int:
        return len(self.update_seconds)

    @property
    def step_seconds(self) -> list[float]:
        return [sum(pair) for pair in zip(self.model_seconds, self.update_seconds, strict=True)]

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.losses[-1])

    @property
    def state_bytes_per_parameter(self) -> float:
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state)) / size

    def take_step(self, keep_update: bool = False) -> None:
        """Compute and time one gradient and one update; optionally keep the update, which is not timed."""
        start = time.perf_counter()
        _, gradients = jax.block_until_ready(self.compiled.gradient(self.params, self._batch))
        self.model_seconds.append(time.perf_counter() - start)
        if keep_update:
            self.kept_update, _ = jax.block_until_ready(self._update(gradients, self.state, self.params))
        start = time.perf_counter()
        self.state, self.params = jax.block_until_ready(self._apply(gradients, self.state, self.params))
        self.update_seconds.append(time.perf_counter() - start)
        self._batch = next(self.batches)

    def warm_up(self) -> None:
        """Take some untimed steps on copies, because the first calls of a compiled program are slow."""
        params, state = _copy((self.params, self.state))
        for _ in range(WARM_UP_STEPS):
            _, gradients = self.compiled.gradient(params, self._batch)
            state, params = jax.block_until_ready(self._apply(gradients, state, params))

    def evaluate(self) -> None:
        if self.step > self.steps[-1]:
            self.steps.append(self.step)
            self.losses.append(self.compiled.held_out_loss(self.params))
            self.seconds.append(sum(self.step_seconds))


def _copy(tree: Any) -> Any:
    """Copy every array of a tree: the compiled update donates buffers, which must not be used elsewhere."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, tree)


def _sharding(x: Any) -> Any:
    """The sharding of an array that was committed to devices; None for any other leaf."""
    return x.sharding if isinstance(x, jax.Array) and x.committed else None


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
