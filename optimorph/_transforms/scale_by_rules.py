"""A factor for each leaf, by rules."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from optimorph._core.checks import check_factor
from optimorph._core.rule import Rule, called, not_in_parts, transform
from optimorph._core.types import Rules, Shape
from optimorph._routing.rules import NO_MATCH, among, lookup, warn_unused


def scale_by_rules(rules: Rules) -> optax.GradientTransformationExtraArgs:
    """Multiply the updates of each leaf by its own factor, for learning rates by leaf, role or layer.

        u = f g        (1)

        chain(adamw(1e-3), scale_by_rules({"embed/*": 0.1, "blocks/0/*": 0.5}))
        decay = 0.9 ** np.arange(12)[::-1]
        chain(muon(0.02), scale_by_rules({"layers/*": decay}))  # layer-wise decay
        chain(muon(0.02), scale_by_rules({"decoder/layers/*": decay[None]}))  # MaxText's second axis

    Args:
      rules: the factor of each leaf, as `labels` takes rules: a number, or one for each index of the leaf's
        first axis, such as the layers of a scan. An array of several axes stands for the leaf's first axes;
        of shape (1, n) it has one number for each index of the second. Where no rule matches, or the value
        is `...`, the factor is 1.

    Raises:
      ValueError: a number in place of rules; at `init` and `update`, a factor that is not a real number, or
        whose axes are not those of the leaf; inside `compress_state`, several factors for one
        leaf.

    References:
      Howard & Ruder 2018, arXiv:1801.06146, section 3.2 (a rate for each layer).
    """
    who = called("scale_by_rules")
    if isinstance(rules, Mapping):
        rules = {key: _as_array(x) for key, x in rules.items()}
    match = lookup(rules, who)

    def begin(leaves):
        warn_unused(who, "rules", rules, leaves.paths)
        factors, _ = advance(optax.EmptyState(), leaves)
        for path, x, factor in zip(leaves.paths, leaves.values, factors, strict=True):
            _check(who, path, np.shape(x), factor)
        return optax.EmptyState()

    def advance(state, leaves):
        shapes = leaves.shapes
        with among(leaves):
            return [match(path, shapes[path]) if path in shapes else None for path in leaves.paths], state

    def update(g, state, leaf, factors):
        factor: Any = factors[leaf.index]
        if factor is NO_MATCH or factor is None:
            return g, state
        _check(who, leaf.path, np.shape(leaf.leaves.values[leaf.index]), factor)
        factor = jnp.asarray(factor).astype(g.dtype)
        if factor.ndim and leaf.part:
            raise not_in_parts(who, f"{leaf.path!r} has several factors")
        return jnp.expand_dims(factor, range(factor.ndim, g.ndim)) * g, state  # (1)

    return transform(who, Rule(optax.EmptyState(), update, begin=begin, advance=advance))


def _as_array(x: Any) -> Any:
    """A list of numbers as an array; one of subtrees is a part of a tree of factors."""
    array = np.asarray(x) if isinstance(x, list | tuple) else None
    return x if array is None or array.dtype.hasobject else array


def _check(who: str, path: str, shape: Shape, factor: Any) -> None:
    if factor is not NO_MATCH and factor is not None:
        check_factor(who, path, shape, factor)
