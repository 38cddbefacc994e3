"""A state in the dtypes that the optimizer's arguments say, however it was restored."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimorph._core.numbers import is_array
from optimorph._core.types import PyTree

_NOT_32 = {np.dtype(name) for name in (jnp.bfloat16, "float16", "float64", "complex128")}
_CASTABLE = {np.dtype("float32"), np.dtype("complex64"), *_NOT_32}


def as_made(init: Callable[[PyTree], PyTree], state: PyTree, params: PyTree | None) -> PyTree:
    """A state in the dtypes that `init` gives it; unchanged without parameters, which `init` needs.

    What is in 32 bits is not narrowed: transformations do so when they store it. Codes in one byte are
    unchanged, because no other numbers can stand for them. So is a state of other parameters or of another
    optimizer, which `update` refuses.
    """
    leaves, structure = jax.tree.flatten(state)
    others = _NOT_32 & {getattr(x, "dtype", None) for x in leaves}
    if params is None or not (others or jnp.result_type(float).itemsize == 8):
        return state
    with warnings.catch_warnings(action="ignore"):  # they were given when the state was made
        try:
            arrays = jax.tree.map(lambda x: x if is_array(x) else None, params)
            made = jax.tree.leaves(jax.eval_shape(lambda p: init(p), arrays))
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError):
            return state
    fit = [*map(np.shape, leaves)] == [x.shape for x in made]
    return structure.unflatten(map(_cast, leaves, made)) if fit else state


def _cast(x: Any, made: Any) -> Any:
    own = getattr(x, "dtype", None)
    return recast(x, made) if own in _NOT_32 or made.dtype.itemsize > 4 else x


def recast(x: Any, made: Any) -> Any:
    """An array in another's dtype, if both hold numbers in at least two bytes."""
    own, other = getattr(x, "dtype", None), made.dtype
    return x.astype(other) if own != other and own in _CASTABLE and other in _CASTABLE else x
