"""Every matrix replaced by its polar factor."""

from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._distributed.sharded_function import ShardedFunction
from optimorph._distributed.shardings import by_whole_shape, shardings_of
from optimorph.core.tree import gradients, leaf_paths
from optimorph.core.types import AxesRules, DTypeLike, Rules
from optimorph.linalg import Exact, NewtonSchulz
from optimorph.routing.reading import leaf_axes
from optimorph.routing.rules import labels, lookup_if_given

_COMM_DTYPES = tuple(map(jnp.dtype, ("bfloat16", "float32", "float64")))


def orthogonalize(
    orthogonalizer: Callable[[jax.Array], jax.Array] | None = None,
    axes: AxesRules | None = None,
    shardings: Rules | None = None,
    *,
    comm_dtype: DTypeLike | None = None,
    bytes_at_once: int = 2**28,
) -> optax.GradientTransformation:
    """Replace every matrix by its polar factor: the same singular vectors, all singular values 1.

        u = polar(g) = U Vᴴ, where g = U Σ Vᴴ        (1)

    Over a mesh each device computes its share of the matrices and sends every other one its part of them; the
    updates lie as the gradients do. How these lie is found out, whatever the mesh: it need not be named.

    Args:
      orthogonalizer: a function of stacks `(batch, inputs, outputs)`: `linalg.NewtonSchulz()`, the default,
        `linalg.Exact()`, or your own. It sees all matrices of one shape and dtype, whatever their leaves, as
        one stack, and must treat each by itself.
      axes: how leaves read as matrices, as that of `muon`; a leaf that is no matrix passes through.
      shardings: how leaves lie over a mesh, as that of `muon`.
      comm_dtype: the dtype of the data in collectives, if narrower than the gradients'. bfloat16 halves the
        bytes; each number is rounded to 8 bits before the iteration and once more after it.
      bytes_at_once: the most bytes of whole matrices that a device holds in one round, of two in flight.

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
    equivariant = isinstance(polar, NewtonSchulz | Exact)
    comm = None if comm_dtype is None else jnp.dtype(comm_dtype)
    if comm is not None and comm not in _COMM_DTYPES:
        raise ValueError(
            f"{who}: comm_dtype must be one of {[*map(str, _COMM_DTYPES)]}, but is {comm}. Type "
            "comm_dtype='bfloat16': a narrower exponent would lose small gradients."
        )
    match = lookup_if_given(shardings)
    read = by_whole_shape(who, match, leaf_axes(who, axes))

    def init(params):
        labels(read)(params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        updates = gradients(who, updates)
        leaves, structure = jax.tree.flatten(updates)
        paths = leaf_paths(updates)
        forms = [read(path, np.shape(g)) for path, g in zip(paths, leaves, strict=True)]
        chosen = [k for k, form in enumerate(forms) if form is not None and np.size(leaves[k])]
        matrices = [jnp.asarray(leaves[k]) for k in chosen]
        leaf_shardings = shardings_of(who, match, [paths[k] for k in chosen], matrices)
        sharded = ShardedFunction(polar, tuple(forms[k] for k in chosen), equivariant, comm, bytes_at_once)
        factors = sharded(matrices, leaf_shardings) if matrices else []  # (1)
        for k, factor in zip(chosen, factors, strict=True):
            leaves[k] = factor
        return jax.tree.unflatten(structure, leaves), state

    return optax.GradientTransformation(init, update)


def _by_identity(f: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda x: f(x)
