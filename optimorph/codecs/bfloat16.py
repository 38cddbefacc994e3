"""The upper half of every float32."""

import dataclasses

import jax
import jax.numpy as jnp

from optimorph.codecs.codec import Codec, Encoded
from optimorph.core.rounding import nearest_bfloat16, stochastic_bfloat16
from optimorph.core.types import Shape


@dataclasses.dataclass(frozen=True)
class BFloat16(Codec):
    """Two bytes: the nearest bfloat16 number, or by chance one of the two neighbours, right on average.

        |decoded - x| ≤ |x| / 257, by chance < |x| / 128        (1)

    Slow averages need the latter: they move by less than half of the way to the next number, and the nearest
    is where they are. Infinities and NaN stay where they are, and finite numbers finite: the largest is
    3.39e38. Numbers below 1.2e-38 lose digits.

    Args:
      stochastic: whether to round by chance, which needs a key.

    References:
      Gupta et al. 2015, "Deep learning with limited numerical precision", arXiv:1502.02551, section 3.1.
    """

    stochastic: bool = False

    def zeros(self, shape: Shape) -> Encoded:
        """Zeros."""
        return Encoded(jnp.zeros(shape, jnp.bfloat16), None)

    def _encode(self, x: jax.Array, key: jax.Array | None, place: jax.Array) -> Encoded:
        if not self.stochastic:
            return Encoded(nearest_bfloat16(x), None)
        return Encoded(stochastic_bfloat16(x, self._key(key), place), None)

    def _decode(self, encoded: Encoded) -> jax.Array:
        return encoded.codes.astype(jnp.float32)
