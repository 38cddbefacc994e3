"""A codec that stores float32 unchanged: what slabs cost without encoding, and what they must not change."""

import dataclasses
import functools

import jax.numpy as jnp

from optimorph import codecs


@functools.cache
def float32_class(codecs):
    """The codec's class, for one copy of the package."""

    @dataclasses.dataclass(frozen=True)
    class Float32(codecs.Codec):
        """Four bytes: float32 bit by bit."""

        def zeros(self, shape):
            return codecs.Encoded(jnp.zeros(shape, jnp.float32), None)

        def _encode(self, x, key, place, scales):
            return codecs.Encoded(x, None)

        def _decode(self, encoded):
            return encoded.codes

    return Float32


Float32 = float32_class(codecs)
