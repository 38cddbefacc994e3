"""Numbers as they are."""

import dataclasses

import jax
import jax.numpy as jnp

from optimorph.codecs.codec import Codec, Encoded
from optimorph.core.types import Shape


@dataclasses.dataclass(frozen=True)
class Float32(Codec):
    """Four bytes: float32 comes back bit by bit, NaN and infinities as all others."""

    def zeros(self, shape: Shape) -> Encoded:
        """Zeros."""
        return Encoded(jnp.zeros(shape, jnp.float32), None)

    def _encode(self, x: jax.Array, key: jax.Array | None, place: jax.Array) -> Encoded:
        return Encoded(x, None)

    def _decode(self, encoded: Encoded) -> jax.Array:
        return encoded.codes
