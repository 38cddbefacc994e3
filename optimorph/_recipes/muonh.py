"""MuonH: Muon whose matrices keep their norms."""

from collections.abc import Callable

import jax
import optax

from optimorph._core.types import AxesRules, DTypeLike, Mask, Numeric, Rules, ScalarOrSchedule
from optimorph._recipes.of_matrices import of_matrices
from optimorph._recipes.recipe import Recipe, recipe
from optimorph._transforms.averages import ema
from optimorph._transforms.hyperball import hyperball
from optimorph._transforms.matrices import orthogonalize


@recipe
def muonh(
    learning_rate: ScalarOrSchedule,
    momentum: Numeric = 0.95,
    *,
    nesterov: bool = True,
    orthogonalizer: Callable[[jax.Array], jax.Array] | None = None,
    axes: AxesRules | None = None,
    others: optax.GradientTransformation | None = None,
    others_learning_rate: ScalarOrSchedule | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    state: str | Rules | None = None,
    shardings: Rules | None = None,
    comm_dtype: DTypeLike | None = None,
) -> Recipe:
    """MuonH: the polar factor of the momentum as a step that keeps the norm of every matrix.

        ema(nesterov) → orthogonalize → hyperball(η)

    The learning rate is an angle, and no weight decay is needed. Where a Muon has the learning rate η and the
    decay λ, a learning rate near √(η λ) does as much here.

    Args:
      orthogonalizer, axes, others, others_learning_rate, mu_dtype, nu_dtype, state, shardings, comm_dtype: as
        those of `muon`.
      weight_decay: of the AdamW for other leaves; matrices have none.
      mask: which of these leaves decay, as that of `add_decayed_weights`.

    Raises:
      ValueError: as `muon`.

    Equals:
      levanter.optim.MuonHConfig(learning_rate=learning_rate, momentum=momentum, nesterov=nesterov), with the
        polar factor computed alike
    References:
      Wen et al. 2026, "Hyperball optimization", arXiv:2606.16899.
    """
    return of_matrices(
        "muonh",
        ema(momentum, nesterov=nesterov, dtype=mu_dtype),
        orthogonalize(orthogonalizer, comm_dtype=comm_dtype),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        scale=None,
        mask=mask,
        axes=axes,
        others=others,
        others_learning_rate=others_learning_rate,
        mu_dtype=mu_dtype,
        nu_dtype=nu_dtype,
        state=state,
        shardings=shardings,
        last=hyperball(learning_rate),
    )
