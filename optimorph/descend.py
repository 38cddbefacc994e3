"""The last words of a sentence: how weights decay, and the step."""

import optax

from optimorph.core.types import Mask, ScalarOrSchedule
from optimorph.transforms.add_decayed_weights import add_decayed_weights
from optimorph.transforms.scale_by_learning_rate import scale_by_learning_rate

FORMS = ("coupled", "independent", "cautious")


def descend(
    who: str, learning_rate: ScalarOrSchedule, weight_decay: ScalarOrSchedule, mask: Mask | None, form: str
) -> tuple[optax.GradientTransformation, ...]:
    """Decoupled weight decay in one of its forms, and the learning rate.

        u = -η (g + λ w)                  (1)  "coupled", as in PyTorch and optax
        u = -η g - λ w                    (2)  "independent" of the learning rate
        u = -η (g + λ w [g w ≥ 0])        (3)  "cautious": where the step itself shrinks the weight

    References:
      (1), (2) Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, where λ is multiplied by the schedule
      but not by the learning rate; (3) Chen et al. 2025, "Cautious weight decay", arXiv:2510.12402.
    """
    if form not in FORMS:
        raise ValueError(
            f"{who}: no form of weight decay is called {form!r}. Type one of {', '.join(map(repr, FORMS))}."
        )
    step = scale_by_learning_rate(learning_rate)
    decay = add_decayed_weights(weight_decay, mask, cautious=form == "cautious")  # (3)
    if form == "independent":
        return step, optax.scale(-1.0), decay, optax.scale(-1.0)  # (2)
    return decay, step  # (1)
