"""The codec of bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp

from optimorph._core.checks import check_flags
from optimorph._core.rounding import nearest_bfloat16, stochastic_bfloat16
from optimorph._core.types import Shape
from optimorph.codecs._codec import Codec, Encoded


@dataclasses.dataclass(frozen=True)
class BFloat16(Codec):
    """Two bytes for each number, in bfloat16, rounded to the nearest number or stochastically.

        |decoded - x| ≤ |x| / 257        (1)  to the nearest
        |decoded - x| < |x| / 128        (2)  stochastically, E[decoded] = x

    Slow averages need stochastic rounding. With rounding to the nearest, a change of less than half the
    distance to the next number is lost. Infinities and NaN are kept. Finite numbers stay finite; the largest
    is 3.39e38. Numbers below 1.2e-38 lose digits.

    Args:
      stochastic: whether to round stochastically, which needs a key.

    References:
      Gupta et al. 2015, "Deep learning with limited numerical precision", arXiv:1502.02551, section 3.1.
    """

    stochastic: bool = False

    def __post_init__(self):
        check_flags("BFloat16", stochastic=self.stochastic)

    def zeros(self, shape: Shape) -> Encoded:
        return Encoded(jnp.zeros(shape, jnp.bfloat16), None)

    def _encode(self, x: jax.Array, key: jax.Array | None, place: jax.Array, scales: None) -> Encoded:
        if not self.stochastic:
            return Encoded(nearest_bfloat16(x), None)
        return Encoded(stochastic_bfloat16(x, self._key(key), place), None)

    def _decode(self, encoded: Encoded) -> jax.Array:
        return encoded.codes.astype(jnp.float32)
