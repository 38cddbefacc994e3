"""What every recipe does before its sentence is spoken: checks under its own name."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import jax
import optax

from optimorph.core.checks import checked
from optimorph.core.tree import gradients, trained

Transform = optax.GradientTransformationExtraArgs
P = ParamSpec("P")


def recipe(make: Callable[P, Transform]) -> Callable[P, Transform]:
    """Check the numbers, and at every update the trees, under the recipe's own name.

    Parameters that are no real or complex numbers have no state, and no update.
    """

    @functools.wraps(make)
    def build(*args: P.args, **kwargs: P.kwargs) -> Transform:
        inner, who = checked(make)(*args, **kwargs), make.__name__

        def init(params):
            return inner.init(trained(who, params))

        def update(updates, state, params=None, **extra):
            updates = gradients(who, updates, params)
            params = None if params is None else trained(who, params)
            try:
                return inner.update(updates, state, params, **extra)
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                known = params is not None and jax.tree.structure(jax.eval_shape(inner.init, params))
                if not known or known == jax.tree.structure(state):
                    raise
                raise ValueError(
                    f"{who}: the state is none of these parameters and this optimizer. Type "
                    "state = tx.init(params) with the same tx and the same tree of parameters; "
                    "optimorph.from_optax_state(state, tx, params) keeps the moments of other arguments."
                ) from error

        return Transform(init, update)

    return build
