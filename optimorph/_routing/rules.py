"""Rules: what is said of a leaf, by its path and shape."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeGuard

import jax
import numpy as np

from optimorph._core.checks import LeafError, not_an_array
from optimorph._core.numbers import is_array
from optimorph._core.paths import by_path, leaf_paths, map_paths
from optimorph._core.rule import Leaves
from optimorph._core.types import Mask, PyTree, Rules, Shape
from optimorph._routing.alike import listed

Pattern = str | re.Pattern[str]

UNSAID = ...
"""What a lookup finds of a leaf that no rule matches, and what a rule may say to have it so."""


@dataclasses.dataclass(frozen=True)
class _Box:
    """Keeps what is said of a leaf, None included, from being taken for a part of the tree."""

    said: Any


def lookup(rules: Rules) -> Callable[[str, Shape], Any]:
    """The rules as one function (path, shape) → what the first that matches says, or `UNSAID`.

    Args:
      rules: pattern → what is said, in order: a pattern is a path, fnmatch's on the whole path (`*` crosses
        slashes) or a compiled regular expression, searched for in it; or a function (path, shape); or a tree
        like the parameters. `...` says nothing: of axes, the default rules decide then.
    """
    if by_pattern(rules):
        patterns, find = list(rules), finder(rules)
        return lambda path, shape: UNSAID if (k := find(path)) is None else rules[patterns[k]]
    if callable(rules) and _is_leaf(rules):
        return rules
    boxes = jax.tree.map(_Box, rules, is_leaf=lambda x: x is None)
    known: dict[str, Any] = {}
    for path, box in zip(leaf_paths(boxes), jax.tree.leaves(boxes), strict=True):
        if known.setdefault(path, box.said) != box.said:
            raise ValueError(f"labels: several leaves are called {path!r}. Type keys without slashes.")
    return lambda path, shape: known.get(path, UNSAID)


def lookup_if_given(rules: Rules | None) -> Callable[[str, Shape], Any] | None:
    """`lookup`; None for no rules."""
    return None if rules is None else lookup(rules)


def by_pattern(rules: Rules) -> TypeGuard[Mapping[Any, Any]]:
    """Whether the rules go by the patterns of paths, rather than being a function or a tree."""
    if not isinstance(rules, Mapping) or not all(isinstance(key, str | re.Pattern) for key in rules):
        return False
    return any(map(_is_wild, rules)) or all(map(_is_leaf, rules.values()))


def finder(patterns: Iterable[Pattern]) -> Callable[[str], int | None]:
    """Path → the number of the first pattern that means it; plain paths are looked up, not tried in turn."""
    plain: dict[str, int] = {}
    wild: list[tuple[int, Pattern]] = []
    for k, pattern in enumerate(patterns):
        if isinstance(pattern, str):
            plain.setdefault(pattern, k)
        if _is_wild(pattern):
            wild.append((k, pattern))

    def find(path: str) -> int | None:
        own = plain.get(path)
        tried = wild if own is None else [each for each in wild if each[0] < own]
        return next((k for k, pattern in tried if _matches(pattern, path)), own)

    return find


def unused(rules: Rules, paths: Iterable[str]) -> Iterator[str]:
    """The patterns, or the paths of a tree of rules, that none of the paths is meant by."""
    paths = dict.fromkeys(paths)
    if by_pattern(rules):
        for pattern in rules:
            meant = pattern in paths or (_is_wild(pattern) and any(_matches(pattern, p) for p in paths))
            if not meant:
                yield pattern if isinstance(pattern, str) else pattern.pattern
    elif not callable(rules) or not _is_leaf(rules):
        boxes = jax.tree.map(_Box, rules, is_leaf=lambda x: x is None)
        yield from (path for path in leaf_paths(boxes) if path not in paths)


def labels(rules: Rules) -> Callable[[PyTree], PyTree]:
    """What the rules say of every leaf, as a function from a tree to a tree: labels, masks.

        optax.masked(inner, labels({"*bias": False, "*": True}))

    Args:
      rules: an ordered mapping from pattern to label, of which the first match wins (fnmatch on the
        `/`-joined path, where `*` crosses slashes; or a compiled regular expression, searched for); or a
        function (path, shape) → label; or a tree of labels, matched by path. A label of `...` says nothing,
        which is refused here, and in `axes` leaves the leaf to the default rules.

    Raises:
      ValueError: when called, naming all leaves of which nothing is said, or that are no arrays.

    References:
      `optax.partition` and `optax.masked` take such functions.
    """
    say = lookup(rules)

    def found(tree):
        faults = []

        def label(path, leaf):
            try:
                if not is_array(leaf):
                    raise LeafError(not_an_array("labels", path, leaf))
                said = say(path, np.shape(leaf))
                if said is UNSAID:
                    raise LeafError(f"labels: no rule matches {path!r}. Add one, or, last, '*' for all.")
            except LeafError as fault:
                faults.append((path, str(fault)))
                return None
            return said

        paths = leaf_paths(tree)
        tree = map_paths(label, tree)
        if faults:
            raise ValueError("\n".join(listed(faults, paths)))
        return tree

    return found


def masked_leaves(who: str, mask: Mask, leaves: Leaves) -> list[bool]:
    """What a mask says of each leaf.

    Args:
      who: whose error it is.
      mask: a tree of booleans, or a prefix of one, matched by path if its containers differ; a function from
        the tree to one; or rules, True where they say a spec or True.
      leaves: the parameters, or without them the gradients.

    Raises:
      ValueError: naming `who` and leaves of which the mask says nothing.
    """
    if _is_rules(mask):
        say = lookup(mask)

        def chosen(path: str, shape: Shape) -> Any:
            said = say(path, shape)
            return said if said is UNSAID else said is not None and said is not False

        mask = labels(chosen)
    found = mask(leaves.tree) if callable(mask) else mask
    try:
        whole = jax.tree.broadcast(found, leaves.tree, is_leaf=lambda x: x is None)
        return [bool(x) for x in jax.tree.leaves(whole, is_leaf=lambda x: x is None)]
    except ValueError:
        known = by_path(found)
    if unknown := [
        p for p, x in zip(leaves.paths, leaves.values, strict=True) if is_array(x) and p not in known
    ]:
        raise ValueError(
            f"{who}: the mask says nothing of {unknown[0]!r}. Give a tree of booleans like the parameters, "
            "or rules such as {'*norm*': False, '*': True}."
        )
    return [bool(known.get(path, False)) for path in leaves.paths]


def _is_rules(mask: Mask) -> bool:
    if by_pattern(mask):
        return any(map(_is_wild, mask)) or not all(isinstance(said, bool) for said in mask.values())
    return _of_path_and_shape(mask)


def _of_path_and_shape(mask: Mask) -> bool:
    if not callable(mask) or not _is_leaf(mask):
        return False
    needed = [p for p in inspect.signature(mask).parameters.values() if p.default is p.empty]
    return len([p for p in needed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) == 2


def _is_wild(key: Any) -> bool:
    return isinstance(key, re.Pattern) or (isinstance(key, str) and bool(set("*?[") & set(key)))


def _matches(pattern: Pattern, path: str) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.search(path) is not None
    return fnmatchcase(path, pattern)


def _is_leaf(x: Any) -> bool:
    return x is None or jax.tree_util.all_leaves([x])
