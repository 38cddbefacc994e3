"""A sweep: train with several learning rates, and compare the losses on held-out data."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._racing.race_data import Trial
from optimorph._racing.registry import LearningRates
from optimorph._racing.task import Task
from optimorph._racing.training import CompiledTask, Run

SEED = 1000  # no race uses it
NEEDS_NUMBER = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError)
"""Errors of a function that needs the learning rate as a number, for example because it compares the rate."""

MakeOptimizer = Callable[[LearningRates], optax.GradientTransformation]
Candidates = Sequence[LearningRates]


@dataclasses.dataclass
class Sweep:
    """Tries learning rates of several optimizers on one task, evaluated by a part of its held-out data.

    All rates of an optimizer train in one vmapped program if that needs at most `max_bytes`. Otherwise they
    train one after another, in one program if the rate can be a traced array, in one program each if not.

    Rates that train one after another pause at each of `rungs`, which are shares of the steps. Only the
    better half of them goes on from there (successive halving; Jamieson & Talwalkar, 2016, arXiv:1502.07943).
    Parameters and state of all of them are then in memory at once.

    Once `stop` is set, the sweep ends after the current step, and the trials of a vmapped program count.
    """

    task: Task
    part: str
    steps: int
    stop: threading.Event
    max_bytes: int
    on_trial: Callable[[Trial], None]
    rungs: Sequence[float] = ()

    def __post_init__(self):
        self.compiled = CompiledTask(self.task, self.part)

    def run(self, makers: Mapping[str, MakeOptimizer], candidates: Mapping[str, Candidates]) -> list[Trial]:
        trials: list[Trial] = []
        for name, rates in candidates.items():
            if not self.stop.is_set():
                trials += self._try_rates(name, makers[name], rates)
        return trials

    def _try_rates(self, name: str, make: MakeOptimizer, candidates: Candidates) -> list[Trial]:
        try:
            total = len(candidates) * bytes_per_rate(self.task, make, candidates[0])
        except NEEDS_NUMBER:
            return self._train_sequential(name, candidates, [make(rates) for rates in candidates])
        if len(candidates) > 1 and total <= self.max_bytes:
            return self._train_vmapped(name, candidates, vmapped(make, candidates))
        return self._train_sequential(name, candidates, sequential(make, candidates))

    def _train_vmapped(self, name, candidates, optimizer):
        compiled = CompiledTask(vmapped_task(self.task, len(candidates)), self.part)
        run = self._train(Run(compiled, optimizer, SEED), self.steps)
        if not run.step:
            return []
        losses = _vmapped_losses(self.task, self.part, run.params).tolist()
        return [self._trial(name, r, loss, run.step) for r, loss in zip(candidates, losses, strict=True)]

    def _train_sequential(self, name, candidates, optimizers):
        trials = []
        runs = zip(candidates, (Run(self.compiled, optimizer, SEED) for optimizer in optimizers), strict=True)
        for share in (*self.rungs, 1.0):
            runs, paused = self._train_all(runs, max(1, round(share * self.steps))), []
            for rates, run in runs:
                if share == 1.0:
                    trials.append(self._trial(name, rates, run.losses[-1], run.step))
                else:
                    paused.append((rates, run))
            if self.stop.is_set():
                break
            paused.sort(key=lambda pair: (pair[1].diverged, pair[1].losses[-1]))
            half = -(-len(paused) // 2)
            trials += [self._trial(name, rates, run.losses[-1], run.step) for rates, run in paused[half:]]
            runs = paused[:half]
        return sorted(trials, key=lambda trial: candidates.index(trial.rates))

    def _train_all(self, runs, steps):
        """Each of the runs after so many steps, until the sweep is stopped."""
        for rates, run in runs:
            self._train(run, steps)
            if self.stop.is_set():
                return
            run.evaluate()
            yield rates, run

    def _train(self, run: Run, steps: int) -> Run:
        while run.step < steps and not self.stop.is_set():
            run.take_step()
        return run

    def _trial(self, name: str, rates: LearningRates, loss: float, steps: int) -> Trial:
        trial = Trial(name, rates.learning_rate, rates.others, loss, steps)
        self.on_trial(trial)
        return trial


def best_rates(trials: Sequence[Trial], name: str) -> LearningRates:
    """An optimizer's learning rates of the lowest loss, of those that trained for the most steps."""
    own = [trial for trial in trials if trial.optimizer == name]
    return min(own, key=lambda trial: (-trial.steps, trial.finite_or_inf)).rates


def sequential(make: MakeOptimizer, candidates: Candidates) -> list[optax.GradientTransformation]:
    """One optimizer for each candidate. All share one `update`, so that it is compiled only once."""
    init, update = _rates_in_state(make)
    inits = [functools.partial(init, _as_arrays(rates)) for rates in candidates]
    return [optax.GradientTransformation(init, update) for init in inits]


def vmapped(make: MakeOptimizer, candidates: Candidates) -> optax.GradientTransformation:
    """One optimizer for all candidates; the first axis of all its arrays is the candidate."""
    init, update = _rates_in_state(make)
    stacked = jax.tree.map(lambda *rates: jnp.stack(rates), *map(_as_arrays, candidates))
    return optax.GradientTransformation(functools.partial(jax.vmap(init), stacked), jax.vmap(update))


def _rates_in_state(make: MakeOptimizer) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`init(rates, params)` and `update` of an optimizer that keeps its learning rates in its state."""

    def init(rates, params):
        return rates, make(rates).init(params)

    def update(updates, state, params=None):
        rates, inner = state
        updates, inner = make(rates).update(updates, inner, params)
        return updates, (rates, inner)

    return init, update


def vmapped_task(task: Task, size: int) -> Task:
    """The task with `size` copies of the parameters.

    The loss is the sum over the copies, so that the gradient of each copy is that of its own loss.
    """

    def init(seed):
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *jnp.shape(x))), task.init(seed))

    def loss(params, batch):
        return jnp.sum(jax.vmap(task.loss, (0, None))(params, batch))

    return dataclasses.replace(task, init=init, loss=loss)


def _vmapped_losses(task: Task, part: str, params: Any) -> np.ndarray:
    loss = jax.jit(jax.vmap(task.loss, (0, None)))
    return np.mean([np.asarray(loss(params, batch)) for batch in task.held_out(part)], axis=0)


def bytes_per_rate(task: Task, make: MakeOptimizer, rates: LearningRates) -> int:
    """An estimate, from shapes alone, of the memory that one learning rate needs in a vmapped program.

    It counts parameters, gradients, updates, state, and what the loss keeps for its gradient.
    """

    def arrays(rates, params, batch):
        optimizer = make(rates)
        updates, state = optimizer.update(params, optimizer.init(params), params)
        _, pullback = jax.vjp(lambda p: task.loss(p, batch), params)
        return params, params, updates, state, pullback  # gradients have the shapes of parameters

    shapes = jax.eval_shape(arrays, _as_arrays(rates), task.init(0), next(task.batches(0)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _as_arrays(rates: LearningRates) -> LearningRates:
    return jax.tree.map(lambda rate: jnp.asarray(rate, jnp.float32), rates)
