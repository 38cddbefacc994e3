"""Rules: what is said of a leaf, by its path and shape."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeGuard

import jax
import numpy as np

from optimorph.core.tree import leaf_paths, map_paths
from optimorph.core.types import Mask, PyTree, Rules, Shape

UNSAID = object()
"""What a lookup finds of a leaf that no rule matches."""


class LeafError(ValueError):
    """One leaf cannot be routed; `labels` collects these and reports all of them at once."""


@dataclasses.dataclass(frozen=True)
class _Box:
    """Keeps what is said of a leaf, None included, from being taken for a part of the tree."""

    said: Any


def lookup(rules: Rules) -> Callable[[str, Shape], Any]:
    """The rules as one function (path, shape) → what the first that matches says, or `UNSAID`.

    Args:
      rules: pattern → what is said, in order: a pattern is fnmatch's on the whole path (`*` crosses slashes)
        or a compiled regular expression, searched for in it; or a function (path, shape); or a tree like the
        parameters.
    """
    if by_pattern(rules):
        patterns = list(rules.items())
        return lambda path, shape: next((said for key, said in patterns if matches(key, path)), UNSAID)
    if callable(rules) and _is_leaf(rules):
        return rules
    boxes = jax.tree.map(_Box, rules, is_leaf=lambda x: x is None)
    known = {path: box.said for path, box in zip(leaf_paths(boxes), jax.tree.leaves(boxes), strict=True)}
    return lambda path, shape: known.get(path, UNSAID)


def by_pattern(rules: Rules) -> TypeGuard[Mapping[Any, Any]]:
    """Whether the rules go by the patterns of paths, rather than being a function or a tree."""
    return isinstance(rules, Mapping) and all(
        isinstance(key, str | re.Pattern) and _is_leaf(said) for key, said in rules.items()
    )


def matches(pattern: str | re.Pattern[str], path: str) -> bool:
    """Whether a rule's pattern means this path."""
    if isinstance(pattern, re.Pattern):
        return pattern.search(path) is not None
    return fnmatchcase(path, pattern)


def labels(rules: Rules) -> Callable[[PyTree], PyTree]:
    """What the rules say of every leaf, as a function from a tree to a tree: labels, masks.

        optax.masked(inner, labels({"*bias": False, "*": True}))

    Args:
      rules: an ordered mapping from pattern to label, of which the first match wins (fnmatch on the
        `/`-joined path, where `*` crosses slashes; or a compiled regular expression, searched for); or a
        function (path, shape) → label; or a tree of labels, matched by path.

    Raises:
      ValueError: when called, naming all leaves of which nothing is said.

    References:
      `optax.partition` and `optax.masked` take such functions.
    """
    say = lookup(rules)

    def found(tree):
        faults = []

        def label(path, leaf):
            try:
                said = say(path, np.shape(leaf))
                if said is UNSAID:
                    raise LeafError(f"labels: no rule matches {path!r}. Add one, or, last, '*' for all.")
            except LeafError as fault:
                faults.append(str(fault))
                return None
            return said

        tree = map_paths(label, tree)
        if faults:
            raise ValueError("\n".join(faults))
        return tree

    return found


def as_mask(mask: Mask | None) -> Mask | None:
    """The mask as `optax.masked` takes it: patterns become a function, True where they say a spec or True."""
    if not isinstance(mask, Mapping) or not any(_is_wild(key) for key in mask):
        return mask
    say = lookup(mask)

    def chosen(path: str, shape: Shape) -> Any:
        said = say(path, shape)
        return said if said is UNSAID else said is not None and said is not False

    return labels(chosen)


def _is_wild(key: Any) -> bool:
    return isinstance(key, re.Pattern) or (isinstance(key, str) and bool(set("*?[/") & set(key)))


def _is_leaf(x: Any) -> bool:
    return x is None or jax.tree_util.all_leaves([x])
