"""Matrices to one transformation, all other leaves to another."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from optimorph._core.differences import other_state
from optimorph._core.numbers import cast_like, is_absent, is_trainable, upcast
from optimorph._core.rule import Leaves, Transform, aligned, arrays, handed, handed_down
from optimorph._core.types import AxesRules, Rules, Shape
from optimorph._core.warn import warn
from optimorph._core.wrapped import OF_TREES, fits, wrapped
from optimorph._distributed.hardware import AUTO, Hardware
from optimorph._distributed.shardings import Match
from optimorph._routing.layer_widths import has_no_name
from optimorph._routing.leaf_spec import INFERRED_HEAD, LeafSpec
from optimorph._routing.resolve import Resolve, resolve_leaves, resolved
from optimorph._routing.rules import among, match_shardings, warn_unused

MATRIX, OTHER = "matrix", "other"


@dataclasses.dataclass(frozen=True)
class Routes:
    """What `plan` asks of an optimizer that routes.

    Args:
      resolve: (paths, shapes) → how the leaves of a tree read as matrices.
      names: of the transformations of matrices and of other leaves.
      scale: of a matrix's update by its shape; None if it is not known.
      match: the user's rules of shardings, or None.
      polar: the function of whole matrices; None for `NewtonSchulz`.
      divide: what decides whether matrices are divided over devices.
    """

    resolve: Resolve
    names: tuple[str, str]
    scale: Any = None
    match: Match | None = None
    polar: Callable[..., Any] | None = None
    divide: str | Hardware = AUTO


def route_matrices(
    matrices: optax.GradientTransformation,
    others: optax.GradientTransformation,
    *,
    axes: AxesRules | None = None,
    shardings: Rules | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Update matrices by one transformation and all other leaves by another.

        tx = route_matrices(chain(ema(0.95), orthogonalize(), scale_by_learning_rate(0.02)), adamw(1e-3))

    `orthogonalize`, `scale_by_shape` and the other transforms inside `matrices` use the `axes` given here,
    and need no `axes` of their own. The state is that of `optax.partition`, with the parts "matrix" and
    "other".

    Args:
      matrices: the transformation of matrices; it runs in float32 or wider.
      others: the transformation of other leaves.
      axes: how leaves read as matrices, as in `muon`.
      shardings: the shardings of the leaves over a mesh, as in `muon`.

    Raises:
      ValueError: at `init`, if no rule decides how a leaf reads, or if a spec does not fit its leaf. The
        message names all such leaves, and says what to type.
    """
    return routed("route_matrices", matrices, others, axes, shardings, wide=True)


def routed(
    who: str,
    matrices: optax.GradientTransformation,
    others: optax.GradientTransformation,
    axes: AxesRules | None,
    shardings: Rules | None,
    names: tuple[str, str] = ("matrices", "others"),
    scale: Any = None,
    polar: Callable[..., Any] | None = None,
    divide: str | Hardware = AUTO,
    reads: Callable[[Resolve], Resolve] = lambda resolve: resolve,
    wide: bool = False,
) -> Transform:
    """`route_matrices` under a recipe's own name; `reads` changes how leaves read for this recipe.

    `wide` is that of `wrapped`, for `matrices` that may be of another library.
    """
    resolve = reads(resolve_leaves(who, axes, find_output=True))
    match = match_shardings(who, shardings)
    routes = Routes(resolve, names, scale, match, polar, divide)
    transforms: dict[Any, optax.GradientTransformation] = {
        MATRIX: wrapped(who, matrices, wide=wide),
        OTHER: wrapped(who, others),
    }

    def parted(tree: Any, forms: Sequence[Any]) -> optax.GradientTransformationExtraArgs:
        parts = tree.unflatten([OTHER if f is None else MATRIX for f in forms])
        return optax.with_extra_args_support(optax.partition(transforms, lambda _: parts))

    def facts(leaves: Leaves, specs: list[LeafSpec]) -> contextlib.AbstractContextManager[None]:
        roles = {path: spec.role for path, spec in zip(leaves.paths, specs, strict=True)}
        return handed_down(matrix_axes=[spec.axes for spec in specs], roles=roles, shardings=match)

    def needs_others(path: str, leaf: Any) -> bool:
        """Whether other leaves may tell how this one reads."""
        return has_no_name(path) or np.ndim(leaf) > 2

    def init(params):
        leaves = arrays(who, params)
        warn_unused(who, "axes", axes, leaves.paths)
        warn_unused(who, "shardings", shardings, leaves.paths)
        tree = leaves.structure
        params = tree.unflatten(w if is_trainable(w) or is_absent(w) else None for w in leaves.values)
        specs = resolved(who, resolve, match, leaves)
        if (readings := handed("readings")) is not None:
            each = zip(leaves.paths, leaves.values, specs, strict=True)
            readings.add(routes, {path: spec for path, w, spec in each if is_trainable(w)})
        forms = [spec.axes for spec in specs]
        for path, x, spec in zip(leaves.paths, leaves.values, specs, strict=True):
            if spec.role == INFERRED_HEAD:
                warn(_inferred(who, path, np.shape(x), spec), stacklevel=2)
        if axes is None and leaves.shapes and not any(forms):
            warn(
                f"{who}: no leaf is a matrix, so the other optimizer updates all. See optimorph.plan.",
                stacklevel=2,
            )
        with facts(leaves, specs), among(leaves):
            return parted(tree, forms).init(params)

    def update(updates, state, params=None, **extra):
        gs, tree, ws = aligned(who, updates, params)
        leaves = Leaves(tree, gs if params is None else ws)  # a missing gradient has no shape
        missing = params is None and axes is None and any(map(is_absent, gs))
        if missing and any(map(needs_others, leaves.paths, gs)):
            raise ValueError(
                f"{who}: some gradients are None, and update was called without params, so it is not known "
                "how all leaves read as matrices. Type tx.update(gradients, state, params), or give axes=."
            )
        specs = resolved(who, resolve, match, leaves)
        forms = [spec.axes for spec in specs]
        wide = [g if f is None or is_absent(g) else upcast(g) for g, f in zip(gs, forms, strict=True)]
        own = None if params is None else leaves.tree
        try:
            with facts(leaves, specs), among(leaves):
                out, after = parted(tree, forms).update(tree.unflatten(wide), state, own, **extra)
        except OF_TREES as error:
            if own is None or fits(state, init, tree.unflatten(ws)):
                raise
            raise other_state(who) from error
        out = tree.flatten_up_to(out)
        return tree.unflatten(
            [u if is_absent(g) else cast_like(jnp.asarray(u), g) for u, g in zip(out, gs, strict=True)]
        ), after

    tx = Transform(init, update)
    tx.routes = routes
    return tx


def _inferred(who: str, path: str, shape: Shape, spec: LeafSpec) -> str:
    updated = ", and is updated by the other optimizer" if spec.axes is None else ""
    return (
        f"{who}: {path!r} {shape} is taken for the output layer, because no other leaf takes its outputs"
        f"{updated}. Type axes={{{path!r}: 'head'}} to confirm this, or "
        f"axes={{{path!r}: {spec.answers[1]!r}}} for a hidden layer."
    )
