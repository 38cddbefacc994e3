"""Weights in two parts: bfloat16 for the model, and for the optimizer what that leaves of float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimorph._core.checks import abbreviated, is_one_of, not_an_array
from optimorph._core.numbers import copied, is_array, kind
from optimorph._core.paths import by_path, leaf_paths
from optimorph._core.rounding import check_key, leaf_key
from optimorph._core.shown import shown
from optimorph._core.types import PyTree
from optimorph.codecs import Encoded, Split8, Split16

CODECS = {jnp.dtype(jnp.int8): Split8(), jnp.dtype(jnp.int16): Split16()}
"""Of residuals, by their dtype."""

WHOLE = object()
"""Stands for None, where paths are compared."""


def split_weights(params: PyTree, bits: int = 8, key: jax.Array | None = None) -> tuple[PyTree, PyTree]:
    """Split float32 parameters into bfloat16 weights and residuals: 3 or 4 bytes for each parameter.

        θ', c = split(θ),  θ̂ = join(θ', c)

        θ' is a bfloat16 number nearest to θ̂, and to θ        (1)
        |θ̂ - θ| ≤ 129 · 2⁻²³ |θ|;  with a key twice that, and E[θ̂] = θ;  with 16 bits θ̂ = θ        (2)
        split(θ̂) = θ', c        (3)

    No float32 copy of the weights is then needed. The model computes with θ', and a step is

        params = join_weights(weights, residuals)
        updates, state = tx.update(gradients, state, params)
        weights, residuals = split_weights(apply_updates(params, updates), 8, key)

    Under `jax.jit` the parameters are joined, updated and split leaf by leaf. If weights and residuals are
    donated, the new ones reuse their buffers. Make the state from the float32 parameters, and pass the joined
    parameters to `update`, so that weight decay acts on them and not on θ'. Gradients with respect to θ' are
    bfloat16. If they are not cast to float32, an update has a relative error of 2⁻⁹.

    With 16 bits the parameters are restored bit by bit. With 8 bits and without a key, updates below
    1/130,000 of a weight are lost (in bfloat16 alone, those below 1/512). With a key small updates add up. By
    (3) an update of 0 changes nothing. Infinities stay infinite and NaN stays NaN. `codecs.Split8` describes
    very small and very large numbers, for which 8 bits are less accurate than (2).

    The noise depends on the key and on the path of the leaf, as in `apply_updates`. Use a new key for every
    step, such as `jax.random.fold_in(key, step)`.

    Args:
      params: the parameters. Leaves of other dtypes are not split, nor are Python numbers. Their residual is
        None.
      bits: the size of a residual, 8 or 16.
      key: a key of `jax.random`. With 16 bits it is not used.

    Returns:
      Weights and residuals, two trees like the parameters, with the same shapes and shardings.

    Raises:
      ValueError: other bits, a leaf that is not an array, or a `key` that is not a key of `jax.random`.

    References:
      FlashOptim 2026, arXiv:2602.23349, weight splitting. `codecs.Split8` and `codecs.Split16` have the
      equations.
    """
    if not is_one_of(bits, (8, 16)):
        raise ValueError(f"split_weights: bits must be 8 or 16, but is {shown(bits)}. Type bits=8.")
    if key is not None:
        check_key("split_weights", key)
    codec = Split16() if bits == 16 else Split8(stochastic=key is not None)

    def split(path: str, p: Any) -> tuple[Any, Any]:
        if kind(p) == "none" or isinstance(p, jax.ShapeDtypeStruct):
            raise ValueError(not_an_array("split_weights", path, p))
        if type(p) is float or jnp.result_type(p) != jnp.float32:
            return copied(p), None
        residual, weight = codec.encode(p, None if key is None else leaf_key(key, path))
        return weight, residual

    leaves, structure = jax.tree.flatten(params)
    pairs = [split(path, p) for path, p in zip(leaf_paths(params), leaves, strict=True)]
    return structure.unflatten([w for w, _ in pairs]), structure.unflatten([c for _, c in pairs])


def join_weights(weights: PyTree, residuals: PyTree) -> PyTree:
    """Restore the float32 parameters that `split_weights` split.

    Leaves without a residual are returned unchanged.

    Args:
      weights: the weights that `split_weights` returned.
      residuals: the residuals of the same call.

    Raises:
      ValueError: residuals whose paths are not those of the weights.
    """

    def join(c, w):
        if not _belongs(c, w):
            raise ValueError
        return copied(w) if c is None else CODECS[jnp.result_type(c)].decode(Encoded(c, w))

    try:
        return jax.tree.map(join, residuals, weights, is_leaf=lambda c: c is None)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(_difference(weights, residuals)) from error


def _belongs(c: Any, w: Any) -> bool:
    """Whether a residual, or None, is that of a weight."""
    if c is None:
        return w is None or jax.tree_util.all_leaves([w])
    if not (is_array(c) and is_array(w)):
        return False
    dtypes = jnp.result_type(c) in CODECS and jnp.result_type(w) == jnp.bfloat16
    return dtypes and np.shape(c) == np.shape(w)


def _difference(weights: PyTree, residuals: PyTree) -> str:
    present = jax.tree.map(lambda c: WHOLE if c is None else c, residuals, is_leaf=lambda c: c is None)
    ours, theirs = by_path(weights), by_path(present)
    lines = []
    for path in ours | theirs:
        c = theirs.get(path)
        if path not in theirs:
            lines.append(f"{path!r}: a weight, but no residual")
        elif path not in ours and c is not WHOLE:
            lines.append(f"{path!r}: a residual, but no weight")
        elif c is not WHOLE and not _belongs(c, ours[path]):
            lines.append(f"{path!r}: a residual of {_told(c)} for a weight of {_told(ours[path])}")
    return (
        "join_weights: the residuals do not match the weights.\n"
        f"  {abbreviated(lines) or 'They have the same leaves in other containers.'}\n"
        "Pass both as they were returned together: weights, residuals = split_weights(params)."
    )


def _told(x: Any) -> str:
    return f"{jnp.result_type(x)} and shape {np.shape(x)}" if is_array(x) else repr(x)
