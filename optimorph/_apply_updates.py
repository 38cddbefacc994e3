"""The end of a step: weights and updates added, and rounded once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimorph._core.differences import UPDATES, difference, is_container
from optimorph._core.numbers import ABSENT, cast_like, copied, is_absent, is_missing, kind, upcast
from optimorph._core.paths import structure_paths
from optimorph._core.rounding import check_key, leaf_key, stochastic_bfloat16
from optimorph._core.types import PyTree


def apply_updates(params: PyTree, updates: PyTree, key: jax.Array | None = None) -> PyTree:
    """Add the updates to the parameters; with a key, round bfloat16 parameters stochastically.

        w ← round(w + u)        (1)

    The sum is computed in float32 or wider, and the parameters keep their dtype. Without a key every weight
    becomes the nearest number of its dtype, as with `optax.apply_updates`. A bfloat16 weight then never
    changes if each update is below 1/512 of it. With a key, bfloat16 weights are rounded without a bias,
    E[round(x)] = x, so small updates add up. Other dtypes are always rounded to the nearest.

    The noise depends on the key and on the path of the leaf, not on the order of the leaves or the mesh. Use
    a new key for every step, such as `jax.random.fold_in(key, step)`.

    Args:
      params: the parameters.
      updates: the updates that a transformation returned. Where they are None or float0, the parameters do
        not change. Integer parameters take integer updates only.
      key: a key of `jax.random`.

    Raises:
      ValueError: updates whose paths are not those of the parameters; real updates of integers; complex
        updates of real parameters; a `key` that is not a key of `jax.random`.

    Equals:
      optax.apply_updates(params, updates)
    References:
      Gupta et al. 2015, "Deep learning with limited numerical precision", arXiv:1502.02551, section 3.1; of
      bfloat16 weights: Zamirai et al. 2020, "Revisiting BFloat16 training", arXiv:2010.06192.
    """
    if key is not None:
        check_key("apply_updates", key)
    us, tree = jax.tree.flatten(updates, is_leaf=is_absent)
    try:
        ws = tree.flatten_up_to(params)
    except (ValueError, TypeError, KeyError) as error:
        raise difference("apply_updates", updates, params, UPDATES) from error
    if not all(_fits(u, w) for u, w in zip(us, ws, strict=True)):
        raise difference("apply_updates", updates, params, UPDATES)
    leaves = zip(structure_paths(tree), us, ws, strict=True)
    return tree.unflatten(_updated(path, u, w, key) for path, u, w in leaves)


def _fits(u: Any, w: Any) -> bool:
    if is_missing(u) or isinstance(u, ABSENT):
        return u is not None or not is_container(w)
    if kind(w) == "integer" or "none" in (kind(u), kind(w)):
        return kind(u) == kind(w) == "integer" and np.shape(u) == np.shape(w)
    return np.shape(u) == np.shape(w) and (kind(u), kind(w)) != ("complex", "real")


def _updated(path: str, u: Any, w: Any, key: jax.Array | None) -> Any:
    if is_missing(u) or isinstance(u, ABSENT):
        return copied(w)
    dtype = jnp.result_type(w)
    if kind(w) == "integer":
        return w + jnp.asarray(u, dtype)
    x = upcast(w)
    x = x + upcast(u).astype(x.dtype)
    if key is None or dtype != jnp.bfloat16:
        return cast_like(x, w)  # (1)
    return stochastic_bfloat16(x, leaf_key(key, path))
