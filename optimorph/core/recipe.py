"""What every recipe has in common: checks under its own name."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import jax
import optax

from optimorph.core.checks import checked
from optimorph.core.differences import other_state
from optimorph.core.numbers import is_missing, is_trainable
from optimorph.core.rule import Transform, aligned, arrays, rule_of, transform

Recipe = optax.GradientTransformationExtraArgs
P = ParamSpec("P")


def recipe(make: Callable[P, Recipe]) -> Callable[P, Recipe]:
    """Check the numbers, and at every update the trees, under the recipe's own name.

    Parameters that are no real or complex numbers have no state, and no update.
    """

    @functools.wraps(make)
    def build(*args: P.args, **kwargs: P.kwargs) -> Recipe:
        inner, who = checked(make)(*args, **kwargs), make.__name__
        if rule := rule_of(inner):
            return transform(who, rule, strict=True)
        return _with_checks(who, inner)

    return build


def _with_checks(who: str, inner: Recipe) -> Recipe:
    """A transformation of trees behind the checks that `transform` makes."""

    def init(params):
        leaves, tree = arrays(who, params)
        return inner.init(tree.unflatten(w if is_trainable(w) else None for w in leaves))

    def update(updates, state, params=None, **extra):
        gs, tree, ws = aligned(who, updates, params)
        updates = tree.unflatten(None if is_missing(g) else g for g in gs)
        if params is not None:
            params = tree.unflatten(w if is_trainable(w) else None for w in ws)
        try:
            return inner.update(updates, state, params, **extra)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            known = params is not None and jax.tree.structure(jax.eval_shape(inner.init, params))
            if not known or known == jax.tree.structure(state):
                raise
            raise other_state(who) from error

    tx = Transform(init, update)
    tx.routes = getattr(inner, "routes", None)
    return tx
