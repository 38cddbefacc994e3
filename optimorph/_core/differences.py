"""Trees beside each other, and every way in which they differ."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimorph._core.checks import not_an_array
from optimorph._core.numbers import NotScalarError, is_array, is_missing, is_trainable, kind
from optimorph._core.paths import by_path, leaf_paths, paths_and_shapes
from optimorph._core.types import PyTree, Shape

Shapes = dict[str, Shape]


class MismatchError(ValueError):
    """A gradient is no array, or does not match its parameter; `map_present` says which leaf it is."""


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


def map_updates(who: str, f: Callable[..., Any], updates: PyTree, *rest: PyTree) -> PyTree:
    """`f(g, *others)` on every leaf that has a gradient; None, and for float0 too, where there is none.

    Raises:
      ValueError: naming `who` and every leaf whose gradient is no real or complex numbers, or differs in
        shape from what is beside it.
    """

    def leaf(g, *others):
        return None if g is None else f(_gradient(g), *others)

    return map_present(who, leaf, updates, *rest)


def map_state(who: str, f: Callable[..., Any], updates: PyTree, state: PyTree) -> PyTree:
    """`f(g, s)` on every leaf that has a gradient; where there is none the state stays as it is.

    Raises:
      ValueError: as `map_updates`, and where a gradient is complex and the state is not.
    """

    def leaf(g, s):
        if g is not None and kind(g) == "complex" != kind(s):
            raise MismatchError
        return s if g is None else f(_gradient(g), s)

    return map_present(who, leaf, updates, state)


def gradients(who: str, updates: PyTree, params: PyTree = None) -> PyTree:
    """The gradients, if they are such, and those of the parameters; None also where they are float0.

    Raises:
      ValueError: naming `who` and every leaf that differs.
    """
    if params is None:
        return map_updates(who, lambda g: g, updates)

    def leaf(g, p):
        if kind(g) != kind(p):
            raise MismatchError
        return g

    return map_updates(who, leaf, updates, params)


def map_present(who: str, f: Callable[..., Any], updates: PyTree, *rest: PyTree) -> PyTree:
    """`f(g, *others)` on every leaf, with None for a gradient that is missing, and whatever is beside it.

    Raises:
      ValueError: naming `who` and every leaf where the trees differ, or what `f` finds to.
    """

    def leaf(g: Any, *others: Any) -> Any:
        if is_missing(g):
            return f(None, *others)
        if not all(_beside(g, other) for other in others):
            raise MismatchError
        return f(g, *others)

    try:
        return jax.tree.map(leaf, updates, *rest, is_leaf=lambda x: x is None)
    except NotScalarError as error:
        raise ValueError(f"{who}: {error}") from error
    except (ValueError, TypeError, KeyError) as error:
        message = _difference(who, updates, *rest)
        if message is None and isinstance(error, MismatchError):
            message = unlike(who, *map(by_path, (updates, *rest)))
        if message is None:  # the trees agree, so the fault is f's own
            raise
        raise ValueError(message) from error


def _difference(who: str, updates: PyTree, *rest: PyTree) -> str | None:
    """How the trees differ, in leaves or else in containers; None if they agree."""
    everywhere = leaf_paths(jax.tree.map(lambda g: 0, updates, is_leaf=lambda x: x is None))
    present = {path: g for path, g in by_path(updates).items() if not is_missing(g)}
    missing = {path for path in everywhere if path not in present}
    shapes = list(map(paths_and_shapes, rest))
    message = mismatch(who, missing, {path: np.shape(g) for path, g in present.items()}, *shapes)
    if message is None and any(not same_containers(updates, tree) for tree in rest):
        message = (
            f"{who}: the gradients do not match the parameters: they have the same leaves in other "
            "containers, a list for a tuple, say. Pass trees of one structure."
        )
    return message


def _beside(g: Any, other: Any) -> bool:
    """Whether what is beside a gradient is a leaf too, of its shape."""
    return jax.tree_util.all_leaves([other]) and np.shape(g) == np.shape(other)


def _gradient(g: Any) -> Any:
    if not is_trainable(g):
        raise MismatchError
    return g


def other_state(who: str) -> ValueError:
    """The error for a state of another optimizer, or of other parameters."""
    return ValueError(
        f"{who}: the optimizer state does not match these parameters or this optimizer. Type "
        "state = tx.init(params) with the same tx and the same tree of parameters; "
        "optimorph.from_optax_state(state, tx, params) carries over the moments of an optimizer with other "
        "arguments."
    )
