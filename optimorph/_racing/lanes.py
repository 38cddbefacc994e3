"""Several learning rates in one program: side by side, or one after another."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._racing.contestants import Rates
from optimorph._racing.task import Task

Maker = Callable[[Rates], optax.GradientTransformation]


def by_turns(make: Maker, points: Sequence[Rates]) -> list[optax.GradientTransformation]:
    """An optimizer a point, with the rates as arrays in its state: one `update` that need not recompile."""

    def update(updates, state, params=None):
        rates, inner = state
        updates, inner = make(rates).update(updates, inner, params)
        return updates, (rates, inner)

    def starting(rates: Rates) -> Any:
        return lambda params: (rates, make(rates).init(params))

    return [optax.GradientTransformation(starting(_arrays(rates)), update) for rates in points]


def side_by_side(make: Maker, points: Sequence[Rates]) -> optax.GradientTransformation:
    """One optimizer of as many lanes as there are points; all its arrays have an axis of lanes in front."""
    stacked = jax.tree.map(lambda *rates: jnp.stack(rates), *map(_arrays, points))

    def init(params):
        return stacked, jax.vmap(lambda rates, p: make(rates).init(p))(stacked, params)

    def update(updates, state, params=None):
        rates, inner = state
        each = jax.vmap(lambda rates, g, s, p: make(rates).update(g, s, p))
        updates, inner = each(rates, updates, inner, params)
        return updates, (rates, inner)

    return optax.GradientTransformation(init, update)


def widened(task: Task, lanes: int) -> Task:
    """The task in so many lanes; its loss is their sum, so that each lane's gradient is its own."""

    def init(seed):
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (lanes, *jnp.shape(x))), task.init(seed))

    def loss(params, batch):
        return jnp.sum(jax.vmap(task.loss, (0, None))(params, batch))

    return dataclasses.replace(task, init=init, loss=loss)


def losses(task: Task, part: str, params: Any) -> np.ndarray:
    """Each lane's mean loss over the held-out batches."""
    each = jax.jit(jax.vmap(task.loss, (0, None)))
    return np.mean([np.asarray(each(params, batch)) for batch in task.held_out(part)], axis=0)


def lane_bytes(task: Task, make: Maker, rates: Rates) -> int:
    """Bytes of one lane, by shapes: parameters, gradients, updates, state, and what the loss keeps."""

    def parts(rates, params, batch):
        optimizer = make(rates)
        updates, state = optimizer.update(params, optimizer.init(params), params)
        _, pullback = jax.vjp(lambda p: task.loss(p, batch), params)
        return params, params, updates, state, pullback

    shapes = jax.eval_shape(parts, _arrays(rates), task.init(0), next(task.batches(0)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _arrays(rates: Rates) -> Rates:
    return jax.tree.map(lambda rate: jnp.asarray(rate, jnp.float32), rates)
