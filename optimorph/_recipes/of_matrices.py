"""What the optimizers of matrices share: the end of the chain, other leaves, storage of the state."""

from collections.abc import Mapping

import optax

from optimorph._core.paths import leaf_paths
from optimorph._core.roles import FIRST, SECOND
from optimorph._core.rule import Transform
from optimorph._core.types import AxesRules, DTypeLike, Mask, Rules, ScalarOrSchedule
from optimorph._recipes.optimizers import adamw
from optimorph._recipes.route_matrices import routed
from optimorph._recipes.state_storage import with_state_storage
from optimorph._routing.rules import lookup, warn_unused
from optimorph._storage.codec_rules import linear
from optimorph._storage.encoding import named
from optimorph._transforms.combine import chain
from optimorph._transforms.matrices import scale_by_shape
from optimorph._transforms.step import decay_and_step


def of_matrices(
    who: str,
    average: optax.GradientTransformation,
    *words: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule,
    scale: str | None,
    mask: Mask | None = None,
    axes: AxesRules | None = None,
    others: optax.GradientTransformation | None = None,
    others_learning_rate: ScalarOrSchedule | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    weight_decay_form: str = "coupled",
    state: str | Rules | None = None,
    shardings: Rules | None = None,
    last: optax.GradientTransformation | None = None,
) -> Transform:
    """average → words → scale by shape → decay → learning rate, for matrices; AdamW for other leaves.

    Args:
      who: the name of the recipe.
      average: the transform whose state `state` compresses.
      words: the transforms after it.
      learning_rate: and all further arguments: those of `muon`.
      last: in place of the scale by shape, the weight decay and the learning rate of matrices.
    """
    if others is not None and (others_learning_rate is not None or nu_dtype is not None):
        name = "nu_dtype" if others_learning_rate is None else "others_learning_rate"
        raise ValueError(
            f"{who}: {name} is for the AdamW that others replaces. Type one of the two, such as "
            "others=optimorph.adamw(1e-3)."
        )
    rules = state
    if isinstance(rules, Mapping):
        state = lookup(rules)  # some rules are for matrices, some for other leaves
    step = decay_and_step(who, learning_rate, weight_decay, mask, weight_decay_form)
    matrices = chain(
        with_state_storage(who, average, state, linear, mu_dtype=mu_dtype, nu_dtype=nu_dtype),
        *words,
        *([scale_by_shape(scale), *step] if last is None else [last]),
    )
    names = (who, "adamw" if others is None else "others")
    if others is None:
        others = adamw(
            learning_rate if others_learning_rate is None else others_learning_rate,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
            weight_decay=weight_decay,
            mask=mask,
            weight_decay_form=weight_decay_form,
            state=state,
        )
    tx = routed(who, matrices, others, axes, shardings, names, scale)

    def init(params):
        paths = leaf_paths(params)
        moments = [named(kind, path) for kind in (FIRST, SECOND) for path in paths]
        if isinstance(rules, Mapping):
            warn_unused(who, "state", rules, moments, "moment")
        return tx.init(params)

    return tx.with_init(init)
