"""The codec of bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp

from optimorph._core.rounding import nearest_bfloat16, stochastic_bfloat16
from optimorph._core.types import Shape
from optimorph.codecs._codec import Codec, Encoded


@dataclasses.dataclass(frozen=True)
class BFloat16(Codec):
    """Two bytes: the nearest bfloat16 number, or with stochastic rounding one of the two neighbors, unbiased.

        |decoded - x| ≤ |x| / 257, stochastic < |x| / 128        (1)

    Slow averages need stochastic rounding: a change of less than half the distance to the next number would
    be rounded away. Infinities and NaN are kept, and finite numbers stay finite: the largest is 3.39e38.
    Numbers below 1.2e-38 lose digits.

    Args:
      stochastic: whether to round stochastically, which needs a key.

    References:
      Gupta et al. 2015, "Deep learning with limited numerical precision", arXiv:1502.02551, section 3.1.
    """

    stochastic: bool = False

    def zeros(self, shape: Shape) -> Encoded:
        """The encoding of zeros."""
        return Encoded(jnp.zeros(shape, jnp.bfloat16), None)

    def _encode(self, x: jax.Array, key: jax.Array | None, place: jax.Array) -> Encoded:
        if not self.stochastic:
            return Encoded(nearest_bfloat16(x), None)
        return Encoded(stochastic_bfloat16(x, self._key(key), place), None)

    def _decode(self, encoded: Encoded) -> jax.Array:
        return encoded.codes.astype(jnp.float32)
