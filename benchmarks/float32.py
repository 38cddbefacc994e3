"""A codec that stores float32 unchanged: what slabs cost without encoding, and what they must not change."""

import dataclasses

import jax.numpy as jnp

from optimorph.codecs import Codec, Encoded


@dataclasses.dataclass(frozen=True)
class Float32(Codec):
    """Four bytes: float32 bit by bit."""

    def zeros(self, shape):
        """The encoding of zeros."""
        return Encoded(jnp.zeros(shape, jnp.float32), None)

    def _encode(self, x, key, place):
        return Encoded(x, None)

    def _decode(self, encoded):
        return encoded.codes
