"""The size of an orthogonal update, from the shape of its matrix."""

import math
from collections.abc import Callable

import numpy as np
import optax

from optimorph._distributed.shardings import by_whole_shape, local_shard, local_shard_spec
from optimorph.core.dtypes import cast_like, wide
from optimorph.core.tree import gradients, map_paths
from optimorph.core.types import AxesRules, Rules
from optimorph.routing.reading import leaf_axes
from optimorph.routing.rules import labels, lookup_if_given

SCALES: dict[str, Callable[[int, int], float]] = {
    "rms_to_rms": lambda inputs, outputs: math.sqrt(outputs / inputs),  # (1)
    "keller": lambda inputs, outputs: math.sqrt(max(1, outputs / inputs)),  # (2)
    "adamw_rms": lambda inputs, outputs: 0.2 * math.sqrt(max(inputs, outputs)),  # (3)
}


def scale_by_shape(
    scale: str | None = "rms_to_rms", axes: AxesRules | None = None, shardings: Rules | None = None
) -> optax.GradientTransformation:
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

    match = lookup_if_given(shardings)
    read, shard_spec = by_whole_shape(who, match, leaf_axes(who, axes)), local_shard_spec(who, match)

    def init(params):
        labels(read)(params)
        return optax.EmptyState()

    def scaled(path, g):
        form = read(path, np.shape(g))
        if form is None or scale is None or np.size(g) == 0:
            return g
        spec, whole = shard_spec(path, np.shape(g))
        x, factor = wide(g), form.spread(SCALES[scale], whole)
        factor = factor.item() if factor.size == 1 else local_shard(factor.astype(x.real.dtype), spec)
        return cast_like(factor * x, g)

    def update(updates, state, params=None):
        return map_paths(scaled, gradients(who, updates)), state

    return optax.GradientTransformation(init, update)
