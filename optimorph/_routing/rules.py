"""Rules: a value for each leaf, by its path and shape."""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeGuard

import jax
import numpy as np
from jax.core import Tracer

from optimorph._core.checks import LeafError, call_fault, not_an_array
from optimorph._core.numbers import evaluated, is_absent, is_array
from optimorph._core.paths import by_path, leaf_paths, map_paths
from optimorph._core.rule import Leaves, Transform, handed, handed_down
from optimorph._core.shown import shown
from optimorph._core.types import Mask, PyTree, Rules, Shape
from optimorph._core.warn import warn
from optimorph._routing.grouping import format_groups, parents
from optimorph.linalg import Axes

Pattern = str | re.Pattern[str] | Callable[[str, Shape], bool]

NO_MATCH = ...
"""The value of a leaf that no rule matches. A rule may also return it."""


@dataclasses.dataclass(frozen=True)
class _Value:
    """One value of a tree of rules, as one leaf of the tree even if the value is None."""

    value: Any


def among(leaves: Leaves) -> contextlib.AbstractContextManager[None]:
    """Inside, rules know all leaves of the tree, those of the outermost call: `handed("all_leaves")`."""
    return handed_down(all_leaves=handed("all_leaves") or leaves)


def lookup(rules: Rules, who: str = "labels", argument: str = "rules") -> Callable[[str, Shape], Any]:
    """(path, shape) → the value of the first rule that matches, or `NO_MATCH`. `labels` describes rules.

    Raises:
      ValueError: naming `who` and its `argument`: what is no rules, or two values for one path.
    """
    for key in filter(callable, rules if isinstance(rules, Mapping) else ()):
        if (fault := call_fault(key, "", ())) is not None:
            raise ValueError(
                f"{who}: a function that is a key of {argument} takes the path and the shape of a leaf, but "
                f"{shown(key)} does not: {fault}. Type roles('norm'), or lambda path, shape: ..."
            )
    if has_patterns(rules):
        patterns, first = list(rules), first_match(rules)
        return lambda path, shape: NO_MATCH if (k := first(path, shape)) is None else rules[patterns[k]]
    if callable(rules) and _is_leaf(rules):
        if (fault := call_fault(rules, "", ())) is not None:
            raise ValueError(
                f"{who}: a function of {argument} takes the path and the shape of a leaf, but "
                f"{shown(rules)} does not: {fault}. Type lambda path, shape: ... If it is a function of "
                "the parameters, pass the tree that it returns."
            )
        return functools.partial(evaluated, rules)
    shape = getattr(rules, "shape", None)
    if rules is None or shape is not None or isinstance(rules, str | bytes | int | float):
        found = shown(rules) if shape is None else f"an array of shape {shape}"
        raise ValueError(
            f"{who}: {argument} must be a mapping from patterns, a function of (path, shape), or a tree, but "
            f"is {found}. Type {argument}={{'*': ...}} with one value for all leaves."
        )
    values: dict[str, Any] = {}
    for path, value in _tree_values(rules):
        found = values.setdefault(path, value)
        if found is not value and found != value:
            raise ValueError(f"{who}: several leaves have the path {path!r}. Use keys without slashes.")
    return lambda path, shape: next((values[x] for x in _around(path) if x in values), NO_MATCH)


def match_shardings(who: str, shardings: Rules | None) -> Callable[[str, Shape], Any] | None:
    """(path, shape) → the sharding that the rules of `shardings` give; None without rules."""
    return None if shardings is None else lookup(shardings, who, "shardings")


def has_patterns(rules: Rules) -> TypeGuard[Mapping[Any, Any]]:
    """Whether the rules are a mapping from patterns, rather than a function or a tree."""
    if not isinstance(rules, Mapping):
        return False
    if not all(isinstance(key, str | re.Pattern) or callable(key) for key in rules):
        return False
    if all(map(_is_leaf, rules.values())):
        return True
    return any(_is_wild(key) and (not isinstance(key, str) or "*" in key) for key in rules)  # not "layers[0]"


def first_match(patterns: Iterable[Pattern]) -> Callable[..., int | None]:
    """(path, shape) → the index of the first pattern that matches. Plain paths are found in a dictionary.

    A plain path matches all leaves below it. Only patterns that are functions need the shape.
    """
    plain: dict[str, int] = {}
    wild: list[tuple[int, Pattern]] = []
    for k, pattern in enumerate(patterns):
        if isinstance(pattern, str):
            plain.setdefault(pattern, k)
        if _is_wild(pattern):
            wild.append((k, pattern))

    def first(path: str, shape: Shape = ()) -> int | None:
        exact = min((plain[x] for x in _around(path) if x in plain), default=None)
        earlier = wild if exact is None else [(k, pattern) for k, pattern in wild if k < exact]
        return next((k for k, pattern in earlier if _matches(pattern, path, shape)), exact)

    return first


def matching_pattern(rules: Rules) -> Callable[[str, Shape], str | None]:
    """(path, shape) → the text of the first pattern that matches; None without one."""
    patterns = list(rules) if has_patterns(rules) else []
    first = first_match(patterns)
    return lambda path, shape: None if (k := first(path, shape)) is None else _text(patterns[k])


def _unused(rules: Rules, paths: Iterable[str]) -> Iterator[str]:
    """The patterns, or the paths of a tree of rules, that match none of the paths."""
    paths = dict.fromkeys(paths)
    around = {x for path in paths for x in _around(path)}
    if has_patterns(rules):
        for pattern in rules:
            if callable(pattern):
                continue
            if pattern not in around and not (
                _is_wild(pattern) and any(_matches(pattern, p, ()) for p in paths)
            ):
                yield _text(pattern)
    elif not callable(rules) or not _is_leaf(rules):
        named = (path for path, value in _tree_values(rules) if value is not None)
        yield from (path for path in named if path not in around)


def _behind(rules: Rules) -> list[str]:
    """The patterns behind "*", which decides for every leaf."""
    patterns = [_text(pattern) for pattern in rules] if has_patterns(rules) else []
    return patterns[patterns.index("*") + 1 :] if "*" in patterns else []


def labels(rules: Rules) -> Callable[[PyTree], PyTree]:
    """A function that labels every leaf of a tree by rules.

        optax.masked(inner, labels({"*bias": False, "*": True}))

    Args:
      rules: an ordered mapping from pattern to label, or a function (path, shape) → label, or a tree of
        labels that is matched by path, or a prefix of one. The first pattern that matches decides. A pattern
        is one of fnmatch for the path, whose keys are joined by slashes (`*` also matches slashes), or a
        compiled regular expression, which is searched for, or a function (path, shape) → bool, such as
        `roles("norm")`. A path without wildcards also matches all leaves below it: "encoder" is "encoder/*".
        The label `...` means that no rule matches. Here that is an error; in `axes` the default rules then
        decide. A path or pattern that matches no leaf is warned of, a function is not.

    Raises:
      ValueError: when called, naming all leaves that no rule matches or that are not arrays.

    References:
      `optax.partition` and `optax.masked` take such functions.
    """
    match = lookup(rules)

    def labels_of(tree):
        places = jax.tree.map(lambda _: 0, tree, is_leaf=lambda x: x is None)  # also of missing gradients
        in_part = any(map(is_absent, jax.tree.leaves(places, is_leaf=is_absent)))
        if not in_part:
            warn_unused("labels", "rules", rules, leaf_paths(places))
        return labelled("labels", match, tree)

    return labels_of


def labelled(who: str, match: Callable[[str, Shape], Any], tree: PyTree) -> PyTree:
    """The tree with `match(path, shape)` in the place of every leaf; `who` names errors."""
    faults = []

    def label(path, leaf):
        try:
            if not is_array(leaf):
                raise LeafError(not_an_array(who, path, leaf))
            value = match(path, np.shape(leaf))
            if value is NO_MATCH:
                raise LeafError(
                    f"{who}: no rule matches {path!r}. Add one, or end with '*' for all other leaves."
                )
        except LeafError as fault:
            faults.append((path, str(fault)))
            return None
        return value

    with among(Leaves.of(tree)):
        found = map_paths(label, tree)
    if faults:
        raise ValueError("\n".join(format_groups(faults, leaf_paths(tree))))
    return found


def masked_leaves(who: str, mask: Mask, leaves: Leaves, argument: str = "mask") -> list[bool]:
    """Whether the mask selects each leaf.

    Args:
      who: the function that errors name.
      mask: a tree of booleans, or a prefix of one, matched by path if its containers differ; a function from
        the tree to such a tree; or rules, which select a leaf if their value is neither None nor False.
      leaves: the parameters, or the gradients if there are no parameters.
      argument: the argument of `who` that is the mask.

    Raises:
      ValueError: naming `who` and a leaf for which the mask has no value.
    """
    the_mask = "the mask" if argument == "mask" else f"the mask {argument}"
    fix = "Pass a tree of booleans like the parameters, or rules such as {'*norm*': False, '*': True}."
    a_tree = not callable(mask) or any(map(_is_boolean, jax.tree.leaves(mask)))
    called = [None] if a_tree else [call_fault(mask, 0), call_fault(mask, "", ())]
    if isinstance(mask, str | re.Pattern) or None not in called:
        raise ValueError(f"{who}: {the_mask} is {shown(mask)}. {fix}")
    if _is_rules(mask):
        match = lookup(mask, who, argument)
        mask = labelled(who, lambda path, shape: _selects(match(path, shape)), leaves.tree)
    elif not a_tree:  # a module of booleans may be callable
        mask = evaluated(mask, leaves.tree)
        if _is_boolean(mask) and len(leaves.values) > 1:
            raise ValueError(
                f"{who}: {the_mask} is a function of the tree of parameters, but returned one boolean. "
                f"Give it two arguments to select leaves by (path, shape). {fix}"
            )
    try:
        booleans = jax.tree.broadcast(mask, leaves.tree, is_leaf=lambda x: x is None)
        values: dict[Any, Any] = dict(enumerate(jax.tree.leaves(booleans, is_leaf=lambda x: x is None)))
        keys: list[Any] = [*range(len(leaves.values))]
    except ValueError:
        values = by_path(mask)
        keys = [
            next((part for part in (path, *parents(path)) if part in values), path) for path in leaves.paths
        ]
    for key, path, leaf in zip(keys, leaves.paths, leaves.values, strict=True):
        if is_array(leaf) and not _is_boolean(values.get(key)):
            value = f"is {shown(values[key])} for" if key in values else "has no value for"
            raise ValueError(f"{who}: {the_mask} {value} {path!r}. {fix}")
    return [bool(values.get(key, False)) for key in keys]


def _is_boolean(x: Any) -> bool:
    """Whether it is one boolean, of Python, NumPy or JAX, that is known when a program is traced."""
    known = isinstance(x, np.generic | np.ndarray | jax.Array) and not isinstance(x, Tracer)
    return isinstance(x, bool) or (known and x.shape == () and x.dtype == bool)


def _selects(value: Any) -> Any:
    """Whether a rule of a mask selects a leaf: True, or a spec of `axes`; unchanged if it is neither."""
    if value is None or isinstance(value, Axes):
        return value is not None
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return bool(Axes(value))
    return value


def warn_unused(
    who: str, argument: str, rules: Rules | None, paths: Sequence[str], what: str = "leaf"
) -> None:
    """Warn of rules that match no leaf, or no moment, and name similar paths; and of those behind "*"."""
    if rules is None or not paths:
        return
    unmatched, behind = [*_unused(rules, paths)], _behind(rules)
    if (readings := handed("readings")) is not None:
        readings.unused += [*unmatched, *behind]
    for rule in unmatched:
        similar = difflib.get_close_matches(rule, paths, 3, 0.3)
        text = f" Similar: {', '.join(map(repr, similar))}." if similar else ""
        warn(f"{who}: no {what} matches the rule {rule!r} of {argument}.{text}", stacklevel=3)
    if behind:
        rest = ", ".join(map(repr, behind))
        text = f"in {argument}, '*' is in front of {rest} and decides for every {what}. Put '*' last."
        warn(f"{who}: {text}", stacklevel=3)


def warning_of_unused(tx: Transform, who: str, **arguments: Any) -> Transform:
    """The same transformation, whose `init` warns of rules that match no leaf."""

    def init(params):
        for argument, rules in arguments.items():
            if isinstance(rules, Mapping):
                warn_unused(who, argument, rules, leaf_paths(params))
        return tx.init(params)

    return tx.with_init(init)


def check_mask(who: str, mask: Mask | None, leaves: Leaves, argument: str = "mask") -> None:
    """Refuse a mask that has no value for a leaf, as `masked_leaves` does, and warn of its unused rules."""
    if mask is not None:
        masked_leaves(who, mask, leaves, argument)
        if has_patterns(mask) and _is_rules(mask):
            warn_unused(who, argument, mask, leaves.paths)


def _is_rules(mask: Mask) -> bool:
    if has_patterns(mask):
        return any(map(_is_wild, mask)) or not all(isinstance(value, bool) for value in mask.values())
    if not callable(mask) or not _is_leaf(mask):
        return False
    required = [p for p in inspect.signature(mask).parameters.values() if p.default is p.empty]
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in required) == 2  # path, shape


def _tree_values(rules: PyTree) -> list[tuple[str, Any]]:
    """The path and the value of every leaf of a tree of rules, None included."""
    values = jax.tree.map(_Value, rules, is_leaf=lambda x: x is None)
    return [
        (path, leaf.value) for path, leaf in zip(leaf_paths(values), jax.tree.leaves(values), strict=True)
    ]


def _is_wild(pattern: Any) -> bool:
    return (
        callable(pattern)
        or isinstance(pattern, re.Pattern)
        or (isinstance(pattern, str) and bool(set("*?[") & set(pattern)))
    )


def _matches(pattern: Pattern, path: str, shape: Shape) -> bool:
    if callable(pattern):
        return bool(evaluated(pattern, path, shape))
    if isinstance(pattern, re.Pattern):
        return pattern.search(path) is not None
    return fnmatchcase(path, pattern)


def _text(pattern: Pattern) -> str:
    if isinstance(pattern, re.Pattern):
        return pattern.pattern
    return pattern if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))


@functools.lru_cache(maxsize=1 << 12)
def _around(path: str) -> tuple[str, ...]:
    """The path of a leaf, and those of the subtrees that it is in, the innermost first."""
    return (path, *_around(path.rpartition("/")[0])) if path else ("",)


def _is_leaf(x: Any) -> bool:
    return x is None or jax.tree_util.all_leaves([x])
