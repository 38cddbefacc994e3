"""Tasks in which a model tells the classes of examples."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from optimorph._racing.task import Task

Parts = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Part of the data → inputs and classes."""


def classification(model: Callable[[nnx.Rngs], Any], **about: Any) -> Task:
    """The task of a module with cross-entropy as loss; `about` are the other arguments of `Task`."""
    graph = nnx.graphdef(model(nnx.Rngs(0)))

    def loss(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, params)(x), y).mean()

    return Task(init=lambda seed: nnx.state(model(nnx.Rngs(seed)), nnx.Param), loss=loss, **about)


def examples(load: Callable[[], Parts], batch_size: int) -> dict[str, Any]:
    """The data as arguments of `Task`: batches that are drawn with replacement, and whole held-out parts.

    `load` is called when data is needed. It returns the parts "train", "tuning" and "validation".
    """

    def batches(seed):
        x, y = load()["train"]
        rng = np.random.default_rng(seed)
        while True:
            chosen = rng.integers(0, len(x), batch_size)
            yield x[chosen], y[chosen]

    return {"batches": batches, "held_out": lambda part: [load()[part]]}
