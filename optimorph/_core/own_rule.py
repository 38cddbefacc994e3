"""`transform` for a user's own rule: what the functions of the rule return is checked."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimorph._core import rule as rules
from optimorph._core.checks import call_fault
from optimorph._core.numbers import kind, restored
from optimorph._core.rule import Leaf, Leaves, Rule, Transform

_CALLED_WITH = {
    "update": ("g", "state", "leaf", "now"),
    "init": ("leaf",),
    "begin": ("leaves",),
    "advance": ("shared", "leaves"),
}


def transform(who: str, rule: Rule, *, strict: bool = False) -> Transform:
    """Make an optax transformation that updates each leaf by `rule`, and check what its functions return.

    A leaf without a gradient has the update None and keeps its state. Integers and other parameters that are
    not real or complex numbers have no state. Updates have the dtype of the gradients.

    Args:
      who: the name of the transformation in error messages.
      rule: the rule for one leaf.
      strict: whether a gradient must be complex exactly where its parameter is. If not, it may be the update
        of another transformation, such as a square.

    Raises:
      ValueError: a function of the rule that takes other arguments; at `init` and `update`, a function that
        returns something other than updates and states. The error names the leaf.
    """
    for name, arguments in _CALLED_WITH.items():
        if (fault := call_fault(getattr(rule, name), *arguments)) is not None:
            typed = f"def {name}({', '.join(arguments)}): ..."
            raise ValueError(f"{who}: {name} of the rule takes other arguments: {fault}. Type {typed}")
    return rules.transform(who, _checked(who, rule), strict=strict)


def _checked(who: str, rule: Rule) -> Rule:
    name = type(rule.state).__name__

    def refusal(where: str, found: Any, expected: str) -> ValueError:
        text = str(jax.tree.map(lambda x: jax.typeof(x) if hasattr(x, "dtype") else x, found))
        return ValueError(f"{who}: {where} returned {text}, but {expected} was expected.")

    def pair(where: str, found: Any, first: str) -> tuple[Any, Any]:
        if not isinstance(found, tuple | list) or hasattr(found, "_fields") or len(found) != 2:
            raise refusal(where, found, f"a pair, ({first}, {name}),")
        return found[0], found[1]

    def checked(where: str, found: Any, tree: bool, shape_and_kind: Callable[[int], tuple[Any, Any]]) -> Any:
        """A state, of which either the trees or the scalars have the right shapes and kinds of numbers."""
        try:
            slots = rule.slots(found)
        except (ValueError, TypeError, KeyError):
            raise refusal(where, found, f"a state {name}") from None
        for k, role in enumerate(rule.roles):
            if role.tree == tree:
                x = slots[k] = slots[k] if tree else restored(slots[k])
                shape, numbers = shape_and_kind(k)
                shape = np.shape(x) if shape is None else shape
                if not hasattr(x, "dtype") or np.shape(x) != shape or kind(x) not in numbers:
                    what = f"{'any' if numbers == _ANY else ' or '.join(numbers)} numbers of shape {shape}"
                    raise refusal(where, x, f"{what}, the {role.name} of {name},")
        return rule.structure.unflatten(slots)

    def init(leaf: Leaf) -> Any:
        def like(k: int) -> tuple[Any, Any]:
            role = rule.roles[k]
            return np.shape(leaf.weight) if role.shaped else None, _TRAINED if role.moment else _ANY

        found = rule.slots(checked(f"init of {leaf.path!r}", rule.init(leaf), True, like))
        return rule.structure.unflatten([jnp.copy(x) if x is leaf.weight else x for x in found])

    def update(g: Any, old: Any, leaf: Leaf, now: Any) -> tuple[Any, Any]:
        where, before = f"update of {leaf.path!r}", rule.slots(old)
        u, new = pair(where, rule.update(g, old, leaf, now), "update")
        if not hasattr(u, "dtype") or np.shape(u) != np.shape(g) or kind(u) not in ("real", kind(g)):
            raise refusal(where, u, f"an update, {kind(g)} numbers of shape {np.shape(g)},")
        return jnp.asarray(u), checked(where, new, True, lambda k: _like(before[k]))

    def begin(leaves: Leaves) -> Any:
        return checked("begin", rule.begin(leaves), False, lambda k: ((), _ANY))

    def advance(shared: Any, leaves: Leaves) -> tuple[Any, Any]:
        before = rule.slots(shared)
        now, new = pair("advance", rule.advance(shared, leaves), "what the leaves are told")
        return now, checked("advance", new, False, lambda k: _like(before[k]))

    return dataclasses.replace(rule, update=update, init=init, begin=begin, advance=advance)


_TRAINED, _ANY = ("real", "complex"), ("real", "complex", "integer")


def _like(x: Any) -> tuple[Any, tuple[str, ...]]:
    return np.shape(x), (kind(x),)
