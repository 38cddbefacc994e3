"""The sum of sentences that hear the same gradient."""

import functools
import operator
from typing import Any, NamedTuple

import optax

from optimorph.core.dtypes import cast_like, wide
from optimorph.core.tree import map_updates


class AddState(NamedTuple):
    """The states of all sentences, in their order."""

    terms: tuple[Any, ...]


def add(*terms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Add several transformations of the same gradient.

        u = term₁(g) + term₂(g) + ...        (1)

    A variance is `add(chain(square(), ema(b)), chain(ema(b), square(), scale(-1)))`. The terms are computed
    in float32 or wider and only their sum is rounded to the gradient's dtype.

    Args:
      terms: at least one transformation.

    Raises:
      ValueError: no terms.
    """
    if not terms:
        raise ValueError("add: there is nothing to add. Type add(first, second) with two transformations.")
    wired = [optax.with_extra_args_support(term) for term in terms]

    def init(params):
        return AddState(tuple(term.init(params) for term in wired))

    def update(updates, state, params=None, **extra):
        g = map_updates("add", wide, updates)
        pairs = [term.update(g, s, params, **extra) for term, s in zip(wired, state.terms, strict=True)]
        values, states = zip(*pairs, strict=True)

        def total(g, *leaves):
            return cast_like(functools.reduce(operator.add, leaves), g)  # (1)

        return map_updates("add", total, updates, *values), AddState(tuple(states))

    return optax.GradientTransformationExtraArgs(init, update)
