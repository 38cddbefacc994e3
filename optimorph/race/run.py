"""One optimizer trains one model, step by step, with the model's time and the optimizer's kept apart."""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

from optimorph.race.task import Task


@dataclasses.dataclass
class Track:
    """The compiled model of a task, shared by all who race on it."""

    task: Task
    part: str = "validation"

    def __post_init__(self):
        """Compile nothing yet."""
        self.gradient = jax.jit(jax.value_and_grad(self.task.loss))
        self._loss = jax.jit(self.task.loss)
        self._held_out = self.task.held_out(self.part)

    def evaluate(self, params: Any) -> float:
        """The mean loss over the held-out batches."""
        return float(np.mean([self._loss(params, batch) for batch in self._held_out]))


class Run:
    """One optimizer, one seed: what it has reached and what it cost."""

    def __init__(self, track: Track, optimizer: optax.GradientTransformation, seed: int):
        """Make parameters and state, and compile the update (whose time is kept)."""
        self.track, self.seed = track, seed
        self.params = track.task.init(seed)
        self.state = optimizer.init(self.params)
        self.batches: Iterator[Any] = track.task.batches(seed)
        self.steps: list[int] = [0]
        self.losses: list[float] = [track.evaluate(self.params)]
        self.seconds: list[float] = [0.0]
        self.model_seconds: list[float] = []
        self.update_seconds: list[float] = []

        def apply(gradients, state, params):
            updates, state = optimizer.update(gradients, state, params)
            return state, optax.apply_updates(params, updates)

        self._batch = next(self.batches)
        jax.block_until_ready(track.gradient(self.params, self._batch))  # compiled once for all runs
        started = time.perf_counter()
        lowered = jax.jit(apply, donate_argnums=(1, 2)).lower(self.params, self.state, self.params)
        self._apply = lowered.compile()
        self.compile_seconds = time.perf_counter() - started

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.update_seconds)

    @property
    def diverged(self) -> bool:
        """Whether the loss is no longer a number."""
        return not math.isfinite(self.losses[-1])

    @property
    def state_bytes_per_parameter(self) -> float:
        """Bytes of optimizer state for each parameter of the model."""
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state)) / size

    def take_step(self) -> None:
        """One gradient, one update, each timed to its end."""
        start = time.perf_counter()
        _, gradients = jax.block_until_ready(self.track.gradient(self.params, self._batch))
        middle = time.perf_counter()
        self.state, self.params = jax.block_until_ready(self._apply(gradients, self.state, self.params))
        end = time.perf_counter()
        self.model_seconds.append(middle - start)
        self.update_seconds.append(end - middle)
        self._batch = next(self.batches)

    def look(self) -> None:
        """Add the held-out loss to the curve, unless it is there already."""
        if self.step > self.steps[-1]:
            self.steps.append(self.step)
            self.losses.append(self.track.evaluate(self.params))
            self.seconds.append(sum(self.model_seconds) + sum(self.update_seconds))
