"""What every recipe does before its sentence is spoken: checks under its own name."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import optax

from optimorph.core.checks import checked
from optimorph.core.tree import check_alike

Transform = optax.GradientTransformationExtraArgs
P = ParamSpec("P")


def recipe(make: Callable[P, Transform]) -> Callable[P, Transform]:
    """Check the numbers, and at every update the trees, under the recipe's own name."""

    @functools.wraps(make)
    def build(*args: P.args, **kwargs: P.kwargs) -> Transform:
        inner = checked(make)(*args, **kwargs)

        def update(updates, state, params=None, **extra):
            if params is not None:
                check_alike(make.__name__, updates, params)
            return inner.update(updates, state, params, **extra)

        return Transform(inner.init, update)

    return build
