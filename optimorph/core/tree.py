"""Leaf arithmetic: float32 or wider inside, the gradient's own dtype outside, absent leaves left alone."""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph.core.checks import is_trained, kind, not_an_array
from optimorph.core.differences import NotOneNumber, UnlikeError, mismatch, same_containers, unlike
from optimorph.core.dtypes import wide_dtype
from optimorph.core.types import DTypeLike, Numeric, PyTree


def number(value: Numeric, like: jax.Array) -> Any:
    """A hyperparameter ready to meet `like`, which is float32 or wider: never rounded to less.

    Raises:
      NotOneNumber: an array, as a schedule may return.
    """
    if type(value) in (int, float):
        return float(value)  # a weak type already; an integer need not be one of int32
    if np.ndim(value):
        raise NotOneNumber(np.shape(value))
    return jnp.asarray(value).astype(like.dtype)


def full(params: PyTree, value: Numeric = 0.0, dtype: DTypeLike | None = None) -> PyTree:
    """A state shaped and sharded like `params`, in `dtype` or else float32 or wider.

    Raises:
      ValueError: naming a leaf that is no array.
    """

    def leaf(path: str, p: Any) -> jax.Array:
        if kind(p) == "none":
            raise ValueError(not_an_array("init", path, p))
        own = jnp.result_type(p)
        stored = jnp.dtype(wide_dtype(own) if dtype is None else dtype)
        if jnp.issubdtype(own, jnp.complexfloating) and not jnp.issubdtype(stored, jnp.complexfloating):
            stored = jnp.dtype(jnp.complex64 if jnp.finfo(stored).bits <= 32 else jnp.complex128)
        return jnp.full_like(p, value, dtype=stored)

    return map_paths(leaf, params)


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
            raise UnlikeError
        return s if g is None else f(_gradient(g), s)

    return map_present(who, leaf, updates, state)


def map_paths(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`f(path, leaf, *others)` on every leaf and what else stands there in other trees; None stays None."""
    leaves, structure = jax.tree.flatten(tree)
    others = map(structure.flatten_up_to, rest)
    found = [f(*each) for each in zip(leaf_paths(tree), leaves, *others, strict=True)]
    return jax.tree.unflatten(structure, found)


def by_path(tree: PyTree) -> dict[str, Any]:
    """Every leaf by its path, in the tree's order."""
    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def leaf_paths(tree: PyTree) -> list[str]:
    """`blocks/0/attn/kernel`: every leaf's path, in the tree's order.

    A container of nothing but a `value`, or of one child that it does not name, is a box around a leaf, as
    Flax and Haliax have them, and no part of its name.
    """
    entries = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_absent)[0]
    inside: dict[tuple[Any, ...], set[Any]] = {}
    for path, _ in entries:
        for k in range(len(path)):
            inside.setdefault(path[:k], set()).add(path[k])

    def name(path: tuple[Any, ...]) -> str:
        *_, last = path or (None,)
        nameless = isinstance(last, jax.tree_util.FlattenedIndexKey) or getattr(last, "name", None) == "value"
        boxed = nameless and len(path) > 1 and len(inside[path[:-1]]) == 1
        return "/".join(map(_word, path[:-1] if boxed else path))

    return [name(path) for path, leaf in entries if not _is_absent(leaf)]


def distinct_paths(who: str, tree: PyTree) -> list[str]:
    """`leaf_paths`, of which no two are one.

    Raises:
      ValueError: naming `who` and the path of several leaves.
    """
    paths = leaf_paths(tree)
    if twice := [path for path, times in collections.Counter(paths).items() if times > 1]:
        raise ValueError(f"{who}: several leaves are called {twice[0]!r}. Type keys without slashes.")
    return paths


def _word(key: Any) -> str:
    """A key of a path; one of several, as in Flax's flat dictionaries, is several."""
    several = getattr(key, "key", None)
    if isinstance(several, tuple):
        return "/".join(map(str, several))
    return jax.tree_util.keystr((key,), simple=True)


def paths_and_shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Every leaf's path and shape, in the tree's order."""
    return {path: np.shape(leaf) for path, leaf in by_path(tree).items()}


def gradients(who: str, updates: PyTree, params: PyTree = None) -> PyTree:
    """The gradients, if they are such, and those of the parameters; None also where they are float0.

    Raises:
      ValueError: naming `who` and every leaf that differs.
    """
    if params is None:
        return map_updates(who, lambda g: g, updates)

    def leaf(g, p):
        if kind(g) != kind(p):
            raise UnlikeError
        return g

    return map_updates(who, leaf, updates, params)


def trained(who: str, params: PyTree) -> PyTree:
    """The parameters, with None for those that have no gradient: integers, booleans, random keys.

    Raises:
      ValueError: naming `who` and a leaf that is no array.
    """

    def leaf(path, p):
        if kind(p) == "none":
            raise ValueError(not_an_array(who, path, p))
        return p if is_trained(p) else None

    if all(map(is_trained, jax.tree.leaves(params))):
        return params  # as it nearly always is
    return map_paths(leaf, params)


def _is_absent(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def is_missing(g: Any) -> bool:
    """Whether there is no gradient: None, or the float0 that jax has for what is not differentiable."""
    return g is None or getattr(g, "dtype", None) == jax.dtypes.float0


def map_present(who: str, f: Callable[..., Any], updates: PyTree, *rest: PyTree) -> PyTree:
    """`f(g, *others)` on every leaf, with None for a gradient that is missing, and whatever is beside it.

    Raises:
      ValueError: naming `who` and every leaf where the trees differ, or what `f` finds to.
    """

    def leaf(g: Any, *others: Any) -> Any:
        if is_missing(g):
            return f(None, *others)
        if not all(_beside(g, other) for other in others):
            raise UnlikeError
        return f(g, *others)

    try:
        return jax.tree.map(leaf, updates, *rest, is_leaf=lambda x: x is None)
    except NotOneNumber as error:
        raise ValueError(f"{who}: {error}") from error
    except (ValueError, TypeError, KeyError) as error:
        message = _difference(who, updates, *rest)
        if message is None and isinstance(error, UnlikeError):
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
    if not is_trained(g):
        raise UnlikeError
    return g
