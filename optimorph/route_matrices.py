"""Matrices to one transformation, all other leaves to another."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import optax

from optimorph.core.differences import map_present
from optimorph.core.paths import leaf_paths
from optimorph.core.rule import Transform
from optimorph.core.types import AxesRules, Rules, Shape
from optimorph.routing.layouts import of_whole
from optimorph.routing.reading import Reading, axes_of, reader
from optimorph.routing.rules import labels, unused
from optimorph.transforms.in_float32 import in_float32

MATRIX, OTHER = "matrix", "other"


@dataclasses.dataclass(frozen=True)
class Routes:
    """What `plan` asks of an optimizer that routes.

    Args:
      read: (path, shape) → how a leaf reads as matrices.
      rules: the user's rules of axes.
      names: of the transformations of matrices and of other leaves.
      scale: the name of the scale of a matrix's update by its shape.
    """

    read: Callable[[str, Shape], Reading]
    rules: AxesRules | None
    names: tuple[str, str]
    scale: str | None = None


def route_matrices(
    matrices: optax.GradientTransformation,
    others: optax.GradientTransformation,
    *,
    axes: AxesRules | None = None,
    shardings: Rules | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Update matrices by one transformation and all other leaves by another.

        tx = route_matrices(chain(ema(0.95), orthogonalize(), scale_by_learning_rate(0.02)), adamw(1e-3))

    How each leaf reads as matrices is resolved once in an update and handed down: `orthogonalize` and
    `scale_by_shape` inside `matrices` take it from there, and need no `axes` of their own. The state is that
    of `optax.partition`, with the parts "matrix" and "other".

    Args:
      matrices: the transformation of matrices; it runs in float32 or wider.
      others: the transformation of other leaves.
      axes: how leaves read as matrices, as that of `muon`.
      shardings: how leaves lie over a mesh, as that of `muon`.

    Raises:
      ValueError: at `init`, all leaves that no rule decides and specs that do not fit, with some that do.
    """
    return routed("route_matrices", matrices, others, axes, shardings)


def routed(
    who: str,
    matrices: optax.GradientTransformation,
    others: optax.GradientTransformation,
    axes: AxesRules | None,
    shardings: Rules | None,
    names: tuple[str, str] = ("matrices", "others"),
    scale: str | None = None,
) -> Transform:
    """`route_matrices` under a recipe's own name."""
    read = reader(who, axes)
    form = of_whole(who, shardings, axes_of(who, read))
    transforms = {MATRIX: in_float32(matrices), OTHER: others}

    def split(tree: Any) -> tuple[dict[str, Any], optax.GradientTransformationExtraArgs]:
        forms = labels(form)(tree)
        parts = jax.tree.map(lambda _, f: OTHER if f is None else MATRIX, tree, forms)
        known = dict(zip(leaf_paths(tree), _leaves_of(tree, forms), strict=True))
        return known, optax.with_extra_args_support(optax.partition(transforms, lambda _: parts))

    def init(params):
        paths = leaf_paths(params)
        for rule in unused(axes, paths) if axes is not None and paths else ():
            warnings.warn(f"{who}: no leaf matches the rule {rule!r} of axes.", stacklevel=2)
        return split(params)[1].init(params)

    def update(updates, state, params=None, **extra):
        trees = (updates,) if params is None else (updates, params)
        updates = map_present(who, lambda g, *_: g, *trees)
        forms, tx = split(updates if params is None else params)  # a missing gradient has no shape
        handed = {"matrix_axes": forms, "matrix_shardings": shardings}
        return tx.update(updates, state, params, **extra, **handed)

    tx = Transform(init, update)
    tx.routes = Routes(read, axes, names, scale)
    return tx


def _leaves_of(tree: Any, forms: Any) -> list[Any]:
    return jax.tree.structure(tree).flatten_up_to(forms)
