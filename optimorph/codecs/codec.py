"""What every codec is: a description with `encode` and `decode`."""

import abc
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimorph.core.checks import check_key
from optimorph.core.rounding import places
from optimorph.core.types import Shape


class Encoded(NamedTuple):
    """An array as a codec stores it.

    Shapes:
      codes: that of the array.
      scales: `(*batch, ceil(last / block))`, one for each block of the last axis; None of codecs without.
    """

    codes: jax.Array
    scales: jax.Array | None


class Codec(abc.ABC):
    """A way to store real numbers: hashable, and no array itself.

    Codecs work on every axis but the last, and on every block of that, by themselves: codes and scales can
    be divided over devices as the array is.
    """

    def encode(self, x: Any, key: jax.Array | None = None, place: jax.Array | None = None) -> Encoded:
        """Store an array of real numbers; those wider than float32 are rounded to it first.

        Args:
          x: of any shape, also `()` and empty ones.
          key: of `jax.random`; codecs that round by chance need one, the others take no notice of it.
          place: of every number in the array that x is a part of, uint32: a part is rounded as the whole
            would be. x is the whole without it.

        Raises:
          ValueError: integers, booleans or complex numbers; no key where one is needed.
        """
        x = self._real(x)
        return self._encode(x, key, places(x.shape) if place is None else place)

    def decode(self, encoded: Encoded) -> jax.Array:
        """The numbers that are stored, in float32 and in the shape of the codes."""
        return self._decode(jax.tree.map(jnp.asarray, encoded))

    @abc.abstractmethod
    def zeros(self, shape: Shape) -> Encoded:
        """What decodes to zeros, without encoding them, which compilers would do number by number."""

    def form(self, shape: Shape) -> Encoded:
        """Shapes and dtypes of codes and scales for an array of this shape."""
        return _form(self, shape)

    def bytes_per_element(self, shape: Shape) -> float:
        """Of codes and scales for an array of this shape; 0 of an empty one."""
        stored = jax.tree.leaves(self.form(shape))
        return sum(x.size * x.dtype.itemsize for x in stored) / max(1, math.prod(shape))

    @abc.abstractmethod
    def _encode(self, x: jax.Array, key: jax.Array | None, place: jax.Array) -> Encoded:
        """`encode` of float32."""

    @abc.abstractmethod
    def _decode(self, encoded: Encoded) -> jax.Array:
        """`decode` of JAX's arrays."""

    def _real(self, x: Any) -> jax.Array:
        dtype = jnp.result_type(x)
        if jnp.issubdtype(dtype, jnp.floating):
            return jnp.asarray(x, jnp.float32)
        who = type(self).__name__
        if jnp.issubdtype(dtype, jnp.complexfloating):
            fix = "Type encode(x.real) and encode(x.imag), each stored for itself."
        else:
            fix = "Type encode(x.astype('float32')); counts and indices are better left as they are."
        raise ValueError(f"{who}: encode stores real numbers, but x is an array of {dtype}. {fix}")

    def _key(self, key: jax.Array | None) -> jax.Array:
        if key is None:
            raise ValueError(
                f"{type(self).__name__}: encode was called without a key, but rounds by chance. "
                "Type encode(x, jax.random.key(0)), and another key at every step."
            )
        check_key(type(self).__name__, key)
        return key


@functools.lru_cache(maxsize=1 << 10)
def _form(codec: Codec, shape: Shape) -> Encoded:
    return jax.eval_shape(lambda: codec.zeros(shape))
