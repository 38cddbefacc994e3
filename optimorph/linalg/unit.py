"""Matrices scaled to norm 1 whatever their size, so that no power of them overflows or vanishes."""

import jax
import jax.numpy as jnp

from optimorph.core.tree import wide


def unit(g: jax.Array) -> jax.Array:
    """g / ‖g‖F of every matrix, in float32 or wider, safe from overflow and underflow; zero stays zero."""
    x = wide(g)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    middle = jnp.where(largest > 1, 2.0**-64, 2.0**64).astype(largest.dtype)  # reciprocals are all normal
    x = x * middle.astype(x.dtype)
    x = x / _not_zero(largest * middle).astype(x.dtype)
    squares = jnp.sum((x * x.conj()).real, axis=(-2, -1), keepdims=True)
    return x / jnp.sqrt(_not_zero(squares)).astype(x.dtype)


def _not_zero(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, 1, x)
