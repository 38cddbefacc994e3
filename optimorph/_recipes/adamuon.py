"""AdaMuon: polar factors of signs, divided by their own root mean squares."""

from typing import Unpack

from optimorph._core.types import Numeric, ScalarOrSchedule
from optimorph._recipes.moments import identity, stored
from optimorph._recipes.of_matrices import PolarArguments, of_polar_factors
from optimorph._recipes.recipe import Recipe, recipe
from optimorph._transforms.averages import ema
from optimorph._transforms.combine import chain, divide
from optimorph._transforms.matrices import Scale, scale_by_shape
from optimorph._transforms.means import mean
from optimorph._transforms.pointwise import root, sign, square


@recipe
def adamuon(
    learning_rate: ScalarOrSchedule,
    momentum: Numeric = 0.95,
    b2: Numeric = 0.95,
    eps: Numeric = 1e-8,
    *,
    nesterov: bool = True,
    weight_decay: ScalarOrSchedule = 0.01,
    scale: Scale = "adamw_rms",
    **arguments: Unpack[PolarArguments],
) -> Recipe:
    """AdaMuon: the polar factor of the momentum's signs, divided by the root of its own second moment.

        O = polar(sign(m))                                (1)
        v ← b2 v + (1 - b2) O²                            (2)
        D = O / (√v + ε)                                  (3)
        u = √min(in, out) D / ‖D‖                         (4)

    (4) restores the norm of a polar factor. With `scale="adamw_rms"` the root mean square of each update is
    0.2. The bias of v needs no correction, because (4) cancels it. The published program has this form since
    August 2025. The paper has no signs, and corrects the bias of v.

    Args:
      b2: the decay of the second moment, which has the parameters' shape and is stored in `nu_dtype`.
      weight_decay_form: as in `adamw`.
      scale, arguments: as in `muon`.

    Raises:
      ValueError: as `muon`.

    Equals:
      AdaMuon(lr=learning_rate, weight_decay=weight_decay, momentum=momentum, eps=eps) of Chongjie-Si/AdaMuon,
        gpt2/models/optimizers/adamuon.py at 369f0b3, for b2=momentum, with the polar factor computed alike
    References:
      Si et al. 2025, "AdaMuon: Adaptive Muon optimizer", arXiv:2507.11005.
    """
    second = chain(square(), stored(ema, b2, dtype=arguments.get("nu_dtype")), root(eps))
    return of_polar_factors(
        "adamuon",
        chain(ema(momentum, nesterov=nesterov, dtype=arguments.get("mu_dtype")), sign()),
        divide(identity, by=second),  # (3)
        divide(identity, by=chain(square(), mean("io"), root())),
        scale_by_shape(lambda inputs, outputs: max(inputs, outputs) ** -0.5),  # (4)
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        scale=scale,
        **arguments,
    )
