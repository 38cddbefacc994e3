"""The codec of momentum: 8 bits with a sign."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from optimorph.codecs._blocks import BlockCodec, nearest
from optimorph.core.types import DTypeLike


def _linear(c: jax.Array) -> jax.Array:
    """c / 127; without the sign apart, compilers turn (c / 127) s into c (s / 127), which may underflow."""
    return jnp.sign(c) * (jnp.abs(c) / 127)


VALUES = {"softsign": lambda c: c / (254 - jnp.abs(c)), "linear": _linear}
"""Mapping → the value in [-1, 1] of a code from -127 to 127."""


def _softsign(q: jax.Array) -> jax.Array:
    """The code of q = 4 |x| / s, before rounding.

        254 - (w + √(w² + 1)) / 2,  w = 254 / (1 + q / 4)        (1)

    In float32 √(w² + 1) is w + 1 / 2w.
    """
    return 254 - 1016 / (4 + q) - (4 + q) / 4064


CODES = {"softsign": _softsign, "linear": lambda q: 31.75 * q}
"""Mapping → the code of 4 |x| / s, before rounding."""


@dataclasses.dataclass(frozen=True)
class Signed8(BlockCodec):
    """One byte for signed numbers, such as momentum: 127 codes of each sign, and one for zero.

        softsign: x = s c / (254 - |c|),  |decoded - x| ≤ s / 128        (1)
        linear:   x = s c / 127,          |decoded - x| ≤ s / 254        (2)

    s is the largest |x| of the block; scales in bfloat16 are at most 1/128 larger. Codes of (1) are four
    times denser around 0 than around s: numbers below s / 506 become 0, with (2) those below s / 254. Numbers
    are rounded to the nearest value. A second round trip changes nothing; with (2) and scales in bfloat16, a
    third changes nothing.

    A block whose numbers are all below 4.8e-38 becomes zeros, exactly. A non-finite number makes its own
    block NaN.

    Args:
      block: the numbers that share a scale, at least 1. If the last axis is sharded, shards that are not a
        multiple of it cost communication.
      mapping: "softsign", (1), or "linear", (2), which suffices for orthogonalized momentum.
      scale_dtype: float32 or bfloat16.

    Raises:
      ValueError: another mapping or dtype, or a block below 1.

    References:
      (1): FlashOptim 2026, arXiv:2602.23349; (2): Gupta et al. 2025, "Effective quantization of Muon
      optimizer states", arXiv:2509.23106; blocks: Dettmers et al. 2021, arXiv:2110.02861.
    """

    mapping: str = "softsign"

    code_dtype: ClassVar[DTypeLike] = jnp.int8

    def __post_init__(self):
        """Refuse unknown mappings."""
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
