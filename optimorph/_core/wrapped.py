"""Transformations of any library inside those of this one."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._core.checks import abbreviated, check_transforms
from optimorph._core.differences import TreeError, difference, other_state
from optimorph._core.numbers import (
    as_made,
    cast_like,
    is_absent,
    is_array,
    is_missing,
    is_trainable,
    traced,
    upcast,
    upcast_dtype,
)
from optimorph._core.paths import by_path
from optimorph._core.rule import Transform, aligned, arrays, called, rule_of
from optimorph._core.types import PyTree

OF_TREES = (ValueError, TypeError, KeyError, AttributeError)
"""What transformations raise for trees that do not match, and for reasons of their own."""


def wrapped(
    who: str, tx: optax.GradientTransformation, wide: bool = False
) -> optax.GradientTransformationExtraArgs:
    """A transformation inside `who`, with extra arguments: where trees do not match, errors name `who`.

    It may take another tree as `params` than the parameters. Then nothing is refused that it takes. With
    `wide` it runs in float32 or wider, as `in_float32` does. What is no transformation is refused.
    """
    check_transforms(who, tx)
    tx = _in_float32(tx) if wide and rule_of(tx) is None else tx
    if isinstance(tx, Transform):
        return tx  # its errors name itself
    who, inner = called(who), optax.with_extra_args_support(tx)

    def init(params):
        try:
            return inner.init(params)
        except OF_TREES:
            arrays(who, params)  # whose error names what is no array
            raise

    def update(updates, state, params=None, **extra):
        if jax.tree.structure(updates) == jax.tree.structure(params):
            aligned(who, updates, params, strict=False)
        updates = jax.tree.map(lambda g: None if is_missing(g) else g, updates)
        lacking = _lacking(updates, params)

        def with_zeros():
            return inner.update(_with_zeros(updates, params), state, params, **extra)

        try:
            out, after = inner.update(updates, as_made(inner.init, state, params), params, **extra)
        except TreeError:
            raise
        except OF_TREES as error:
            if lacking and traced(with_zeros) is not None:
                raise _needs_gradients(who, lacking, params) from error
            if (fault := _fault(who, inner, updates, state, params)) is None:
                raise
            cause = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise TreeError(f"{fault}\nThe transformation inside raised {cause}") from error
        return out, _kept(state, after) if lacking else after

    return optax.GradientTransformationExtraArgs(init, update)


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation without a rule on gradients and parameters in float32 or wider.

    A state of optax has the dtypes of the parameters at first and those of the gradients later. A loop needs
    a state that keeps its dtypes. Updates have the dtypes of the gradients, or of the parameters if these are
    wider, as a sum of both has.
    """
    extended = optax.with_extra_args_support(tx)

    def widened(x):
        if isinstance(x, jax.ShapeDtypeStruct) and is_trainable(x):
            return x.update(dtype=upcast_dtype(x.dtype))
        return None if is_missing(x) else upcast(x) if is_trainable(x) else x

    wide = functools.partial(jax.tree.map, widened)

    def init(params):
        return tx.init(wide(params))

    def update(updates, state, params=None, **extra):
        out, state = extended.update(wide(updates), state, wide(params), **extra)
        gs = jax.tree.map(lambda g: None if is_missing(g) else g, updates)
        alike = jax.tree.structure(out) == jax.tree.structure(gs)
        return jax.tree.map(cast_like, out, _wider(gs, params)) if alike else out, state

    made = Transform if isinstance(tx, Transform) else optax.GradientTransformationExtraArgs
    return made(init, update)


def _wider(gs: PyTree, params: PyTree) -> PyTree:
    """The gradients; in the place of one that is narrower than its parameter, the parameter."""

    def wider(g, w):
        own = hasattr(w, "dtype") and is_trainable(w) and w.dtype.itemsize > jnp.result_type(g).itemsize
        return w if own else g

    return gs if jax.tree.structure(params) != jax.tree.structure(gs) else jax.tree.map(wider, gs, params)


def fits(state: PyTree, init: Callable[[PyTree], PyTree], params: PyTree) -> bool:
    """Whether a state has the shapes of the one that `init` makes, or `init` cannot be traced."""
    made = traced(init, params)
    return made is None or jax.tree.map(np.shape, made) == jax.tree.map(np.shape, state)


def _fault(
    who: str, tx: optax.GradientTransformation, updates: PyTree, state: PyTree, params: PyTree | None
) -> TreeError | None:
    try:
        aligned(who, updates, params, strict=False)
    except TreeError as fault:
        return fault
    trees = [jax.tree.structure(tree, is_leaf=is_absent) for tree in (updates, params)]
    if params is not None and trees[0] != trees[1]:
        return difference(who, updates, params)
    return None if fits(state, tx.init, updates if params is None else params) else other_state(who)


def _lacking(updates: PyTree, params: PyTree | None) -> list[str]:
    if params is None or jax.tree.structure(updates) == jax.tree.structure(params):
        return []
    weights, gradients = by_path(params), by_path(updates)
    there = {path: w for path, w in weights.items() if is_array(w)}
    return [path for path in there if is_missing(gradients.get(path))] if {*gradients} <= {*weights} else []


def _kept(state: PyTree, after: PyTree) -> PyTree:
    """The next state with the moments of leaves without gradients, in whose place optax puts None."""
    leaves, tree = jax.tree.flatten(state)
    try:
        new = tree.flatten_up_to(after)
    except (ValueError, TypeError, KeyError):
        return after
    return tree.unflatten(old if x is None else x for old, x in zip(leaves, new, strict=True))


def _needs_gradients(who: str, paths: list[str], params: PyTree) -> TreeError:
    weights = by_path(params)
    trained = all(is_trainable(weights[path]) for path in paths)
    advice = "Give zeros, or leave out" if trained else "Leave out"
    return TreeError(
        f"{who}: there is no gradient of {abbreviated([*map(repr, paths)], ', ')}, and the transformation "
        f"inside needs one of every leaf. {advice} these leaves by optimorph.partition."
    )


def _with_zeros(updates: PyTree, params: PyTree) -> PyTree:
    gs, tree = jax.tree.flatten(updates, is_leaf=lambda g: g is None)
    ws = tree.flatten_up_to(params)
    return tree.unflatten(
        jnp.zeros_like(w) if g is None and is_array(w) else g for g, w in zip(gs, ws, strict=True)
    )
