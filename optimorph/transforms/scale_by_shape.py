"""The size of an orthogonal update, from the shape of its matrix."""

import math
from collections.abc import Callable

import numpy as np
import optax

from optimorph.core.tree import map_paths, wide
from optimorph.core.types import LeafAxes
from optimorph.linalg.axes import read

SCALES: dict[str, Callable[[int, int], float]] = {
    "rms_to_rms": lambda inputs, outputs: math.sqrt(outputs / inputs),  # (1)
    "keller": lambda inputs, outputs: math.sqrt(max(1, outputs / inputs)),  # (2)
    "adamw_rms": lambda inputs, outputs: 0.2 * math.sqrt(max(inputs, outputs)),  # (3)
}


def scale_by_shape(scale: str | None = "rms_to_rms", axes: LeafAxes = "io") -> optax.GradientTransformation:
    """Multiply every matrix by a function of its numbers of inputs and outputs.

        u = √(out / in) g              (1)  "rms_to_rms": ‖u‖ from RMS to RMS is 1, if ‖g‖₂ is
        u = √max(1, out / in) g        (2)  "keller"
        u = 0.2 √max(in, out) g        (3)  "adamw_rms": the RMS of a typical AdamW update
        u = g                          (4)  None

    Args:
      scale: a name or None.
      axes: how leaves read as matrices: one spec for all, or a function (path, shape) → spec; a leaf whose
        spec is None passes through.

    Raises:
      ValueError: an unknown name; at `init`, a spec that does not fit its leaf.

    References:
      (1) Bernstein & Newhouse 2024, arXiv:2410.21265; (2) Jordan et al. 2024, "Muon: An optimizer for
      hidden layers in neural networks"; (3) Liu et al. 2025, arXiv:2502.16982, equation 4.
    """
    who = "scale_by_shape"
    if scale is not None and scale not in SCALES:
        raise ValueError(
            f"{who}: no scale is called {scale!r}. Type one of {', '.join(map(repr, SCALES))}, or None."
        )

    def init(params):
        map_paths(lambda path, p: read(who, axes, path, np.shape(p)), params)
        return optax.EmptyState()

    def scaled(path, g):
        form = read(who, axes, path, g.shape)
        if scale is None or form is None or g.size == 0:
            return g
        return (SCALES[scale](*form.sizes(g.shape)) * wide(g)).astype(g.dtype)

    def update(updates, state, params=None):
        return map_paths(scaled, updates), state

    return optax.GradientTransformation(init, update)
