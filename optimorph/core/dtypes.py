"""Arithmetic in float32 or wider, and back to a leaf's own dtype."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from optimorph.core.types import DTypeLike


@functools.cache
def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float32 or `dtype`, whichever is wider; complex dtypes stay complex."""
    if not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).bits < 32:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(dtype)


def wide(x: Any) -> jax.Array:
    """Upcast `x` to float32 or wider, the precision of all arithmetic here."""
    if isinstance(x, jax.Array) and x.dtype == wide_dtype(x.dtype):
        return x  # what asarray returns, at a tenth of its cost for every traced leaf
    return jnp.asarray(x, wide_dtype(jnp.result_type(x)))


def cast_like(x: jax.Array, like: Any) -> jax.Array:
    """Cast `x` to the precision of `like`; the square of a complex leaf stays real."""
    dtype = jnp.result_type(like)
    if x.dtype == dtype:
        return x
    if jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.iscomplexobj(x):
        dtype = jnp.finfo(dtype).dtype
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        x = x.real
    return x.astype(dtype)
