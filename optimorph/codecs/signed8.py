"""Eight bits of either sign."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from optimorph.codecs.blocks import BlockCodec, one_of_two
from optimorph.core.types import DTypeLike

VALUES = {"softsign": lambda c: c / (254 - c), "linear": lambda c: c / 127}
"""What the codes 0 to 127 stand for, in [0, 1]."""

CODES = {"softsign": lambda z: 254 * z / (1 + z), "linear": lambda z: 127 * z}
"""The other way: a code, and how far it is to the next."""


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
        size = jnp.abs(units)
        below = jnp.clip(jnp.floor(CODES[self.mapping](size)), 0, 126)
        return jnp.sign(units) * one_of_two(size, below, VALUES[self.mapping], 0.5)

    def _values(self, codes: jax.Array) -> jax.Array:
        c = codes.astype(jnp.float32)
        return jnp.sign(c) * VALUES[self.mapping](jnp.abs(c))
