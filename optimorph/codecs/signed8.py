"""Eight bits of either sign."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from optimorph.codecs.blocks import BlockCodec
from optimorph.core.types import DTypeLike

VALUES = {"softsign": lambda c: c / (254 - c), "linear": lambda c: c / 127}
"""What the codes 0 to 127 stand for, in [0, 1]."""


def _softsign(z: jax.Array) -> jax.Array:
    """The code nearest to z in [0, 1]: beyond half of the way from c to its next, in one division.

    2 z > c / (254 - c) + (c + 1) / (253 - c)
    """
    c = jnp.clip(jnp.floor(254 * z / (1 + z)), 0, 126)
    above = 2 * z * (254 - c) * (253 - c) > c * (253 - c) + (c + 1) * (254 - c)
    return c + above.astype(z.dtype)


CODES = {"softsign": _softsign, "linear": lambda z: jnp.clip(jnp.round(127 * z), 0, 127)}
"""The other way."""


@dataclasses.dataclass(frozen=True)
class Signed8(BlockCodec):
    """One byte for numbers of either sign, such as momentum: 127 codes each way, and one for zero.

        softsign: x = s c / (254 - |c|),  |decoded - x| ≤ s / 128        (1)
        linear:   x = s c / 127,          |decoded - x| ≤ s / 254        (2)

    s is the largest |x| of the block, in bfloat16 at most 1/128 above it. (1) has its codes four times as
    close around 0 as around s: of numbers below s / 506 it makes 0, (2) of those below s / 254. Each number
    becomes the nearest that its block has. A second round trip changes nothing; with (2) and scales in
    bfloat16 a third does not.

    A block of zeros is exact, and a block is zeros if all is below 1.2e-38. A number that is not finite makes
    its block NaN, and no other.

    Args:
      block: how many numbers share a scale, at least 1; more on each device than a multiple of it, if the
        last axis is divided over devices, costs communication.
      mapping: "softsign", (1), or "linear", (2), which suffices for what is orthogonalized.
      scale_dtype: float32 or bfloat16.

    Raises:
      ValueError: another mapping or dtype, or a block of no numbers.

    References:
      (1): FlashOptim 2026, arXiv:2602.23349; (2): Gupta et al. 2025, "Effective quantization of Muon
      optimizer states", arXiv:2509.23106; blocks: Dettmers et al. 2021, arXiv:2110.02861.
    """

    mapping: str = "softsign"

    code_dtype: ClassVar[DTypeLike] = jnp.int8

    def __post_init__(self):
        """Refuse mappings that there are none of."""
        super().__post_init__()
        if self.mapping not in VALUES:
            raise ValueError(
                f"Signed8: no mapping is called {self.mapping!r}. Type {' or '.join(map(repr, VALUES))}."
            )

    def _codes(self, units: jax.Array, key: jax.Array | None, place: jax.Array) -> jax.Array:
        codes = CODES[self.mapping](jnp.abs(units))
        return jnp.where(units < 0, -codes, codes)

    def _values(self, codes: jax.Array) -> jax.Array:
        c = codes.astype(jnp.float32)
        values = VALUES[self.mapping](jnp.abs(c))
        return jnp.where(c < 0, -values, values)
