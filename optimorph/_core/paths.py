"""The paths of leaves: `blocks/0/attn/kernel`."""

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax

from optimorph._core.numbers import is_absent
from optimorph._core.types import PyTree


def map_paths(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`f(path, leaf, *others)` on every leaf and what else stands there in other trees; None stays None."""
    leaves, structure = jax.tree.flatten(tree)
    others = map(structure.flatten_up_to, rest)
    found = [f(*each) for each in zip(leaf_paths(tree), leaves, *others, strict=True)]
    return jax.tree.unflatten(structure, found)


def by_path(tree: PyTree) -> dict[str, Any]:
    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def leaf_paths(tree: PyTree) -> list[str]:
    """`blocks/0/attn/kernel`: every leaf's path, in the tree's order.

    A container of nothing but a `value` or a `data_array`, or of one child that it does not name, is a box
    around a leaf, as Flax, Penzai and Haliax have them, and no part of its name.
    """
    entries = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_absent)[0]
    inside: dict[tuple[Any, ...], set[Any]] = {}
    for path, _ in entries:
        for k in range(len(path)):
            inside.setdefault(path[:k], set()).add(path[k])
    return [_name(path, inside) for path, leaf in entries if not is_absent(leaf)]


@functools.lru_cache(maxsize=1 << 8)
def structure_paths(structure: Any) -> list[str]:
    return leaf_paths(structure.unflatten([0] * structure.num_leaves))


def distinct_paths(who: str, tree: PyTree) -> list[str]:
    """`leaf_paths`; several leaves with one path are refused."""
    paths = leaf_paths(tree)
    if twice := [path for path, times in collections.Counter(paths).items() if times > 1]:
        raise ValueError(f"{who}: several leaves have the path {twice[0]!r}. Use keys without slashes.")
    return paths


def _name(path: tuple[Any, ...], inside: dict[tuple[Any, ...], set[Any]]) -> str:
    """A leaf's path without its boxes."""
    while len(path) > 1 and _is_box(path[-1]) and len(inside[path[:-1]]) == 1:
        path = path[:-1]
    return "/".join(map(_word, path))


def _is_box(key: Any) -> bool:
    """Whether a key says nothing of what it is the key of."""
    of_list = isinstance(key, jax.tree_util.FlattenedIndexKey)
    return of_list or getattr(key, "name", None) in ("value", "data_array")


def _word(key: Any) -> str:
    """A key of a path; one of several, as in Flax's flat dictionaries, is several."""
    several = getattr(key, "key", None)
    if isinstance(several, tuple):
        return "/".join(map(str, several))
    return jax.tree_util.keystr((key,), simple=True)
