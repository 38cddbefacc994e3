"""Eight bits of either sign."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from optimorph.codecs.blocks import BlockCodec, nearest
from optimorph.core.types import DTypeLike


def _linear(c: jax.Array) -> jax.Array:
    """c / 127, the sign apart: of (c / 127) s compilers make c (s / 127), which may vanish."""
    return jnp.sign(c) * (jnp.abs(c) / 127)


VALUES = {"softsign": lambda c: c / (254 - jnp.abs(c)), "linear": _linear}
"""What the codes from -127 to 127 stand for, in [-1, 1]."""


def _softsign(q: jax.Array) -> jax.Array:
    """The code nearest to z = q / 4 in [0, 1]: with w = 254 / (1 + z) code c has the numbers whose

        254 - (w + √(w² + 1)) / 2  is in  [c - 1/2, c + 1/2],

    where √(w² + 1) is w + 1 / 2w in float32.
    """
    return 254 - 1016 / (4 + q) - (4 + q) / 4064


CODES = {"softsign": _softsign, "linear": lambda q: 31.75 * q}
"""The other way, of 4 |x| / s, before rounding."""


@dataclasses.dataclass(frozen=True)
class Signed8(BlockCodec):
    """One byte for numbers of either sign, such as momentum: 127 codes each way, and one for zero.

        softsign: x = s c / (254 - |c|),  |decoded - x| ≤ s / 128        (1)
        linear:   x = s c / 127,          |decoded - x| ≤ s / 254        (2)

    s is the largest |x| of the block, in bfloat16 at most 1/128 above it. (1) has its codes four times as
    close around 0 as around s: of numbers below s / 506 it makes 0, (2) of those below s / 254. Each number
    becomes the nearest that its block has. A second round trip changes nothing; with (2) and scales in
    bfloat16 a third does not.

    A block of zeros is exact, and a block is zeros if all is below 4.8e-38. A number that is not finite makes
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

    def _codes(self, quarters: jax.Array, key: jax.Array | None, place: jax.Array) -> jax.Array:
        size = CODES[self.mapping](jnp.abs(quarters))
        return nearest(jnp.where(quarters < 0, -size, size))

    def _values(self, codes: jax.Array) -> jax.Array:
        return VALUES[self.mapping](codes.astype(jnp.float32))
