"""Every matrix replaced by its polar factor."""

from collections.abc import Callable

import jax
import optax

from optimorph.core.tree import map_paths
from optimorph.core.types import AxesRules
from optimorph.linalg.polar import NewtonSchulz
from optimorph.routing.reading import leaf_axes
from optimorph.routing.rules import labels


def orthogonalize(
    orthogonalizer: Callable[[jax.Array], jax.Array] | None = None, axes: AxesRules | None = None
) -> optax.GradientTransformation:
    """Replace every matrix by its polar factor: the same singular vectors, all singular values 1.

        u = polar(g) = U Vᴴ, where g = U Σ Vᴴ        (1)

    Args:
      orthogonalizer: a function of stacks `(*batch, inputs, outputs)`: `linalg.NewtonSchulz()`, the default,
        `linalg.Exact()`, or your own.
      axes: how leaves read as matrices, as that of `muon`; a leaf that is no matrix passes through.

    Raises:
      ValueError: at `init`, a spec that does not fit its leaf, a leaf that no rule decides.

    References:
      Carlson et al. 2015, "Preconditioned spectral descent for deep learning"; Jordan et al. 2024,
      "Muon: An optimizer for hidden layers in neural networks".
    """
    polar = NewtonSchulz() if orthogonalizer is None else orthogonalizer
    read = leaf_axes("orthogonalize", axes)

    def init(params):
        labels(read)(params)
        return optax.EmptyState()

    def factor(path, g):
        form = read(path, g.shape)
        return g if form is None else form.map(polar, g)  # (1)

    def update(updates, state, params=None):
        return map_paths(factor, updates), state

    return optax.GradientTransformation(init, update)
