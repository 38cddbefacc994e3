"""Matrices scaled to norm 1 whatever their size, so that no power of them overflows or vanishes."""

import jax
import jax.numpy as jnp

from optimorph.core.numbers import upcast


def unit(g: jax.Array) -> jax.Array:
    """g / ‖g‖F of every matrix, in float32 or wider, safe from overflow and underflow; zero stays zero."""
    x, _ = scaled(g)
    squares = jnp.sum((x * x.conj()).real, axis=(-2, -1), keepdims=True)
    return x / jnp.sqrt(not_zero(squares)).astype(x.dtype)


def scaled(g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """g / c and c, the largest |entry| of every matrix, `(*batch, 1, 1)`; zero stays zero.

    Derivatives take c for a constant. That is right for every f(g) = cᵏ f(g / c), homogeneous of degree k.
    """
    x = upcast(g)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True))
    number = largest.dtype.type
    middle = jnp.where(largest > 1, number(2.0**-64), number(2.0**64))  # reciprocals are all normal
    return x * middle.astype(x.dtype) / not_zero(largest * middle).astype(x.dtype), largest


def not_zero(x: jax.Array) -> jax.Array:
    """`x` to divide by: 1 where it is 0."""
    return jnp.where(x == 0, 1, x)
