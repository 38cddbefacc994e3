"""What a race needs to know of a model and its data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import optax

from optimorph.core.types import Schedule


def warmup_cosine(peak: float, steps: int) -> Schedule:
    """A tenth of the steps up to the peak, then half a cosine down to zero."""
    unit = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 10), max(2, steps))
    return lambda count: peak * unit(count)


@dataclass(frozen=True)
class Task:
    """A model, its data and how long to train it.

    Args:
      name: as typed on the command line.
      title: what is trained, for headings.
      measure: what the loss is, with its unit.
      init: seed → parameters.
      loss: (parameters, batch) → scalar.
      batches: seed → endless training batches.
      held_out: "tuning" or "validation" → batches that are never trained on.
      steps: of training, unless the user says otherwise.
      schedule: (peak learning rate, steps) → schedule.
      momentum: of `momentum` and `nesterov`, by name.
      weight_decay: of matrices, for `adamw` and `muon`.
      theory: learning rates that are known and need no tuning, by optimizer.
      log_loss: whether the loss axis of pictures is logarithmic; None: the range of the losses decides.
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
