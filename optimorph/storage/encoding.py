"""Moments as codes and scales, leaf by leaf."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from optimorph._distributed.shardings import devices, spec_of
from optimorph.codecs import Codec, Encoded, Signed8
from optimorph.core.types import PyTree, Shape


def begin(codec: Codec | None, x: jax.Array) -> Encoded:
    """A moment that is one number everywhere, as that number is encoded; complex and float64 as they are.

    What has no scales gets zeros for them: a tree of scales is then one like the parameters, with arrays of
    as many axes, which lie over a mesh as they do and can be saved.
    """
    if codec is None or not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize > 4:
        return Encoded(x, _full_beside(x, _scales_shape(Signed8(), x.shape), jnp.zeros([], x.dtype)))
    number = jnp.max(x.astype(jnp.float32), initial=-jnp.inf) if x.size else jnp.float32(0)
    one = _encode(codec)(number, jax.random.key(0))
    codes = jnp.full_like(x, one.codes, dtype=one.codes.dtype)
    if one.scales is None:
        return begin(None, codes)
    return Encoded(codes, _full_beside(x, _scales_shape(codec, x.shape), one.scales))


@functools.cache
def _encode(codec: Codec) -> Callable[..., Encoded]:
    return jax.jit(codec.encode)  # traced once for all leaves


def _scales_shape(codec: Codec, shape: Shape) -> Shape:
    scales = codec.form(shape).scales
    assert scales is not None
    return scales.shape


def decoded(codec: Codec | None, encoded: Encoded) -> jax.Array:
    """The moment in float32, or as it is."""
    return encoded.codes if codec is None else codec.decode(encoded)


def encoded(codec: Codec | None, x: jax.Array, key: jax.Array, place: Any, before: Encoded) -> Encoded:
    """The moment in codes, or as it is."""
    if codec is None:
        return Encoded(x, before.scales)
    found = codec.encode(x, key, place)
    return found if found.scales is not None else Encoded(found.codes, before.scales)


def codes_of(tree: PyTree) -> PyTree:
    """The codes of a tree of what is encoded."""
    return jax.tree.map(lambda each: each.codes, tree, is_leaf=_is_encoded)


def scales_of(tree: PyTree) -> PyTree:
    """The scales of a tree of what is encoded."""
    return jax.tree.map(lambda each: each.scales, tree, is_leaf=_is_encoded)


def _is_encoded(x: Any) -> bool:
    return isinstance(x, Encoded)


def _full_beside(x: jax.Array, shape: Shape, value: jax.Array) -> jax.Array:
    """One number everywhere, lying over a mesh as `x` does as far as that is known and blocks are not cut."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else x.sharding
    if not isinstance(sharding, NamedSharding) or not sharding.mesh.shape or not shape:
        return jnp.full(shape, value)
    *spec, last = spec_of(sharding.spec, x.ndim, sharding.mesh.shape)
    if shape[-1] % devices(sharding.mesh.shape, last):
        last = ()
    spec = PartitionSpec(*(names or None for names in (*spec, last)))
    return jax.lax.full(shape, value, sharding=sharding.update(spec=spec))
