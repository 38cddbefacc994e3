"""What every recipe has in common: checks under its own name."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import optax

from optimorph._core.checks import checked
from optimorph._core.rule import rule_of, transform

Recipe = optax.GradientTransformationExtraArgs
P = ParamSpec("P")


def recipe(make: Callable[P, Recipe]) -> Callable[P, Recipe]:
    """Check the numbers, and at every update the trees, under the recipe's own name."""

    @functools.wraps(make)
    def build(*args: P.args, **kwargs: P.kwargs) -> Recipe:
        inner, who = checked(make)(*args, **kwargs), make.__name__
        rule = rule_of(inner)
        return inner if rule is None else transform(who, rule, strict=True)

    return build
