"""Every matrix replaced by its polar factor."""

from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph.core.differences import gradients
from optimorph.core.paths import leaf_paths
from optimorph.core.rule import arrays
from optimorph.core.types import AxesRules, DTypeLike, Rules
from optimorph.linalg.exact import Exact
from optimorph.linalg.meshes import Everywhere
from optimorph.linalg.newton_schulz import NewtonSchulz
from optimorph.routing.layouts import layouts_of, of_whole
from optimorph.routing.reading import leaf_axes
from optimorph.routing.rules import labels

_WIRES = tuple(map(jnp.dtype, ("bfloat16", "float32", "float64")))


def orthogonalize(
    orthogonalizer: Callable[[jax.Array], jax.Array] | None = None,
    axes: AxesRules | None = None,
    shardings: Rules | None = None,
    *,
    wire_dtype: DTypeLike | None = None,
    bytes_at_once: int = 2**28,
) -> optax.GradientTransformationExtraArgs:
    """Replace every matrix by its polar factor: the same singular vectors, all singular values 1.

        u = polar(g) = U Vᴴ, where g = U Σ Vᴴ        (1)

    Over a mesh each device computes its share of the matrices and sends every other one its part of them; the
    updates lie as the gradients do. How these lie is found out, whatever the mesh: it need not be named.

    Args:
      orthogonalizer: a function of stacks `(batch, inputs, outputs)`: `linalg.NewtonSchulz()`, the default,
        `linalg.Exact()`, or your own. It sees all matrices of one shape and dtype, whatever their leaves, as
        one stack, and must treat each by itself.
      axes: how leaves read as matrices, as that of `muon`; a leaf that is no matrix passes through. Inside
        `route_matrices` its axes and shardings count.
      shardings: how leaves lie over a mesh, as that of `muon`.
      wire_dtype: the dtype of what devices send each other, if narrower than the gradients'. bfloat16 halves
        the bytes; each number is rounded to 8 bits before the iteration and once more behind it.
      bytes_at_once: of whole matrices that a device holds at a time, of the two under way.

    Raises:
      ValueError: at `init`, a spec that does not fit its leaf, a leaf that no rule decides; at `update`,
        inside `jax.shard_map` without shardings, or with some that do not fit.

    References:
      Carlson et al. 2015, "Preconditioned spectral descent for deep learning"; Jordan et al. 2024,
      "Muon: An optimizer for hidden layers in neural networks".
    """
    who = "orthogonalize"
    polar = NewtonSchulz() if orthogonalizer is None else orthogonalizer
    polar = polar if isinstance(polar, Hashable) else _by_identity(polar)
    free = isinstance(polar, NewtonSchulz | Exact)
    wire = None if wire_dtype is None else jnp.dtype(wire_dtype)
    if wire is not None and wire not in _WIRES:
        raise ValueError(
            f"{who}: wire_dtype must be one of {[*map(str, _WIRES)]}, but is {wire}. Type "
            "wire_dtype='bfloat16': a narrower exponent would lose small gradients."
        )
    own = of_whole(who, shardings, leaf_axes(who, axes))

    def init(params):
        arrays(who, params)
        if axes is not None:
            labels(own)(params)
        return optax.EmptyState()

    def update(updates, state, params=None, *, matrix_axes=None, matrix_shardings=shardings, **extra):
        updates = gradients(who, updates)
        leaves, structure = jax.tree.flatten(updates)
        paths = leaf_paths(updates)
        if matrix_axes is None or axes is not None:
            matrix_axes = {path: own(path, np.shape(g)) for path, g in zip(paths, leaves, strict=True)}
        chosen = [k for k, g in enumerate(leaves) if np.size(g) and matrix_axes[paths[k]] is not None]
        matrices = [jnp.asarray(leaves[k]) for k in chosen]
        layouts = layouts_of(who, matrix_shardings, [paths[k] for k in chosen], matrices)
        forms = tuple(matrix_axes[paths[k]] for k in chosen)
        everywhere = Everywhere(polar, forms, free, wire, bytes_at_once)
        factors = everywhere(matrices, layouts) if matrices else []  # (1)
        for k, factor in zip(chosen, factors, strict=True):
            leaves[k] = factor
        return jax.tree.unflatten(structure, leaves), state

    return optax.GradientTransformationExtraArgs(init, update)


def _by_identity(f: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda x: f(x)
