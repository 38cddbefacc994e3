"""SOAP and Muon in one: the polar factor of a momentum that is divided by its size in the eigenbasis."""

from typing import Unpack

from optimorph._core.types import Numeric, ScalarOrSchedule
from optimorph._recipes.moments import identity, stored
from optimorph._recipes.of_matrices import PolarArguments, of_polar_factors
from optimorph._recipes.recipe import Recipe, recipe
from optimorph._recipes.soap import EigenbasisArguments, basis
from optimorph._transforms.averages import ema
from optimorph._transforms.combine import chain, divide
from optimorph._transforms.matrices import Scale
from optimorph._transforms.pointwise import root, square


class Arguments(PolarArguments, EigenbasisArguments, total=False):
    """Those of `muon` and of `soap`."""


@recipe
def soap_muon(
    learning_rate: ScalarOrSchedule,
    momentum: Numeric = 0.95,
    b2: Numeric = 0.9,
    eps: Numeric = 1e-12,
    *,
    nesterov: bool = True,
    every: int = 1,
    max_dim: int | None = 10_000,
    weight_decay: ScalarOrSchedule = 0.0,
    scale: Scale = "keller",
    **arguments: Unpack[Arguments],
) -> Recipe:
    """SOAP-Muon: momentum is normalized as in SOAP, and then replaced by its polar factor as in Muon.

        in_eigenbasis(identity / (square → ema → root), average=ema(nesterov))
          → orthogonalize → scale_by_shape → add_decayed_weights → scale_by_learning_rate

    The normalization divides the momentum by its running root mean square, in the eigenbasis of the
    gradient's factors. The first step is a step of Muon.

    Args:
      every, max_dim, factor_decay, spread, refresh_warmup, block_size, factor_dtype: as in `soap`.
      scale, arguments: as in `muon`.

    Raises:
      ValueError: the errors of `soap`.

    Equals:
      Muon(lr=learning_rate, mu=momentum) of KellerJordan/modded-nanogpt,
        records/track_3_optimization/results/20260609_soap_f1_auxb2_clean/train_gpt_clean_SOTA.py at 5f2f59c,
        without its extras, from the same first basis, with the polar factor computed alike
    References:
      Jordan et al., modded-nanogpt, track 3, records 44 to 46.
    """
    second = chain(square(), stored(ema, b2, dtype=arguments.get("nu_dtype")), root(eps))
    average = ema(momentum, nesterov=nesterov, dtype=arguments.get("mu_dtype"))
    quotient = divide(identity, by=second)
    matrices, others = basis(
        "soap_muon", quotient, b2, every, max_dim, arguments, average=average, skip_first=False
    )
    return of_polar_factors(
        "soap_muon", matrices, learning_rate=learning_rate, weight_decay=weight_decay, scale=scale, **others
    )
