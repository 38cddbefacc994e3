"""LaProp: the average of normalized gradients."""

from optimorph._core.types import DTypeLike, Mask, Numeric, Rules, ScalarOrSchedule
from optimorph._recipes.moments import identity, second_moment
from optimorph._recipes.recipe import Recipe, recipe
from optimorph._recipes.state_storage import with_state_storage
from optimorph._transforms.averages import ema
from optimorph._transforms.combine import chain, divide
from optimorph._transforms.pointwise import debias
from optimorph._transforms.step import decay_and_step


@recipe
def laprop(
    learning_rate: ScalarOrSchedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-15,
    eps_root: Numeric = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    *,
    nu_dtype: DTypeLike | None = None,
    weight_decay_form: str = "coupled",
    state: str | Rules | None = None,
) -> Recipe:
    """LaProp: gradients are divided by their root mean square first and averaged afterwards.

    Adam averages before it divides. In LaProp b1 and b2 may be chosen independently: the average of
    normalized gradients is never larger than the largest of them.

    Equals:
      LaProp(lr=learning_rate, betas=(b1, b2), eps=eps) of Z-T-WANG/LaProp-Optimizer, laprop.py at a419916,
        for a constant learning rate
      LaProp(lr=lr, weight_decay=weight_decay) of Z-T-WANG/LaProp-Optimizer, laprop.py at a419916, which
        decays after the step, with learning_rate=(1 - weight_decay) * lr and weight_decay_form="independent"
    References:
      Ziyin et al. 2020, "LaProp: Separating momentum and adaptivity in Adam", arXiv:2002.04839, algorithm 2.
    """
    tx = chain(
        divide(identity, by=second_moment(b2, eps, eps_root, nu_dtype)),
        ema(b1, dtype=mu_dtype),
        debias(b1),
        *decay_and_step("laprop", learning_rate, weight_decay, mask, weight_decay_form),
    )
    return with_state_storage("laprop", tx, state, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
