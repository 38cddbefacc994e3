"""MuonH: Muon whose matrices keep their norms."""

from typing import Unpack

from optimorph._core.types import Numeric, ScalarOrSchedule
from optimorph._recipes.of_matrices import PolarArguments, of_polar_factors
from optimorph._recipes.recipe import Recipe, recipe
from optimorph._transforms.averages import ema
from optimorph._transforms.hyperball import hyperball


@recipe
def muonh(
    learning_rate: ScalarOrSchedule,
    momentum: Numeric = 0.95,
    *,
    nesterov: bool = True,
    weight_decay: ScalarOrSchedule = 0.0,
    **arguments: Unpack[PolarArguments],
) -> Recipe:
    """MuonH: a step along the polar factor of the momentum that keeps the norm of every matrix.

        ema(nesterov) → orthogonalize → hyperball(η)

    The learning rate is the angle of a step, in radians. Matrices need no weight decay. A learning rate of
    about √(η λ) corresponds to Muon with the learning rate η and the decay λ.

    Args:
      weight_decay, weight_decay_form, mask: those of the AdamW for other leaves. Matrices have no decay.
      arguments: as in `muon`.

    Raises:
      ValueError: as `muon`.

    Equals:
      MuonHConfig(learning_rate=learning_rate, momentum=momentum, nesterov=nesterov) of marin-levanter,
        levanter/optim/muonh.py at 0.2.227.dev40316220070, with the polar factor computed alike
    References:
      Wen et al. 2026, "Hyperball optimization", arXiv:2606.16899.
    """
    return of_polar_factors(
        "muonh",
        ema(momentum, nesterov=nesterov, dtype=arguments.get("mu_dtype")),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        last=hyperball(learning_rate),
        **arguments,
    )
