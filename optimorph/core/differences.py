"""Trees beside each other, and every way in which they differ."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optimorph.core.checks import is_array, kind, not_an_array
from optimorph.core.types import PyTree, Shape

Shapes = dict[str, Shape]


class UnlikeError(ValueError):
    """A gradient is none, or is not one of what is beside it; which leaf it is `map_present` says."""


class NotOneNumber(ValueError):
    """A hyperparameter is an array; whose it is `map_present` says."""

    def __init__(self, shape: Shape):
        """Say which shape it has."""
        super().__init__(
            f"a schedule must return one number, but returned an array of shape {shape}. For a sweep, "
            "jax.vmap a function of one number."
        )


def same_containers(updates: PyTree, other: PyTree) -> bool:
    """Whether two trees have one structure, except where there is no gradient."""
    try:
        jax.tree.map(lambda g, o: None, updates, other, is_leaf=lambda x: x is None)
    except (ValueError, TypeError, KeyError):
        return False
    return True


def mismatch(who: str, absent: set[str], updates: Shapes, *rest: Shapes) -> str | None:
    """Say every way in which the gradients differ from the trees beside them; None if they agree.

    Leaves in `absent` have no gradient, which is no fault.
    """
    lines = []
    for other in rest:
        for path in updates | other:
            here, there = updates.get(path), other.get(path)
            if path in absent:
                continue
            if here is None:
                lines.append(f"'{path}': a parameter of shape {there}, but no gradient")
            elif there is None:
                lines.append(f"'{path}': a gradient of shape {here}, but no parameter")
            elif here != there:
                lines.append(f"'{path}': a gradient of shape {here} for a parameter of shape {there}")
    if not lines:
        return None
    shown = "\n  ".join(dict.fromkeys(lines[:8])) + ("\n  ..." if len(lines) > 8 else "")
    return (
        f"{who}: the gradients do not match the parameters.\n  {shown}\n"
        "Take the gradient of the same tree that was given to init, and pass that tree as params."
    )


def unlike(who: str, updates: Mapping[str, Any], *rest: Mapping[str, Any]) -> str:
    """Say which gradients are no real or complex numbers, or else which are others than those beside them."""
    lines = [not_an_array(who, path, g) for path, g in updates.items() if kind(g) == "none"]
    if lines:
        return "\n".join(lines)
    lines = [f"{path!r}: a gradient of {_dtype(g)}" for path, g in updates.items() if kind(g) == "integer"]
    for other in () if lines else rest:
        lines += [
            f"{path!r}: a gradient of {_dtype(updates[path])} for a parameter of {_dtype(leaf)}"
            for path, leaf in other.items()
            if path in updates and kind(leaf) != kind(updates[path])
        ]
    shown = "\n  ".join(lines[:8]) + ("\n  ..." if len(lines) > 8 else "")
    return (
        f"{who}: no update can be made of some gradients.\n  {shown}\n"
        "Give real gradients of real parameters and complex ones of complex parameters. Integers are not "
        "trained: their gradient is None, or float0 as jax.grad(allow_int=True) has it."
    )


def _dtype(leaf: Any) -> str:
    return str(jnp.result_type(leaf)) if is_array(leaf) else repr(leaf)
