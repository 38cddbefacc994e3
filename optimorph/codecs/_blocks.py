"""Codecs of one byte per number, with a scale for each block of the last axis."""

import abc
import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from optimorph._core.checks import check_integer, dtype_name, is_one_of
from optimorph._core.rounding import noise, outer_bfloat16
from optimorph._core.shown import shown
from optimorph._core.types import DTypeLike, Shape
from optimorph.codecs._codec import Codec, Encoded
from optimorph.codecs._forms import INFINITY, NAN, TINY, Form, in_form

WHOLE = 1.5 * 2**23
"""The last bits of x + WHOLE are the integer nearest to x, ties to even."""


@dataclasses.dataclass(frozen=True)
class BlockCodec(Codec):
    """What the codecs of one byte share.

        s = max |x| over the block, rounded up for bfloat16 scales              (1)
        x = s value(code)                                                       (2)

    Blocks have `block_width(block, last)` numbers; the last one of an axis may be shorter. A scalar is one
    block.
    """

    block: int = 128
    _: dataclasses.KW_ONLY
    scale_dtype: DTypeLike = "float32"

    code_dtype: ClassVar[DTypeLike]

    def __post_init__(self):
        who = type(self).__name__
        check_integer(who, "block", self.block, 128)
        if dtype_name(self.scale_dtype) not in ("float32", "bfloat16"):
            raise ValueError(
                f"{who}: scale_dtype must be float32 or bfloat16, which have the range of gradients, but is "
                f"{shown(self.scale_dtype)}. Type scale_dtype='bfloat16'."
            )
        object.__setattr__(self, "scale_dtype", jnp.dtype(self.scale_dtype))

    def zeros(self, shape: Shape) -> Encoded:
        return Encoded(
            jnp.zeros(shape, self.code_dtype), jnp.zeros(self._scales_shape(shape), self.scale_dtype)
        )

    def scales(self, x: jax.Array) -> jax.Array:
        """(1), one for each block."""

        def of(form: Form, x: jax.Array) -> jax.Array:
            s = form.scales(form.split(x), self._bits, _scale)
            s = outer_bfloat16(s) if self.scale_dtype == jnp.bfloat16 else s
            return s.reshape(self._scales_shape(x.shape))

        return in_form(of, self._width(x.shape), x)

    def _encode(
        self, x: jax.Array, key: jax.Array | None, place: jax.Array, scales: jax.Array | None
    ) -> Encoded:
        scales = self.scales(x) if scales is None else scales

        def codes(form: Form, x: jax.Array, place: jax.Array, scales: jax.Array) -> jax.Array:
            s = scales.astype(jnp.float32).reshape(scales.shape or (1,))
            codes = self._codes(form.quarters(form.split(x), s), key, form.split(place))
            return form.joined(codes.astype(self.code_dtype), x)

        return Encoded(in_form(codes, self._width(x.shape), x, place, scales), scales)

    def _decode(self, encoded: Encoded) -> jax.Array:
        assert encoded.scales is not None

        def decoded(form: Form, codes: jax.Array, scales: jax.Array) -> jax.Array:
            split = form.split(codes)
            s = scales.astype(jnp.float32).reshape(scales.shape or (1,))
            return form.joined(self._values(split) * form.spread(s), codes)  # (2)

        return in_form(decoded, self._width(encoded.codes.shape), encoded.codes, encoded.scales)

    def _bits(self, x: jax.Array) -> jax.Array:
        """|x| as int32 in the same order, NaN above all: compilers lose NaN in a maximum of floats."""
        return jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)

    @abc.abstractmethod
    def _codes(self, quarters: jax.Array, key: jax.Array | None, place: jax.Array) -> jax.Array:
        """The codes of 4 x / s, which is in [-4, 4] up to rounding and 0 where s is 0; arbitrary for NaN."""

    @abc.abstractmethod
    def _values(self, codes: jax.Array) -> jax.Array:
        """The values of codes, in [-1, 1]."""

    def _scales_shape(self, shape: Shape) -> Shape:
        return (*shape[:-1], -(-shape[-1] // self._width(shape))) if shape else ()

    def _width(self, shape: Shape) -> int:
        return block_width(self.block, shape[-1] if shape else 1)


@functools.lru_cache(maxsize=1 << 10)
def block_width(block: int, last: int) -> int:
    """The numbers of a block, at most `block`, where the last axis has `last`.

    Shards of a row should hold whole blocks on every mesh, and a state does not know its mesh. So the width
    is the largest divisor of `last` with which 16 devices can share the blocks of a row evenly, or else 8, 4
    or 2. It is at least a quarter of `block`; without such a divisor it is `block`.

    1152 → 72, 768 → 48, 4096 → 128, for block = 128.
    """

    def shares(width: int) -> int:
        count = last // width
        return min(count & -count, 16)  # the largest power of 2 that divides the count

    widths = [width for width in range(-(-block // 4), min(block, last) + 1) if last % width == 0]
    return max(widths, key=lambda width: (shares(width), width), default=max(1, min(block, last)))


def _scale(largest: jax.Array) -> jax.Array:
    """The bits of (1) from those of the largest |x|: 0 below `TINY`, NaN if it is not finite."""
    s = jnp.where(largest < INFINITY, largest, NAN)
    return jnp.where(s < np.float32(TINY).view(np.int32), 0, s)


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
    """One byte for each signed number, for momentum: 127 codes of each sign, and one for zero.

        softsign: x = s c / (254 - |c|),  |decoded - x| ≤ s / 128        (1)
        linear:   x = s c / 127,          |decoded - x| ≤ s / 254        (2)

    s is the largest |x| of the block; scales in bfloat16 are at most 1/128 larger. Codes of (1) are four
    times denser around 0 than around s. With (1) numbers below s / 506 become 0, with (2) those below s /
    254. Numbers are rounded to the nearest value. A second round trip changes nothing; with (2) and scales in
    bfloat16, only a third changes nothing.

    A block whose numbers are all below 4.8e-38 becomes zeros, exactly. A non-finite number makes its own
    block NaN.

    Args:
      block: the most numbers that share a scale, at least 1. Blocks may be narrower, down to a quarter of it,
        so that 16 devices can share a row evenly. If a row is divided further, encoding costs communication.
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
        super().__post_init__()
        if not is_one_of(self.mapping, [*VALUES]):
            raise ValueError(
                f"Signed8: mapping must be {' or '.join(map(repr, VALUES))}, but is {shown(self.mapping)}."
            )

    def _codes(self, quarters: jax.Array, key: jax.Array | None, place: jax.Array) -> jax.Array:
        size = CODES[self.mapping](jnp.abs(quarters))
        return nearest(jnp.where(quarters < 0, -size, size))

    def _values(self, codes: jax.Array) -> jax.Array:
        return VALUES[self.mapping](codes.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class Nonneg8(BlockCodec):
    """One byte for each nonnegative number, for second moments. Rounding is stochastic.

        x = s (c / 256)²,  c = 1 ... 256                          (1)
        E[decoded] = x for x ≥ s / 65536, and |√decoded - √x| ≤ √s / 256        (2)

    s is the largest x of the block. There is no code for zero: numbers below s / 65536 become s / 65536. An
    update divided by the root of 0 would be as large as eps allows, but an update divided by √s / 256 is
    small. Rounding is stochastic because an average with β = 0.999 moves by less than half the distance to
    the next code. With rounding to the nearest it would never change.

    A block whose numbers are all below 4.8e-38 becomes zeros, exactly. A negative or non-finite number makes
    its own block NaN.

    Args:
      block: the most numbers that share a scale, at least 1. Blocks may be narrower, down to a quarter of it,
        so that 16 devices can share a row evenly. If a row is divided further, encoding costs communication.
      scale_dtype: float32 or bfloat16.

    Raises:
      ValueError: another dtype, or a block below 1; when encoding, no key.

    References:
      The root: FlashOptim 2026, arXiv:2602.23349; no zero: Li et al. 2023, "Memory efficient optimizers with
      4-bit states", arXiv:2309.01507, section 4.1; stochastic rounding: Gupta et al. 2015, arXiv:1502.02551.
    """

    code_dtype: ClassVar[DTypeLike] = jnp.uint8

    def _bits(self, x: jax.Array) -> jax.Array:
        """x as int32 in the same order, negative numbers and NaN above all."""
        return jnp.where(x >= 0, jax.lax.bitcast_convert_type(x, jnp.int32), 0x7FFFFFFF)

    def _codes(self, quarters: jax.Array, key: jax.Array | None, place: jax.Array) -> jax.Array:
        random = (noise(self._key(key), place) >> 16).astype(jnp.int32).astype(jnp.float32)
        size = 16384 * quarters  # 65536 x / s
        c = jnp.clip(jnp.floor(jnp.sqrt(size)), 1, 255)
        above = size - c**2 > (random + 0.5) / 65536 * (2 * c + 1)  # the fraction of the way to (c + 1)²
        return nearest(jnp.where(above, c, c - 1))  # (2)

    def _values(self, codes: jax.Array) -> jax.Array:
        return ((codes.astype(jnp.float32) + 1) / 256) ** 2  # (1)


def nearest(x: jax.Array) -> jax.Array:
    """The nearest integer, ties to even: its last byte is right for |x| < 2²², arbitrary for NaN.

    On CPUs it is in the last bits of x + 1.5 2²³, which vectorizes. XLA for GPUs makes -1 of these bits where
    they are narrowed in the same kernel (seen with jaxlib 0.11.2), so that other platforms round.
    """
    return jax.lax.platform_dependent(x, cpu=_last_bits, default=lambda x: jnp.round(x).astype(jnp.int32))


def _last_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x + WHOLE, jnp.int32)
