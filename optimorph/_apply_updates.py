"""The end of a step: weights and updates added, and rounded once."""

import jax
import jax.numpy as jnp

from optimorph._core.differences import MismatchError, map_present
from optimorph._core.numbers import cast_like, kind, upcast
from optimorph._core.paths import leaf_paths
from optimorph._core.rounding import check_key, leaf_key, stochastic_bfloat16
from optimorph._core.types import PyTree


def apply_updates(params: PyTree, updates: PyTree, key: jax.Array | None = None) -> PyTree:
    """Add the updates to the parameters; with a key, round bfloat16 parameters up or down by chance.

        w ← round(w + u)        (1)

    The sum is in float32 or wider, and the parameters keep their dtype. Without a key this is
    `optax.apply_updates`: every weight becomes the nearest number of its dtype, so that a bfloat16 weight
    stands still under all updates below 1/512 of it, however many. With a key its rounding is right on
    average, E[round(x)] = x, and small updates add up. Other dtypes are rounded to the nearest as ever.

    Every leaf's noise is that of the key and the leaf's path, whatever the order of the leaves and however
    they lie over a mesh. Give every step a key of its own: `jax.random.fold_in(key, step)`.

    Args:
      params: the parameters.
      updates: as a transformation returns them; where there is None, or float0, the parameters stay as they
        are. Integers take integers alone: what is added to them would be cut to a whole number.
      key: of `jax.random`.

    Raises:
      ValueError: updates that are not those of the parameters, by path, or real ones of integers; what is
        no key.

    Equals:
      optax.apply_updates(params, updates)
    References:
      Gupta et al. 2015, "Deep learning with limited numerical precision", arXiv:1502.02551, section 3.1; of
      bfloat16 weights: Zamirai et al. 2020, "Revisiting BFloat16 training", arXiv:2010.06192.
    """
    if key is not None:
        check_key("apply_updates", key)
    sums = map_present("apply_updates", _sum, updates, params)
    leaves, structure = jax.tree.flatten(sums)
    both = zip(leaf_paths(params), leaves, jax.tree.leaves(params), strict=True)
    return jax.tree.unflatten(structure, [_rounded(path, x, w, key) for path, x, w in both])  # (1)


def _sum(u, w):
    """In float32 or wider; of integers, as it is, if both are; the weights where there is no update."""
    if u is None:
        return jax.tree.map(jnp.asarray, w)
    if kind(w) == "integer" == kind(u):
        return w + jnp.asarray(u, jnp.result_type(w))
    if kind(w) == "integer" or "none" in (kind(u), kind(w)):
        raise MismatchError
    x = upcast(w)
    if jnp.iscomplexobj(u) and not jnp.iscomplexobj(x):
        u = u.real
    return x + upcast(u).astype(x.dtype)


def _rounded(path, x, w, key):
    if key is None or x.dtype == jnp.result_type(w) or jnp.result_type(w) != jnp.bfloat16:
        return cast_like(x, w)
    return stochastic_bfloat16(x.astype(jnp.float32), leaf_key(key, path))
