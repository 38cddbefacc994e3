"""Rounding to bfloat16: right on average, to the nearest, or never towards zero; and the noise it takes."""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optimorph._core.shown import shown
from optimorph._core.types import Shape


def check_key(who: str, key: Any) -> None:
    """Refuse what is no single key of `jax.random`, of either form."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", ())
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (shape == () if typed else dtype == jnp.uint32 and len(shape) == 1):
        said = f"{dtype}{list(shape)}" if dtype is not None else shown(key)
        raise ValueError(
            f"{who}: key must be one key of jax.random, but is {said}. Type key=jax.random.key(0), and "
            "another key at every step."
        )


def step_key(state: Any) -> jax.Array:
    """The key of a step, for `leaf_key`, by the seed of a state and its count of steps."""
    return jax.random.fold_in(jax.random.key(state.seed), state.noise_count)


def leaf_key(key: jax.Array, path: str) -> jax.Array:
    """The key of one leaf, for `noise`: that of all leaves and its path, whatever the order of the leaves.

    In a few operations, where `jax.random.fold_in` takes a hundred.
    """
    return leaf_keys(key, [path])[0]


def leaf_keys(key: jax.Array, paths: Sequence[str]) -> jax.Array:
    """Those of many leaves, in as many operations as one."""
    hashes = jnp.asarray([zlib.crc32(path.encode()) for path in paths], jnp.uint32)
    return _mix(_words(key)[None] + _mix(hashes[:, None]))


def places(shape: Shape, steps: Sequence[int] | None = None) -> jax.Array:
    """The number of every element in its array, uint32, row by row; beyond 2³² from 0 again.

    `steps` says how far it is from each element to the next along each axis, in an array that this is a part
    of.
    """
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))] if steps is None else steps
    place = jnp.zeros(shape, jnp.uint32)
    for axis, step in enumerate(steps):
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(step % 2**32)
    return place


def noise(key: jax.Array, place: jax.Array) -> jax.Array:
    """32 random bits for every element, a hash of the key and the element's place and of nothing else.

        x ← c (x + word)  for every word of the key,  and  mix(x)        (1)

    `mix` is MurmurHash3's last step, which turns every bit of x into half of all bits. Element by element it
    is part of the operation that needs it, where generators of whole arrays take 9 bytes an element; and it
    is the same wherever the element lies, on any mesh and in any part of the array.

    References:
      Appleby 2011, MurmurHash3, fmix32.
    """
    c, words = jnp.uint32(0x9E3779B1), list(_words(key))
    start = jnp.uint32(0)
    for word in words:
        start = (start + word) * c
    return _mix(place * jnp.uint32(pow(0x9E3779B1, len(words), 2**32)) + start)  # (1), as x = a place + b


def _words(key: jax.Array) -> jax.Array:
    return jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def stochastic_bfloat16(x: jax.Array, key: jax.Array, place: jax.Array | None = None) -> jax.Array:
    """float32 numbers rounded to one of their two neighbours in bfloat16, stochastically.

        P(up) = (x - below) / (above - below), so that E[rounded] = x        (1)

    bfloat16 is the upper half of a float32: a random lower half added to x carries into the upper one with
    the probability (1), and the rest is cut off. Numbers of bfloat16, ±0 and ±inf stay what they are, and so
    does NaN. Finite numbers stay finite: beyond the largest of bfloat16, 3.39e38, they become that.

    `place` is that of every number in the array that x is a part of; without it x is the whole array.
    """
    return _carried(x, noise(key, places(x.shape) if place is None else place) >> 16)  # (1)


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
    return with_nan_of(x, rounded)


def with_nan_of(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, and NaN where x is NaN. `jax_debug_nans` refuses a constant NaN outside of programs."""
    return jnp.where(jnp.isnan(x), x.astype(rounded.dtype), rounded)
