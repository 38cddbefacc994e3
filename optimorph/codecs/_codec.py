"""The interface of codecs: a hashable description with `encode` and `decode`."""

import abc
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimorph._core.rounding import check_key, places
from optimorph._core.types import Shape


class Encoded(NamedTuple):
    """An array as a codec stores it.

    Shapes:
      codes: the shape of the array.
      scales: `(*batch, blocks)`, one scale for each block of the last axis; None if the codec has no scales.
    """

    codes: jax.Array
    scales: jax.Array | None


class Codec(abc.ABC):
    """A way to store real numbers in fewer bytes: the base class of all codecs.

    A codec is a hashable description without arrays. It encodes each block of the last axis independently, so
    codes and scales can have the array's sharding.
    """

    def encode(
        self,
        x: Any,
        key: jax.Array | None = None,
        place: jax.Array | None = None,
        scales: jax.Array | None = None,
    ) -> Encoded:
        """Encode an array of real numbers. Dtypes wider than float32 are first rounded to float32.

        Args:
          x: an array of any shape, including `()` and empty ones.
          key: a key of `jax.random`, which codecs with stochastic rounding need and the others ignore.
          place: if x is a part of a larger array, the index of every number in that array, uint32. The part
            is then rounded like the whole.
          scales: `scales(x)`, where they are computed already.

        Raises:
          ValueError: integers, booleans or complex numbers; a missing key.
        """
        x = self._real(x)
        return self._encode(x, key, places(x.shape) if place is None else place, scales)

    def scales(self, x: jax.Array) -> jax.Array | None:
        """The scales of float32 numbers; None if the codec has none."""
        return None

    def decode(self, encoded: Encoded) -> jax.Array:
        """The stored numbers, in float32, with the shape of the codes."""
        return self._decode(jax.tree.map(jnp.asarray, encoded))

    @abc.abstractmethod
    def zeros(self, shape: Shape) -> Encoded:
        """The encoding of an array of zeros, made without the encoder, which compilers would fold slowly."""

    def form(self, shape: Shape) -> Encoded:
        """The shapes and dtypes of the codes and scales for an array of this shape."""
        return _form(self, shape)

    @abc.abstractmethod
    def _encode(
        self, x: jax.Array, key: jax.Array | None, place: jax.Array, scales: jax.Array | None
    ) -> Encoded:
        """`encode` for float32."""

    @abc.abstractmethod
    def _decode(self, encoded: Encoded) -> jax.Array:
        """`decode` for JAX arrays."""

    def _real(self, x: Any) -> jax.Array:
        dtype = jnp.result_type(x)
        if jnp.issubdtype(dtype, jnp.floating):
            return jnp.asarray(x, jnp.float32)
        who = type(self).__name__
        if jnp.issubdtype(dtype, jnp.complexfloating):
            fix = "Type encode(x.real) and encode(x.imag)."
        else:
            fix = "Type encode(x.astype('float32')); counts and indices are better not encoded."
        raise ValueError(f"{who}: encode stores real numbers, but x is an array of {dtype}. {fix}")

    def _key(self, key: jax.Array | None) -> jax.Array:
        if key is None:
            raise ValueError(
                f"{type(self).__name__}: encode was called without a key, but rounds stochastically. "
                "Type encode(x, jax.random.key(0)), and another key at every step."
            )
        check_key(type(self).__name__, key)
        return key


@functools.lru_cache(maxsize=1 << 10)
def _form(codec: Codec, shape: Shape) -> Encoded:
    return jax.eval_shape(lambda: codec.zeros(shape))
