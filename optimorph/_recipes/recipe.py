"""What every recipe has in common: checks under its own name."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, get_args, get_type_hints

import optax

from optimorph._core.checks import checked
from optimorph._core.rule import called, handed_down, rule_of, transform

Recipe = optax.GradientTransformationExtraArgs
P = ParamSpec("P")


def recipe(make: Callable[P, Recipe]) -> Callable[P, Recipe]:
    """Check the numbers, and at every update the trees, under the recipe's own name.

    The keys of `**arguments: Unpack[SomeTypedDict]` become arguments by name, each None by default: a None is
    as good as no argument, also where its own default is another.
    """
    who, own = make.__name__, tuple(inspect.signature(make).parameters)
    make.__signature__ = _explicit(make)  # pyright: ignore[reportFunctionMemberAccess]
    build_checked: Callable[..., Recipe] = checked(make)

    @functools.wraps(make)
    def build(*args: P.args, **kwargs: P.kwargs) -> Recipe:
        given: Any = {name: value for name, value in kwargs.items() if value is not None or name in own}
        with handed_down(optimizer=called(who)):
            inner = build_checked(*args, **given)
            rule = rule_of(inner)
            return inner if rule is None else transform(who, rule, strict=True)

    return build


def _explicit(make: Callable[..., Any]) -> inspect.Signature:
    signature, parameters = inspect.signature(make), []
    for parameter in signature.parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            parameters.append(parameter)
            continue
        (keys,) = get_args(parameter.annotation)
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in get_type_hints(keys).items()
        ]
    return signature.replace(parameters=parameters)
