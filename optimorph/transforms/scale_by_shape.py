"""The size of an orthogonal update, from the shape of its matrix."""

import math
from collections.abc import Callable

import numpy as np
import optax

from optimorph.core.differences import gradients
from optimorph.core.numbers import cast_like, upcast
from optimorph.core.paths import map_paths
from optimorph.core.rule import arrays
from optimorph.core.types import AxesRules, Rules
from optimorph.linalg.meshes import own_part
from optimorph.routing.layouts import cuts, of_whole
from optimorph.routing.reading import leaf_axes
from optimorph.routing.rules import labels

SCALES: dict[str, Callable[[int, int], float]] = {
    "rms_to_rms": lambda inputs, outputs: math.sqrt(outputs / inputs),  # (1)
    "keller": lambda inputs, outputs: math.sqrt(max(1, outputs / inputs)),  # (2)
    "adamw_rms": lambda inputs, outputs: 0.2 * math.sqrt(max(inputs, outputs)),  # (3)
}


def scale_by_shape(
    scale: str | None = "rms_to_rms", axes: AxesRules | None = None, shardings: Rules | None = None
) -> optax.GradientTransformationExtraArgs:
    """Multiply every matrix by a function of its numbers of inputs and outputs.

        u = √(out / in) g              (1)  "rms_to_rms": ‖u‖ from RMS to RMS is 1, if ‖g‖₂ is
        u = √max(1, out / in) g        (2)  "keller"
        u = 0.2 √max(in, out) g        (3)  "adamw_rms": the RMS of a typical AdamW update
        u = g                          (4)  None

    Args:
      scale: a name or None.
      axes: how leaves read as matrices, as that of `muon`; a leaf that is no matrix passes through.
      shardings: how leaves lie over a mesh, as that of `muon`; it is whole matrices whose shape counts.

    Raises:
      ValueError: an unknown name; at `init`, a spec that does not fit its leaf, a leaf that no rule decides.

    References:
      (1) Bernstein & Newhouse 2024, arXiv:2410.21265; (2) Jordan et al. 2024, "Muon: An optimizer for
      hidden layers in neural networks"; (3) Liu et al. 2025, arXiv:2502.16982, equation 4.
    """
    who = "scale_by_shape"
    if scale is not None and scale not in SCALES:
        raise ValueError(
            f"{who}: no scale is called {scale!r}. Type one of {', '.join(map(repr, SCALES))}, or None."
        )

    own = of_whole(who, shardings, leaf_axes(who, axes))

    def init(params):
        arrays(who, params)
        if axes is not None:
            labels(own)(params)
        return optax.EmptyState()

    def scaled(g, form, cut, path):
        if form is None or np.size(g) == 0:
            return g
        spec, whole = cut(path, np.shape(g))
        x, factor = upcast(g), form.spread(SCALES[scale], whole)
        factor = factor.item() if factor.size == 1 else own_part(factor.astype(x.real.dtype), spec)
        return cast_like(factor * x, g)

    def update(updates, state, params=None, *, matrix_axes=None, matrix_shardings=shardings, **extra):
        updates = gradients(who, updates)
        if scale is None:
            return updates, state
        cut = cuts(who, matrix_shardings)

        def leaf(path, g):
            handed = matrix_axes is not None and axes is None
            return scaled(g, matrix_axes[path] if handed else own(path, np.shape(g)), cut, path)

        return map_paths(leaf, updates), state

    return optax.GradientTransformationExtraArgs(init, update)
