"""NorMuon: Muon whose neurons all move by about as much."""

from typing import Unpack

import jax.numpy as jnp
import optax

from optimorph._core.checks import is_one_of
from optimorph._core.numbers import as_scalar
from optimorph._core.rule import pointwise, transform
from optimorph._core.shown import shown
from optimorph._core.types import Numeric, ScalarOrSchedule
from optimorph._recipes.moments import identity
from optimorph._recipes.of_matrices import PolarArguments, of_polar_factors
from optimorph._recipes.recipe import Recipe, recipe
from optimorph._transforms.averages import ema
from optimorph._transforms.combine import add, chain, divide
from optimorph._transforms.matrices import Scale
from optimorph._transforms.means import keep_norm, mean
from optimorph._transforms.pointwise import root, square


@recipe
def normuon(
    learning_rate: ScalarOrSchedule,
    momentum: Numeric = 0.95,
    b2: Numeric = 0.95,
    eps: Numeric = 1e-10,
    *,
    average: str = "inputs",
    nesterov: bool = True,
    weight_decay: ScalarOrSchedule = 0.0,
    scale: Scale = "keller",
    **arguments: Unpack[PolarArguments],
) -> Recipe:
    """NorMuon: polar factors whose rows are divided by their running root mean squares.

        v_o ← b2 v_o + (1 - b2) mean_i O_io²        (1)
        u = ‖O‖ / ‖Ô‖ Ô,  Ô_io = O_io / (√v_o + ε)  (2)

    O is the polar factor of the momentum; o counts outputs and i counts inputs. In an exact polar factor with
    no more outputs than inputs all v_o are equal, and (2) changes nothing. With `average="shorter"` the mean
    is taken over the shorter side of each matrix.

    Args:
      b2: the decay of the second moments v. There is one for each output. Their bias is not corrected.
      eps: ε. With `average="shorter"`, ε is the lower bound of v, and nothing is added to √v.
      average: "inputs", as in the paper; or "shorter", as in the speedruns of GPT-2 and NVIDIA's
        Emerging-Optimizers.
      weight_decay_form: as in `adamw`.
      scale, arguments: as in `muon`.

    Raises:
      ValueError: another `average`; as `muon`.

    Equals:
      SingleDeviceNorMuon(lr=learning_rate, weight_decay=weight_decay, momentum=momentum, beta2=b2) of
        zichongli5/NorMuon, normuon.py at d45c9a4, with the polar factor computed alike
      NorMuon(lr=learning_rate, weight_decay=weight_decay, mu=momentum) of KellerJordan/modded-nanogpt,
        records/track_3_optimization/results/20260503_normuon/08ffadff-3576-496b-9795-2dc5cf8f4f46.txt at
        a584325, with average="shorter" and the polar factor computed alike
    References:
      Li et al. 2025, "NorMuon: Making Muon more efficient and scalable", arXiv:2510.05491, algorithm 1.
    """
    return of_polar_factors(
        "normuon",
        ema(momentum, nesterov=nesterov, dtype=arguments.get("mu_dtype")),
        keep_norm(divide(identity, by=_second_moment(average, b2, eps))),  # (1), (2)
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        scale=scale,
        **arguments,
    )


def _second_moment(average: str, b2: Numeric, eps: Numeric) -> optax.GradientTransformation:
    """The root of the mean squares of rows, or along the longer side of each matrix."""
    if not is_one_of(average, ("inputs", "shorter")):
        raise ValueError(
            f"normuon: average must be 'inputs' or 'shorter', but is {shown(average)}. Type average='inputs'."
        )
    if average == "inputs":
        return chain(square(), mean("i", ema(b2)), root(eps))
    inputs = mean("i", ema(b2), where=lambda inputs, outputs: inputs <= outputs)
    outputs = mean("o", ema(b2), where=lambda inputs, outputs: inputs > outputs)
    at_least = transform("normuon", pointwise(lambda v: jnp.maximum(v, as_scalar(eps, v))))
    return chain(square(), add(inputs, outputs), at_least, root())
