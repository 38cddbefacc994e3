"""Every matrix replaced by its polar factor."""

from collections.abc import Callable

import jax
import optax

from optimorph.core.tree import leaf_paths
from optimorph.core.types import AxesRules
from optimorph.linalg.buckets import together
from optimorph.linalg.exact import Exact
from optimorph.linalg.newton_schulz import NewtonSchulz
from optimorph.routing.reading import leaf_axes
from optimorph.routing.rules import labels


def orthogonalize(
    orthogonalizer: Callable[[jax.Array], jax.Array] | None = None, axes: AxesRules | None = None
) -> optax.GradientTransformation:
    """Replace every matrix by its polar factor: the same singular vectors, all singular values 1.

        u = polar(g) = U Vᴴ, where g = U Σ Vᴴ        (1)

    Args:
      orthogonalizer: a function of stacks `(batch, inputs, outputs)`: `linalg.NewtonSchulz()`, the default,
        `linalg.Exact()`, or your own. It sees all matrices of one shape and dtype, whatever their leaves, as
        one stack, and must treat each by itself.
      axes: how leaves read as matrices, as that of `muon`; a leaf that is no matrix passes through.

    Raises:
      ValueError: at `init`, a spec that does not fit its leaf, a leaf that no rule decides.

    References:
      Carlson et al. 2015, "Preconditioned spectral descent for deep learning"; Jordan et al. 2024,
      "Muon: An optimizer for hidden layers in neural networks".
    """
    polar = NewtonSchulz() if orthogonalizer is None else orthogonalizer
    turns = isinstance(polar, NewtonSchulz | Exact)
    read = leaf_axes("orthogonalize", axes)

    def init(params):
        labels(read)(params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        leaves, structure = jax.tree.flatten(updates)
        forms = [read(path, g.shape) for path, g in zip(leaf_paths(updates), leaves, strict=True)]
        stacks = [() if form is None else form.matrices(g) for form, g in zip(forms, leaves, strict=True)]
        factors = iter(together(polar, [x for each in stacks for x in each], turn=turns))  # (1)
        found = [
            g if form is None else form.array([next(factors) for _ in each], g.shape)
            for g, form, each in zip(leaves, forms, stacks, strict=True)
        ]
        return jax.tree.unflatten(structure, found), state

    return optax.GradientTransformation(init, update)
