"""One optimizer trains one model, step by step, with the model's time and the optimizer's kept apart."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

from optimorph._racing.task import Task

WARM_UP = 3  # steps that are not timed


@dataclasses.dataclass
class Track:
    """The compiled model of a task and the compiled updates, shared by all who race on it."""

    task: Task
    part: str = "validation"

    def __post_init__(self):
        """Compile nothing yet."""
        self.gradient = jax.jit(jax.value_and_grad(self.task.loss))
        self._loss = jax.jit(self.task.loss)
        self._held_out = self.task.held_out(self.part)
        self._compiled: dict[Callable[..., Any], tuple[Callable[..., Any], float]] = {}

    def evaluate(self, params: Any) -> float:
        """The mean loss over the held-out batches."""
        return float(np.mean([self._loss(params, batch) for batch in self._held_out]))

    def compile(
        self, update: Callable[..., Any], gradients: Any, state: Any, params: Any
    ) -> tuple[Callable[..., Any], float]:
        """(gradients, state, params) → (state, params), and the seconds it took: once for every `update`.

        State and parameters stay where they lie, on one device or divided over a mesh.
        """

        def apply(gradients, state, params):
            updates, state = update(gradients, state, params)
            return state, optax.apply_updates(params, updates)

        if update not in self._compiled:
            started = time.perf_counter()
            places = jax.tree.map(_place, (state, params))
            step = jax.jit(apply, donate_argnums=(1, 2), out_shardings=places)
            compiled = step.lower(gradients, state, params).compile()
            self._compiled[update] = compiled, time.perf_counter() - started
        return self._compiled[update]


class Run:
    """One optimizer, one seed: what it has reached and what it cost."""

    def __init__(self, track: Track, optimizer: optax.GradientTransformation, seed: int):
        """Make parameters and state, and compile the update (whose time is kept)."""
        self.track, self.seed = track, seed
        self.params = _own(track.task.init(seed))
        self.state = _own(optimizer.init(self.params))
        self.batches: Iterator[Any] = track.task.batches(seed)
        self.steps: list[int] = [0]
        self.losses: list[float] = [track.evaluate(self.params)]
        self.seconds: list[float] = [0.0]
        self.model_seconds: list[float] = []
        self.update_seconds: list[float] = []
        self.kept: Any = None  # the last update that was asked for
        self._update = jax.jit(optimizer.update)
        self._batch = next(self.batches)
        _, gradients = jax.block_until_ready(track.gradient(self.params, self._batch))  # once for all runs
        self._apply, self.compile_seconds = track.compile(
            optimizer.update, gradients, self.state, self.params
        )

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.update_seconds)

    @property
    def step_seconds(self) -> list[tuple[float, float]]:
        """For every step, the seconds of the gradient and the seconds of the update."""
        return list(zip(self.model_seconds, self.update_seconds, strict=True))

    @property
    def diverged(self) -> bool:
        """Whether the loss is no longer a number."""
        return not math.isfinite(self.losses[-1])

    @property
    def state_bytes_per_parameter(self) -> float:
        """Bytes of optimizer state for each parameter of the model."""
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.state)) / size

    def take_step(self, keep: bool = False) -> None:
        """One gradient, one update, each timed to its end; the update is kept if asked, in no one's time."""
        start = time.perf_counter()
        _, gradients = jax.block_until_ready(self.track.gradient(self.params, self._batch))
        self.model_seconds.append(time.perf_counter() - start)
        if keep:
            self.kept, _ = jax.block_until_ready(self._update(gradients, self.state, self.params))
        start = time.perf_counter()
        self.state, self.params = jax.block_until_ready(self._apply(gradients, self.state, self.params))
        self.update_seconds.append(time.perf_counter() - start)
        self._batch = next(self.batches)

    def warm_up(self) -> None:
        """Take some untimed steps on copies, because the first calls of a compiled program are slow."""
        params, state = _own((self.params, self.state))
        for _ in range(WARM_UP):
            _, gradients = self.track.gradient(params, self._batch)
            state, params = jax.block_until_ready(self._apply(gradients, state, params))

    def look(self) -> None:
        """Add the held-out loss to the curve, unless it is there already."""
        if self.step > self.steps[-1]:
            self.steps.append(self.step)
            self.losses.append(self.track.evaluate(self.params))
            self.seconds.append(sum(self.model_seconds) + sum(self.update_seconds))


def _own(tree: Any) -> Any:
    """Copies: every step gives its arrays away, so nobody else may hold them, nor one be there twice."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, tree)


def _place(x: Any) -> Any:
    """Where an array was put; None where nobody put it."""
    return x.sharding if isinstance(x, jax.Array) and x.committed else None
