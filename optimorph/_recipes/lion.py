"""Lion: the sign of an average."""

from optimorph._core.types import DTypeLike, Mask, Numeric, Rules, ScalarOrSchedule
from optimorph._recipes.recipe import Recipe, recipe
from optimorph._recipes.state_storage import with_state_storage
from optimorph._transforms.averages import ema
from optimorph._transforms.combine import chain
from optimorph._transforms.pointwise import sign
from optimorph._transforms.step import decay_and_step


@recipe
def lion(
    learning_rate: ScalarOrSchedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule = 1e-3,
    mask: Mask | None = None,
    *,
    weight_decay_form: str = "coupled",
    state: str | Rules | None = None,
) -> Recipe:
    """Lion: the sign of an average that looks further ahead than the one it keeps.

    Every weight moves by exactly the learning rate. Use a learning rate three to ten times smaller than that
    of AdamW, and a weight decay three to ten times larger.

    Equals:
      optax.lion(learning_rate, b1, b2, weight_decay=weight_decay, mask=mask)
      Lion(lr=learning_rate, betas=(b1, b2), weight_decay=weight_decay) of google/automl, lion/lion_pytorch.py
        at 6a54c87
    References:
      Chen et al. 2023, "Symbolic discovery of optimization algorithms", arXiv:2302.06675, program 1.
    """
    tx = chain(
        ema(b2, lookahead=b1, dtype=mu_dtype),
        sign(),
        *decay_and_step("lion", learning_rate, weight_decay, mask, weight_decay_form),
    )
    return with_state_storage("lion", tx, state, mu_dtype=mu_dtype)
