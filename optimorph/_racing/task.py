"""A task: a model, its data and how to train it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import optax

from optimorph._core.types import Schedule


def warmup_cosine(peak: float, steps: int) -> Schedule:
    """Linear warm-up to the peak over a tenth of the steps, then a cosine decay to zero."""
    unit = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 10), max(2, steps))
    return lambda count: peak * unit(count)


@dataclass(frozen=True)
class Task:
    """A model, its data and how to train it.

    Args:
      batches: function seed → endless iterator of training batches.
      held_out: function "tuning" or "validation" → batches that are not trained on.
      schedule: function (peak learning rate, steps) → schedule.
      momentum: "momentum" and "nesterov" → the momentum of that optimizer.
      weight_decay: the weight decay of matrices, for `adamw` and `muon`.
      theory: optimizer → a learning rate that theory gives, which needs no tuning.
      log_loss: whether plots have a logarithmic loss axis; None: the range of the losses decides.
      package: a package that has the data and is not in the extra `race`.
    """

    name: str
    title: str
    measure: str
    init: Callable[[int], Any]
    loss: Callable[[Any, Any], jax.Array]
    batches: Callable[[int], Iterator[Any]]
    held_out: Callable[[str], Sequence[Any]]
    steps: int
    schedule: Callable[[float, int], Schedule] = warmup_cosine
    momentum: Mapping[str, float] = field(default_factory=lambda: {"momentum": 0.9, "nesterov": 0.9})
    weight_decay: float = 0.1
    theory: Mapping[str, float] = field(default_factory=dict)
    log_loss: bool | None = None
    package: str | None = None
