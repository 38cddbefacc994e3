"""Every matrix replaced by its polar factor."""

from collections.abc import Callable

import jax
import numpy as np
import optax

from optimorph.core.tree import map_paths
from optimorph.core.types import LeafAxes
from optimorph.linalg.axes import read
from optimorph.linalg.polar import NewtonSchulz


def orthogonalize(
    orthogonalizer: Callable[[jax.Array], jax.Array] | None = None, axes: LeafAxes = "io"
) -> optax.GradientTransformation:
    """Replace every matrix by its polar factor: the same singular vectors, all singular values 1.

        u = polar(g) = U Vᴴ, where g = U Σ Vᴴ        (1)

    Args:
      orthogonalizer: a function of stacks `(*batch, inputs, outputs)`: `linalg.NewtonSchulz()`, the default,
        `linalg.Exact()`, or your own.
      axes: how leaves read as matrices: one spec for all, or a function (path, shape) → spec; a leaf whose
        spec is None passes through.

    Raises:
      ValueError: at `init`, a spec that does not fit its leaf.

    References:
      Carlson et al. 2015, "Preconditioned spectral descent for deep learning"; Jordan et al. 2024,
      "Muon: An optimizer for hidden layers in neural networks".
    """
    polar = NewtonSchulz() if orthogonalizer is None else orthogonalizer
    who = "orthogonalize"

    def init(params):
        map_paths(lambda path, p: read(who, axes, path, np.shape(p)), params)
        return optax.EmptyState()

    def factor(path, g):
        form = read(who, axes, path, g.shape)
        return g if form is None else form.array(polar(form.matrices(g)), g.shape)  # (1)

    def update(updates, state, params=None):
        return map_paths(factor, updates), state

    return optax.GradientTransformation(init, update)
