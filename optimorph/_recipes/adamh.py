"""AdamH: Adam whose leaves keep their norms."""

from optimorph._core.types import AxesRules, DTypeLike, Numeric, Rules, ScalarOrSchedule
from optimorph._recipes.moments import second_moment
from optimorph._recipes.recipe import Recipe, recipe
from optimorph._recipes.state_storage import with_state_storage
from optimorph._transforms.averages import ema
from optimorph._transforms.combine import chain, divide
from optimorph._transforms.hyperball import hyperball
from optimorph._transforms.pointwise import debias


@recipe
def adamh(
    learning_rate: ScalarOrSchedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.95,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    axes: AxesRules | None = None,
    shardings: Rules | None = None,
    nu_dtype: DTypeLike | None = None,
    state: str | Rules | None = None,
) -> Recipe:
    """AdamH: a step in Adam's direction that keeps the norm of every matrix and of every other leaf.

    The learning rate is the angle of a step. There is no weight decay. `axes` and `shardings` are as in
    `hyperball`. A scalar parameter can only keep its absolute value, so give scalars to another optimizer
    with `partition`.

    Equals:
      AdamHConfig(learning_rate=learning_rate, beta1=b1, beta2=b2, epsilon=eps) of marin-levanter,
        levanter/optim/adamh.py at 0.2.227.dev40316220070
    References:
      Wen et al. 2026, "Hyperball optimization", arXiv:2606.16899.
    """
    quotient = divide(
        chain(ema(b1, dtype=mu_dtype), debias(b1)),
        by=second_moment(b2, eps, eps_root, nu_dtype),
    )
    tx = with_state_storage("adamh", quotient, state, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
    return chain(tx, hyperball(learning_rate, axes, shardings))
