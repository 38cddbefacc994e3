"""Leaf arithmetic: float32 or wider inside, the gradient's own dtype outside, absent leaves left alone."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph.core.checks import mismatch
from optimorph.core.types import DTypeLike, Numeric, PyTree


@functools.cache
def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float32 or `dtype`, whichever is wider; complex stays complex."""
    if not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).bits < 32:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(dtype)


def wide(x: Any) -> jax.Array:
    """`x` in float32 or wider, the precision of all arithmetic here."""
    if isinstance(x, jax.Array) and x.dtype == wide_dtype(x.dtype):
        return x  # as asarray would, at a tenth of its time for every leaf that is traced
    return jnp.asarray(x, wide_dtype(jnp.result_type(x)))


def number(value: Numeric, like: jax.Array) -> Any:
    """A hyperparameter ready to meet `like`, which is float32 or wider: never rounded to less."""
    if type(value) in (int, float):
        return value  # a weak type already
    return jnp.asarray(value).astype(like.dtype)


def cast_like(x: jax.Array, like: Any) -> jax.Array:
    """`x` in the precision of `like`; the square of a complex leaf stays real."""
    dtype = jnp.result_type(like)
    if x.dtype == dtype:
        return x
    if jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.iscomplexobj(x):
        dtype = jnp.finfo(dtype).dtype
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        x = x.real
    return x.astype(dtype)


def full(params: PyTree, value: Numeric = 0.0, dtype: DTypeLike | None = None) -> PyTree:
    """A state shaped and sharded like `params`, in `dtype` or else float32 or wider."""

    def leaf(p: Any) -> jax.Array:
        own = jnp.result_type(p)
        kind = jnp.dtype(wide_dtype(own) if dtype is None else dtype)
        if jnp.issubdtype(own, jnp.complexfloating) and not jnp.issubdtype(kind, jnp.complexfloating):
            kind = jnp.dtype(jnp.complex64 if jnp.finfo(kind).bits <= 32 else jnp.complex128)
        return jnp.full_like(p, value, dtype=kind)

    return jax.tree.map(leaf, params)


def map_updates(who: str, f: Callable[..., Any], updates: PyTree, *rest: PyTree) -> PyTree:
    """`f(g, *others)` on every leaf that has a gradient; None stays None."""
    return _map(who, lambda g, *others: None if g is None else f(g, *others), updates, *rest)


def map_state(who: str, f: Callable[..., Any], updates: PyTree, state: PyTree) -> PyTree:
    """`f(g, s)` on every leaf that has a gradient; where there is none the state stays as it is."""
    return _map(who, lambda g, s: s if g is None else f(g, s), updates, state)


def map_paths(f: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """`f(path, leaf)` on every leaf; None stays None."""
    leaves, structure = jax.tree.flatten(tree)
    found = [f(path, leaf) for path, leaf in zip(leaf_paths(tree), leaves, strict=True)]
    return jax.tree.unflatten(structure, found)


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


def _word(key: Any) -> str:
    """A key of a path; one of several, as in Flax's flat dictionaries, is several."""
    several = getattr(key, "key", None)
    if isinstance(several, tuple):
        return "/".join(map(str, several))
    return jax.tree_util.keystr((key,), simple=True)


def paths_and_shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Every leaf's path and shape, in the tree's order."""
    return dict(zip(leaf_paths(tree), map(np.shape, jax.tree.leaves(tree)), strict=True))


def check_alike(who: str, updates: PyTree, params: PyTree) -> None:
    """Refuse gradients that are not those of the parameters; a gradient may be None.

    Raises:
      ValueError: naming `who` and every leaf that differs.
    """
    map_updates(who, lambda g, p: g, updates, params)


def _is_absent(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def _map(who: str, f: Callable[..., Any], updates: PyTree, *rest: PyTree) -> PyTree:
    def leaf(g: Any, *others: Any) -> Any:
        if g is not None and any(np.shape(g) != np.shape(o) for o in others):
            raise _ShapeError
        return f(g, *others)

    try:
        return jax.tree.map(leaf, updates, *rest, is_leaf=lambda x: x is None)
    except (ValueError, TypeError, KeyError) as error:
        everywhere = leaf_paths(jax.tree.map(lambda g: 0, updates, is_leaf=lambda x: x is None))
        missing = set(everywhere) - set(leaf_paths(updates))
        found = [paths_and_shapes(tree) for tree in (updates, *rest)]
        message = mismatch(who, missing, *found)
        if message is None:  # the trees agree, so the fault is f's own
            raise
        raise ValueError(message) from error


class _ShapeError(ValueError):
    """A gradient and its state or parameter differ in shape."""
