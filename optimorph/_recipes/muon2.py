"""Muon²: Adam's quotient in front of the polar factor."""

from typing import Unpack

from optimorph._core.types import Numeric, ScalarOrSchedule
from optimorph._recipes.moments import stored
from optimorph._recipes.of_matrices import PolarArguments, of_polar_factors
from optimorph._recipes.recipe import Recipe, recipe
from optimorph._transforms.averages import ema
from optimorph._transforms.combine import chain, divide
from optimorph._transforms.matrices import Scale
from optimorph._transforms.pointwise import root, square


@recipe
def muon2(
    learning_rate: ScalarOrSchedule,
    momentum: Numeric = 0.95,
    b2: Numeric = 0.95,
    eps: Numeric = 1e-10,
    *,
    nesterov: bool = True,
    weight_decay: ScalarOrSchedule = 0.0,
    scale: Scale = "keller",
    **arguments: Unpack[PolarArguments],
) -> Recipe:
    """Muon²: the polar factor of the momentum divided by the root of the gradients' second moment.

        v ← b2 v + (1 - b2) g²        (1)
        O = polar(m / (√v + ε))       (2)

    m is the average of the gradients; with `nesterov` it looks one step ahead. The bias of neither average is
    corrected, because the polar factor does not depend on the scale.

    The defaults are those of the published program. The record that it set has a learning rate of 0.1 and a
    weight decay of 0.0125.

    Args:
      b2: the decay of the second moment, which has the parameters' shape and is stored in `nu_dtype`.
      weight_decay_form: as in `adamw`.
      scale, arguments: as in `muon`.

    Raises:
      ValueError: as `muon`.

    Equals:
      MuonSq(lr=learning_rate, weight_decay=weight_decay, mu=momentum, beta2=b2, eps=eps) of
        KellerJordan/modded-nanogpt,
        records/track_3_optimization/results/20260501_muonsq/train_gpt_simple_muonsq.py at c855482, with the
        polar factor computed alike
    References:
      Muon² 2026, arXiv:2604.09967.
    """
    return of_polar_factors(
        "muon2",
        divide(
            ema(momentum, nesterov=nesterov, dtype=arguments.get("mu_dtype")),
            by=chain(square(), stored(ema, b2, dtype=arguments.get("nu_dtype")), root(eps)),
        ),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        scale=scale,
        **arguments,
    )
