"""MARS-AdamW: AdamW of gradients whose variance is reduced."""

from optimorph._core.types import DTypeLike, Mask, Numeric, Rules, ScalarOrSchedule
from optimorph._recipes.moments import second_moment
from optimorph._recipes.recipe import Recipe, recipe
from optimorph._recipes.state_storage import with_state_storage
from optimorph._transforms.averages import ema, extrapolate
from optimorph._transforms.clip_leaf import clip_norm
from optimorph._transforms.combine import chain, divide
from optimorph._transforms.pointwise import debias
from optimorph._transforms.step import decay_and_step


@recipe
def mars_adamw(
    learning_rate: ScalarOrSchedule,
    b1: Numeric = 0.95,
    b2: Numeric = 0.99,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    *,
    gamma: Numeric = 0.025,
    max_norm: Numeric = 1.0,
    shardings: Rules | None = None,
    nu_dtype: DTypeLike | None = None,
    weight_decay_form: str = "coupled",
    state: str | Rules | None = None,
) -> Recipe:
    """MARS-AdamW: AdamW with gradients that are extrapolated by γ and clipped to `max_norm` leaf by leaf.

    The published program uses plain AdamW for leaves that are not matrices. To do the same, give those to
    `adamw` with `partition`. The previous gradient is stored in `mu_dtype`, by default in float32 or wider;
    `state` does not change that. `shardings` is as in `clip_norm`.

    Equals:
      MARS(lr=learning_rate, betas=(b1, b2), eps=eps, weight_decay=weight_decay, gamma=gamma) of
        AGI-Arena/MARS, MARS/optimizers/mars.py at 4831e28, for matrices
    References:
      Yuan et al. 2024, "MARS: unleashing the power of variance reduction for training large models",
      arXiv:2411.10438, algorithm 2.
    """
    quotient = divide(
        chain(ema(b1, dtype=mu_dtype), debias(b1)),
        by=second_moment(b2, eps, eps_root, nu_dtype),
    )
    return chain(
        extrapolate(gamma, b1, dtype=mu_dtype),
        clip_norm(max_norm, shardings),
        with_state_storage("mars_adamw", quotient, state, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        *decay_and_step("mars_adamw", learning_rate, weight_decay, mask, weight_decay_form),
    )
