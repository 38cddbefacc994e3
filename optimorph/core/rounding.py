"""Rounding to bfloat16: right on average, to the nearest, or never towards zero."""

import zlib

import jax
import jax.numpy as jnp


def leaf_key(key: jax.Array, path: str) -> jax.Array:
    """The key of one leaf: that of all leaves and its path, whatever the order of the leaves."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def stochastic_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 numbers rounded to one of their two neighbours in bfloat16, up or down by chance.

        P(up) = (x - below) / (above - below), so that E[rounded] = x        (1)

    bfloat16 is the upper half of a float32: a random lower half added to x carries into the upper one with
    the probability (1), and the rest is cut off. Numbers of bfloat16, ±0 and ±inf stay what they are, and so
    does NaN. Finite numbers stay finite: beyond the largest of bfloat16, 3.39e38, they become that.
    """
    return _carried(x, jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32))  # (1)


def nearest_bfloat16(x: jax.Array) -> jax.Array:
    """float32 numbers rounded to the nearest in bfloat16, of two the even one; finite ones stay finite."""
    upper = jax.lax.bitcast_convert_type(x, jnp.uint32) >> 16
    return _carried(x, 0x7FFF + (upper & 1))


def outer_bfloat16(x: jax.Array) -> jax.Array:
    """float32 numbers rounded to bfloat16 away from zero; finite ones stay finite."""
    return _carried(x, jnp.uint32(0xFFFF))


def _carried(x: jax.Array, lower: jax.Array) -> jax.Array:
    """The upper half of x, one step away from zero where adding to the lower half carries."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    upper = ((bits + lower) >> 16).astype(jnp.uint16)
    upper = jnp.where(jnp.isfinite(x) & (upper & 0x7FFF == 0x7F80), upper - 1, upper)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isnan(x), jnp.bfloat16(jnp.nan), rounded)
