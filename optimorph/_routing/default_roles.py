"""The roles of leaves by the default rules, as rules for masks, partitions and factors."""

import difflib
import functools
import re
from collections.abc import Callable
from typing import Any

import jax

from optimorph._core.checks import is_integer
from optimorph._core.paths import leaf_paths
from optimorph._core.roles import FIRST, SECOND, SLOW
from optimorph._core.rule import Leaves, Shapes, handed
from optimorph._core.shown import shown
from optimorph._core.types import PyTree, Shape
from optimorph._routing.leaf_spec import HEAD, INFERRED_HEAD, UNDECIDED_ROLE
from optimorph._routing.name_rule import UNDECIDED
from optimorph._routing.name_rules import RULES
from optimorph._routing.names import by_name
from optimorph._routing.resolve import resolve_leaves

INTEGER = "integer"

_MOMENT = re.compile(f"^({FIRST}|{SECOND}|{SLOW})/")
"""What `compress_state` puts before the path of a leaf."""

ROLES = tuple(sorted({rule.role for rule in RULES} | {"vector", INFERRED_HEAD, INTEGER, UNDECIDED_ROLE}))


def role_of(path: Any, shape: Any, params: PyTree | None = None) -> str:
    """The role of a leaf by the default rules: "norm", "embedding", "dense", ...

        partition(lambda path, shape: "slow" if role_of(path, shape) == "embedding" else "fast", {...})

    Args:
      path: the leaf's keys, joined by slashes. The path of a moment, as `compress_state` names it, works too.
      shape: the leaf's shape.
      params: all parameters, for roles that depend on other leaves, such as a head that is found by its
        widths. Without `params` only the path and the shape decide.

    Raises:
      ValueError: a shape that is not a tuple of integers, or a path that is not in `params`.
    """
    sizes = shape if isinstance(shape, tuple | list) else [None]
    if not isinstance(path, str) or not all(is_integer(size, 0) for size in sizes):
        raise ValueError(
            f"role_of: it takes a path and a shape, but got {shown(path)} and {shown(shape)}. Type "
            "role_of('layers/0/kernel', (64, 64)), or roles('norm') for a mask."
        )
    if params is None:
        role, spec = by_name(_MOMENT.sub("", path), tuple(shape))
        return UNDECIDED_ROLE if spec == UNDECIDED else role
    found = _roles_in(params)
    path = path if path in found else _MOMENT.sub("", path)
    if path not in found:
        similar = difflib.get_close_matches(path, found)
        raise ValueError(f"role_of: no leaf of params has the path {path!r}. Similar paths: {similar}")
    return HEAD if found[path] == INFERRED_HEAD else found[path]


def roles(*names: Any) -> Callable[..., Any]:
    """Select the leaves of some roles, as a mask or as a rule. The column "role" of `plan` shows the roles.

        add_decayed_weights(0.1, mask=roles("dense", "attention"))

    A mask gets the whole tree, so its roles are those of `plan`, and "head" also selects a head that is
    inferred from the widths. So have the rules of `partition`, `labels` and `scale_by_rules`, and keys of
    these, as in `scale_by_rules({roles("embedding"): 0.1})` and `state={roles("head"): None}`. The same rules
    may serve several models: a role that no leaf has selects nothing, without a warning.

    Args:
      names: roles.

    Raises:
      ValueError: an unknown role.
    """
    return _selection("roles", names, True)


def not_roles(*names: Any) -> Callable[..., Any]:
    """Select all leaves except those of some roles, as a mask or as a rule: the opposite of `roles(*names)`.

    Args:
      names: roles.

    Raises:
      ValueError: an unknown role.
    """
    return _selection("not_roles", names, False)


def decay_mask(tree: Any, shape: Shape | None = None) -> Any:
    """Select what is usually decayed, as a mask or as a rule: all leaves except norms, biases and vectors.

        adamw(1e-3, weight_decay=0.1, mask=decay_mask)

    These are the leaves with at least two axes, apart from those of stacked layers: their biases and norms
    have two axes too, and are found by their names and by the other leaves. Embeddings are decayed. To leave
    them out, type `not_roles("norm", "bias", "vector", "embedding")`.

    Args:
      tree: the parameters; or, in a rule, the path of a leaf.
      shape: in a rule, the shape of the leaf.

    Returns:
      a tree of booleans; or, in a rule, one boolean.
    """
    return not_roles("norm", "bias", "vector")(tree, shape)


def _selection(who: str, names: tuple[Any, ...], chosen: bool) -> Callable[..., Any]:
    if not names:
        raise ValueError(f"{who}: no role is named. Type {who}('norm', 'bias').")
    for name in names:
        if not isinstance(name, str):
            typed = ", ".join(map(repr, name)) if isinstance(name, list | tuple | set) else "'norm', 'bias'"
            raise ValueError(f"{who}: {shown(name)} is not a role. Type {who}({typed}).")
        if name not in ROLES:
            similar = difflib.get_close_matches(name, ROLES, 1) or ROLES[:1]
            known = ", ".join(map(repr, ROLES))
            raise ValueError(f"{who}: {name!r} is not a role. Type {similar[0]!r}, or another of {known}.")
    wanted = {*names, INFERRED_HEAD} if HEAD in names else {*names}

    def select(tree: Any, shape: Shape | None = None) -> Any:
        """Of a tree of parameters a tree of booleans; of a path and a shape one boolean."""
        if shape is not None:
            around = handed("all_leaves")
            found = {} if around is None else _roles_among(around.shapes)
            role = found.get(tree) or found.get(_MOMENT.sub("", tree)) or role_of(tree, shape)
            return (role in wanted) == chosen
        found = _roles_in(tree)
        return jax.tree.unflatten(
            jax.tree.structure(tree), [(found[path] in wanted) == chosen for path in leaf_paths(tree)]
        )

    select.__name__ = f"{who}({', '.join(map(repr, names))})"
    return select


@functools.lru_cache(maxsize=8)
def _roles_among(leaves: Shapes) -> dict[str, str]:
    """Path → role, of all leaves."""
    specs = resolve_leaves("roles", None, find_output=True)([*leaves], [*leaves.values()])
    return {path: spec.role for path, spec in zip(leaves, specs, strict=True)}


def _roles_in(params: PyTree) -> dict[str, str]:
    """Path → role, of all leaves."""
    found = _roles_among(Leaves.of(params).shapes)
    return {path: found.get(path, INTEGER) for path in leaf_paths(params)}
