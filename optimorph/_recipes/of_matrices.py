"""The parts that all optimizers of matrices share: the end of the chain, other leaves, stored state."""

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import jax
import optax

from optimorph._core.checks import is_one_of
from optimorph._core.paths import leaf_paths
from optimorph._core.roles import FIRST, SECOND
from optimorph._core.rule import Transform, rule_of
from optimorph._core.types import AxesRules, DTypeLike, Mask, Rules, ScalarOrSchedule
from optimorph._distributed.hardware import AUTO, NEVER, Hardware
from optimorph._recipes.optimizers import adamw
from optimorph._recipes.route_matrices import routed
from optimorph._recipes.state_storage import warning_if_nothing, with_state_storage
from optimorph._routing.rules import lookup, warn_unused
from optimorph._storage.codec_rules import linear
from optimorph._storage.encoding import named
from optimorph._transforms.combine import chain
from optimorph._transforms.matrices import Scale, orthogonalize, scale_by_shape
from optimorph._transforms.step import decay_and_step


class MatrixArguments(TypedDict, total=False):
    """The arguments that all optimizers of matrices share; `muon` describes them. None is the default."""

    weight_decay_form: str | None
    mask: Mask | None
    axes: AxesRules | None
    others: optax.GradientTransformation | None
    others_learning_rate: ScalarOrSchedule | None
    mu_dtype: DTypeLike | None
    nu_dtype: DTypeLike | None
    state: str | Rules | None
    shardings: Rules | None


class PolarArguments(MatrixArguments, total=False):
    """The further arguments of optimizers that compute polar factors."""

    orthogonalizer: Callable[[jax.Array], jax.Array] | None
    comm_dtype: DTypeLike | None
    divide: str | Hardware


def of_matrices(
    who: str,
    *transforms: optax.GradientTransformation,
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule,
    weight_decay_form: str = "coupled",
    scale: Scale = None,
    last: optax.GradientTransformation | None = None,
    mask: Mask | None = None,
    axes: AxesRules | None = None,
    others: optax.GradientTransformation | None = None,
    others_learning_rate: ScalarOrSchedule | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    state: str | Rules | None = None,
    shardings: Rules | None = None,
    polar: Callable[[jax.Array], jax.Array] | None = None,
    divide: str | Hardware = NEVER,
) -> Transform:
    """transforms → scale by shape → decay → learning rate; AdamW for other leaves.

    `state` says how the moments of the transforms are stored. `polar` is the orthogonalizer, for the plan.
    `last` replaces the scale by shape, the weight decay and the learning rate. The other arguments are those
    of `muon`.
    """
    own_nu = SECOND in [kind for tx in transforms for kind in _moments(tx)]
    no_decay = isinstance(weight_decay, int | float) and weight_decay == 0
    for_adamw = {
        "others_learning_rate": others_learning_rate is not None,
        "nu_dtype": nu_dtype is not None and not own_nu,
        "mask": mask is not None and last is not None,
        "weight_decay": not no_decay and last is not None,
        "weight_decay_form": not is_one_of(weight_decay_form, ["coupled"]) and last is not None,
    }
    if others is not None and any(for_adamw.values()):
        name = next(name for name, given in for_adamw.items() if given)
        raise ValueError(
            f"{who}: {name} is for the AdamW that others replaces. Type one of the two, such as "
            "others=optimorph.adamw(1e-3)."
        )
    rules = state
    if isinstance(rules, Mapping):
        state = lookup(rules, who, "state")  # some rules are for matrices, some for other leaves
    step = decay_and_step(who, learning_rate, weight_decay, mask, weight_decay_form)

    def stored(own: optax.GradientTransformation) -> optax.GradientTransformation:
        return with_state_storage(who, own, state, linear, mu_dtype=mu_dtype, nu_dtype=nu_dtype)

    matrices = chain(
        *(stored(tx) if _moments(tx) else tx for tx in transforms),
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
    told = None if last is not None else _unit if scale is None else scale
    tx = routed(who, matrices, others, axes, shardings, names, told, polar, divide)

    def init(params):
        paths = leaf_paths(params)
        moments = [named(kind, path) for kind in (FIRST, SECOND) for path in paths]
        if isinstance(rules, Mapping):
            warn_unused(who, "state", rules, moments, "moment")
        return tx.init(params)

    return warning_if_nothing(tx.with_init(init), who, state)


def of_polar_factors(
    who: str,
    average: optax.GradientTransformation,
    *transforms: optax.GradientTransformation,
    orthogonalizer: Callable[[jax.Array], jax.Array] | None = None,
    comm_dtype: DTypeLike | None = None,
    divide: str | Hardware = AUTO,
    **arguments: Any,
) -> Transform:
    """`of_matrices`: average → orthogonalize → transforms. The arguments are those of `muon`."""
    polar = orthogonalize(orthogonalizer, comm_dtype=comm_dtype, divide=divide)
    return of_matrices(who, average, polar, *transforms, polar=orthogonalizer, divide=divide, **arguments)


def _unit(inputs: int, outputs: int) -> float:
    return 1.0


def _moments(tx: optax.GradientTransformation) -> list[str]:
    rule = rule_of(tx)
    return [] if rule is None else [role.moment for role in rule.roles if role.moment]
