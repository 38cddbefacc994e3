"""Any element-wise transformation of trees as a rule for one leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimorph._core.moments import Fields, map_moments
from optimorph._core.numbers import in_dtype_of
from optimorph._core.roles import Role
from optimorph._core.rule import Rule
from optimorph._core.types import PyTree
from optimorph._core.wrapped import OF_TREES
from optimorph._storage.elementwise import NotElementwiseError

_OTHERS = "other leaves, or parts of the state that are neither scalars nor known moments"


def one_leaf_rule(
    tx: optax.GradientTransformationExtraArgs, state: PyTree, fields: Fields | None, extra: dict[str, Any]
) -> Rule:
    """The rule that calls `tx` on trees in which all leaves but one are None.

    `tx` is element-wise, without a rule, for example of optax. `state` is one of its states, and `extra` are
    further arguments of its update.
    """
    template = map_moments(lambda kind, _: Role(kind, kind, tree=True), state, fields)
    template = jax.tree.map(lambda x: x if isinstance(x, Role) else Role("shared", shaped=False), template)

    def step(leaves, k, g, weight, shared, own):
        def alone(x):
            return leaves.structure.unflatten(x if i == k else None for i in range(len(leaves.values)))

        slots = [
            alone(x) if role.tree else y
            for role, x, y in zip(rule.roles, rule.slots(own), rule.slots(shared), strict=True)
        ]
        params = None if weight is None and k >= 0 else alone(weight)
        try:
            out, after = tx.update(alone(g), rule.structure.unflatten(slots), params, **extra)
        except OF_TREES as error:
            raise NotElementwiseError(_OTHERS) from error
        return out, rule.slots(after)

    def advance(shared, leaves):
        try:
            _, slots = step(leaves, -1, None, None, shared, None)
            return shared, jax.tree.map(_advanced, rule.pick(slots), shared, is_leaf=lambda x: x is None)
        except NotElementwiseError as error:
            return error, shared  # each leaf raises it, with its path

    def update(g, s, leaf, shared):
        if isinstance(shared, NotElementwiseError):
            raise shared
        structure = leaf.leaves.structure
        out, slots = step(leaf.leaves, leaf.index, g, leaf.weight, shared, s)
        own = [
            structure.flatten_up_to(slot) if role.tree else None
            for role, slot in zip(rule.roles, slots, strict=True)
        ]
        return structure.flatten_up_to(out)[leaf.index], rule.pick(own, leaf.index)

    def first(_):
        raise NotImplementedError("compress_state makes the first state of all leaves at once")

    rule = Rule(template, update, init=first, begin=first, advance=advance, narrow=True)
    return rule


def _advanced(new: Any, old: Any) -> Any:
    """A part of the state that all leaves share, after a step without leaves, in which it is not lost."""
    if new is None and old is not None:
        raise NotElementwiseError(_OTHERS)
    return new if old is None else in_dtype_of(jnp.asarray(new), old)
