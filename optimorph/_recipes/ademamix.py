"""AdEMAMix: Adam with a second, slow average."""

from optimorph._core.types import DTypeLike, Mask, Numeric, Rules, ScalarOrSchedule
from optimorph._recipes.moments import second_moment
from optimorph._recipes.recipe import Recipe, recipe
from optimorph._recipes.state_storage import with_state_storage
from optimorph._transforms.averages import ema, slow_ema
from optimorph._transforms.combine import add, chain, divide
from optimorph._transforms.pointwise import debias
from optimorph._transforms.step import decay_and_step


@recipe
def ademamix(
    learning_rate: ScalarOrSchedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 5.0,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    *,
    nu_dtype: DTypeLike | None = None,
    weight_decay_form: str = "coupled",
    state: str | Rules | None = None,
) -> Recipe:
    """AdEMAMix: AdamW whose numerator also has α times a slow average over many thousand gradients.

    In a long run α and b3 should warm up. In the paper they do so over all T steps:

        ademamix(1e-3, b3=schedules.decay_warmup(0.9, 0.9999, T), alpha=schedules.linear_warmup(8.0, T))

    The defaults are those of optax. The default α of the published program is 2.

    The slow average is stored in float32 or wider, independently of `mu_dtype` and `state`: see `slow_ema`.

    Equals:
      optax.contrib.ademamix(learning_rate, b1, b2, b3, alpha, eps, eps_root, weight_decay=weight_decay,
        mask=mask)
      AdEMAMix(lr=learning_rate, betas=(b1, b2, b3), alpha=alpha, beta3_warmup=S, alpha_warmup=T, eps=eps,
        weight_decay=weight_decay) of apple/ml-ademamix, pytorch/ademamix.py at c3d73c0, with decay_warmup(b1,
        b3, S) for b3 and linear_warmup(alpha, T) for alpha
    References:
      Pagliardini et al. 2024, "The AdEMAMix optimizer: better, faster, older", arXiv:2409.03137, algorithm 1.
    """
    tx = chain(
        divide(
            add(chain(ema(b1, dtype=mu_dtype), debias(b1)), slow_ema(b3, alpha)),
            by=second_moment(b2, eps, eps_root, nu_dtype),
        ),
        *decay_and_step("ademamix", learning_rate, weight_decay, mask, weight_decay_form),
    )
    return with_state_storage("ademamix", tx, state, mu_dtype=mu_dtype, nu_dtype=nu_dtype)
