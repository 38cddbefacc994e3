"""The weighted mean of two sentences that hear the same gradient."""

from typing import Any, NamedTuple

import optax

from optimorph.core.checks import check_numbers
from optimorph.core.dtypes import cast_like, wide
from optimorph.core.tree import map_updates, number
from optimorph.core.types import Numeric


class MixState(NamedTuple):
    """The states of both sentences."""

    first: Any
    second: Any


def mix(
    decay: Numeric, first: optax.GradientTransformation, second: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Mix two transformations of the same gradient, as an average mixes its past and its present.

        u = β first(g) + (1 - β) second(g)        (1)

    Both are computed in float32 or wider and only their mean is rounded to the gradient's dtype.

    Args:
      decay: β in [0, 1), a number, an array or a tracer.
      first: what β weighs.
      second: what 1 - β weighs.

    Raises:
      ValueError: β outside [0, 1), when it is a concrete number.
    """
    check_numbers("mix", decay=decay)
    first, second = optax.with_extra_args_support(first), optax.with_extra_args_support(second)

    def mean(a, b):
        beta = number(decay, a)
        return beta * a + (1 - beta) * b  # (1)

    def init(params):
        return MixState(first.init(params), second.init(params))

    def update(updates, state, params=None, **extra):
        g = map_updates("mix", wide, updates)
        a, first_state = first.update(g, state.first, params, **extra)
        b, second_state = second.update(g, state.second, params, **extra)
        out = map_updates("mix", lambda g, a, b: cast_like(mean(a, b), g), updates, a, b)
        return out, MixState(first_state, second_state)

    return optax.GradientTransformationExtraArgs(init, update)
