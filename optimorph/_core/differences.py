"""The errors for trees that do not match."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimorph._core.checks import abbreviated, not_an_array
from optimorph._core.numbers import is_array, is_missing, kind, restored
from optimorph._core.paths import by_path, leaf_paths
from optimorph._core.types import PyTree


class TreeError(ValueError):
    """The error of trees that do not match, by the name of the transform that found it."""


class Words(NamedTuple):
    """What errors call a leaf of the tree beside the parameters, and what they tell people to type."""

    name: str
    one: str
    of_same_tree: str
    of_same_kind: str


GRADIENTS = Words(
    "gradient",
    "a gradient",
    "Take the gradient of the same tree that was given to init, and pass that tree as params.",
    "Give real gradients of real parameters and complex ones of complex parameters. Integers are not "
    "trained: their gradient is None, or float0 as jax.grad(allow_int=True) has it.",
)
UPDATES = Words(
    "update",
    "an update",
    "Pass the first of the two trees that update returns: updates, state = tx.update(gradients, state, "
    "params); and the parameters that update was given.",
    "Give real updates of real parameters, complex ones of complex parameters, and integers of integers; "
    "where the update is None the parameter does not change.",
)

OF_EXAMPLES = (
    "These look like gradients of single examples. Take their mean over the first axis, or aggregate them in "
    "front: optax.chain(optax.contrib.differentially_private_aggregate(...), tx)."
)


def is_container(tree: PyTree) -> bool:
    """Whether one None cannot stand for it, as where a function returned no gradients."""
    count = len(jax.tree.leaves(tree))
    return count > 1 or (count == 1 and isinstance(tree, Mapping | list | tuple))  # not of a box


def difference(who: str, updates: PyTree, other: PyTree | None, words: Words = GRADIENTS) -> TreeError:
    """The error that names every leaf where gradients, or updates, differ from the tree beside them.

    Without such a tree, it names the gradients that are not real or complex numbers.
    """
    everywhere = leaf_paths(jax.tree.map(lambda g: 0, updates, is_leaf=lambda x: x is None))
    gradients = {path: g for path, g in by_path(updates).items() if not is_missing(g)}
    missing = set(everywhere) - set(gradients)
    beside = {} if other is None else by_path(other)
    if other is not None and (lines := [*_other_shapes(gradients, beside, missing, words)]):
        fix = OF_EXAMPLES if words is GRADIENTS and _of_examples(gradients, beside) else words.of_same_tree
        return _error(who, f"the {words.name}s do not match the parameters.", lines, fix)
    if lines := [not_an_array(who, path, g) for path, g in gradients.items() if kind(g) == "none"]:
        return TreeError("\n".join(lines))
    lines = [f"{path!r}: {words.one} of {_dtype(g)}" for path, g in gradients.items() if kind(g) == "integer"]
    lines = lines or [
        f"{path!r}: {words.one} of {_dtype(gradients[path])} for a parameter of {_dtype(leaf)}"
        for path, leaf in beside.items()
        if path in gradients and kind(leaf) != kind(gradients[path])
    ]
    if lines:
        return _error(who, f"some {words.name}s cannot be used.", lines, words.of_same_kind)
    return TreeError(
        f"{who}: the {words.name}s do not match the parameters: their leaves are the same, but their "
        "containers differ, for example a list and a tuple. Pass trees of the same structure."
    )


def checked_state(who: str, state: Any, kind: type) -> Any:
    """A wrapper's own state, of arrays of JAX, however it was restored; refused if it is another's."""
    if not isinstance(state, kind):
        raise TreeError(
            f"{who}: the state must be a {kind.__name__}, but is a {type(state).__name__}. Type "
            "state = tx.init(params), with the whole optimizer as tx and not the one that it wraps."
        )
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state)):
        raise shapes_of_state(who)
    for field, role in getattr(kind, "roles", {}).items():
        if not role.tree and role.shaped and np.shape(getattr(state, field)):
            raise other_state(who)
    return jax.tree.map(restored, state)


def shapes_of_state(who: str) -> TreeError:
    fix = "Restore the checkpoint first, or type state = tx.init(params)."
    return TreeError(f"{who}: the state has shapes in place of arrays. {fix}")


def other_state(who: str) -> TreeError:
    return TreeError(
        f"{who}: the optimizer state does not match these parameters or this optimizer. Type "
        "state = tx.init(params) with the same tx and the same tree of parameters; "
        "optimorph.carry_state(state, tx, params) carries over the moments of another optimizer, or of other "
        "parameters."
    )


def _other_shapes(
    gradients: dict[str, Any], beside: dict[str, Any], missing: set[str], words: Words
) -> Iterable[str]:
    for path in gradients | beside:
        here, there = (np.shape(leaves[path]) if path in leaves else None for leaves in (gradients, beside))
        if path in missing or here == there:
            continue
        if here is None:
            yield f"'{path}': a parameter of shape {there}, but no {words.name}"
        elif there is None:
            yield f"'{path}': {words.one} of shape {here}, but no parameter"
        else:
            yield f"'{path}': {words.one} of shape {here} for a parameter of shape {there}"


def _of_examples(gradients: dict[str, Any], beside: dict[str, Any]) -> bool:
    """Whether every gradient has one axis, of the same size, in front of its parameter's shape."""
    if not gradients or not {*gradients} <= {*beside}:
        return False
    sizes = {np.shape(g)[:1] for g in gradients.values()}
    axes = {np.shape(g)[1:] == np.shape(beside[path]) for path, g in gradients.items()}
    return axes == {True} and len(sizes) == 1 and () not in sizes


def _error(who: str, what: str, lines: list[str], fix: str) -> TreeError:
    return TreeError(f"{who}: {what}\n  {abbreviated(lines)}\n{fix}")


def _dtype(leaf: Any) -> str:
    return str(jnp.result_type(leaf)) if is_array(leaf) else repr(leaf)
