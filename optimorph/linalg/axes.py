"""How an array reads as matrices: one letter per axis."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]

_TOKEN = re.compile(r"\s*(?:([iob])|\(\s*([0-9]+(?:\s*\+\s*[0-9]+)*)\s*([io])\s*\))\s*")


_MOST_BLOCKS = 1 << 16


class Axis(NamedTuple):
    """One axis of a spec: its letter, and the proportions of its blocks: (1,) for an axis in one piece."""

    letter: str
    blocks: tuple[int, ...]

    @property
    def equal(self) -> bool:
        """Whether all blocks are of one size."""
        return len(set(self.blocks)) == 1

    def __str__(self) -> str:
        """The axis as a spec writes it."""
        if len(self.blocks) == 1:
            return self.letter
        sizes = str(len(self.blocks)) if self.equal else "+".join(map(str, self.blocks)) + " "
        return f"({sizes}{self.letter})"


@dataclasses.dataclass(frozen=True)
class Axes:
    """One letter per axis: `i` input (summed over), `o` output, `b` batch (each slice its own matrix).

    Several `i` make one input side, several `o` one output side. An axis that holds several matrices side by
    side is written with its blocks: `(3o)` is three equal ones, `(32+8+8 o)` three whose sizes are as
    32 : 8 : 8, be that heads or numbers.

    | leaf | shape | spec |
    |---|---|---|
    | dense kernel (Flax, Haiku) | (in, out) | `io` |
    | dense weight (Equinox, PyTorch) | (out, in) | `oi` |
    | convolution kernel (Flax, Haiku) | (height, width, in, out) | `iiio` |
    | convolution weight (Equinox) | (out, in, height, width) | `oiii` |
    | layers stacked by a scan | (layer, in, out) | `bio` |
    | experts of stacked layers | (layer, expert, in, out) | `bbio` |
    | attention's query, whole | (model, head, size) | `ioo` |
    | attention's query, per head | (model, head, size) | `ibo` |
    | attention's output | (head, size, model) | `iio` |
    | query, key and value in one kernel | (model, 3 x model) | `i(3o)` |
    | the same, per head of 12 | (model, 3 x 12 x size) | `i(36o)` |
    | the same, 32 heads sharing 8 keys and values | (model, 48 x size) | `i(32+8+8 o)` |
    | gate and up of a gated perceptron | (model, 2 x hidden) | `i(2o)` |
    | gates of an LSTM (Equinox) | (4 x hidden, in) | `(4o)i` |

    Args:
      spec: the letters, with at least one `i` and one `o`.

    Raises:
      ValueError: a spec that is not so written.
    """

    spec: str

    def __post_init__(self):
        """Refuse a spec that is not a matrix."""
        if not isinstance(self.spec, str):
            raise ValueError(_refusal(self.spec))
        _parse(self.spec)

    @property
    def parts(self) -> tuple[Axis, ...]:
        """The axes, one by one."""
        return _parse(self.spec)

    @property
    def ndim(self) -> int:
        """How many axes the spec describes."""
        return len(_parse(self.spec))

    def misfit(self, shape: Shape) -> str | None:
        """Why an array of this shape cannot be read so; None if it can."""
        axes = _parse(self.spec)
        if len(axes) != len(shape):
            return f"the spec {self.spec!r} describes {len(axes)} axes, not {len(shape)}"
        for size, axis in zip(shape, axes, strict=True):
            if size % sum(axis.blocks):
                return f"an axis of {size} does not divide into {'+'.join(map(str, axis.blocks))} parts"
        return None

    def stacks(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes `(*batch, inputs, outputs)` of an array's stacks: one, unless blocks are unequal."""
        return tuple(self._stacked(piece) for piece in self._pieces(shape))

    def matrices(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """The array as stacks `(*batch, inputs, outputs)`."""
        pieces = [x]
        for k, axis in self._unequal():
            cuts = list(itertools.accumulate(_sizes(axis, x.shape[k])))[:-1]
            pieces = [part for piece in pieces for part in jnp.split(piece, cuts, axis=k)]
        return tuple(self._stack(piece) for piece in pieces)

    def array(self, stacks: Sequence[jax.Array], shape: Shape) -> jax.Array:
        """The array of this shape whose `matrices` are the stacks."""
        pieces = [self._unstack(*pair) for pair in zip(stacks, self._pieces(shape), strict=True)]
        for k, axis in reversed(self._unequal()):
            n = len(axis.blocks)
            pieces = [jnp.concatenate(pieces[j : j + n], axis=k) for j in range(0, len(pieces), n)]
        return pieces[0]

    def map(self, f: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        """`f` of every stack, put back where it came from."""
        return self.array([f(stack) for stack in self.matrices(x)], x.shape)

    def spread(self, f: Callable[[int, int], float], shape: Shape) -> np.ndarray:
        """f(inputs, outputs) of each element's matrix, to be broadcast against an array of this shape."""
        sizes = [
            _sizes(axis, size) if not axis.equal else [1]
            for size, axis in zip(shape, _parse(self.spec), strict=True)
        ]
        values = np.array([f(*stack[-2:]) for stack in self.stacks(shape)])
        values = values.reshape([len(each) for each in sizes])
        for k, each in enumerate(sizes):
            values = np.repeat(values, each, axis=k)
        return values

    def _unequal(self) -> list[tuple[int, Axis]]:
        return [(k, axis) for k, axis in enumerate(_parse(self.spec)) if not axis.equal]

    def _pieces(self, shape: Shape) -> list[Shape]:
        sizes = [
            [size] if axis.equal else _sizes(axis, size)
            for size, axis in zip(shape, _parse(self.spec), strict=True)
        ]
        return list(itertools.product(*sizes))

    def _stacked(self, piece: Shape) -> Shape:
        letters, sizes, _ = self._view(piece)
        side = {x: [n for n, found in zip(sizes, letters, strict=True) if found == x] for x in "bio"}
        return (*side["b"], math.prod(side["i"]), math.prod(side["o"]))

    def _stack(self, piece: jax.Array) -> jax.Array:
        _, sizes, order = self._view(piece.shape)
        return piece.reshape(sizes).transpose(order).reshape(self._stacked(piece.shape))

    def _unstack(self, stack: jax.Array, piece: Shape) -> jax.Array:
        _, sizes, order = self._view(piece)
        return stack.reshape([sizes[k] for k in order]).transpose(inverse(order)).reshape(piece)

    def _view(self, piece: Shape) -> tuple[str, Shape, list[int]]:
        """Every axis of equal blocks as two, (block, within): letters, sizes, and batch-in-out order."""
        letters, sizes = "", ()
        for size, axis in zip(piece, _parse(self.spec), strict=True):
            n = len(axis.blocks) if axis.equal else 1
            letters += axis.letter if n == 1 else "b" + axis.letter
            sizes += (size,) if n == 1 else (n, size // n)
        return letters, sizes, [k for x in "bio" for k, found in enumerate(letters) if found == x]


def inverse(order: Sequence[int]) -> list[int]:
    """The order that undoes a transposition."""
    return sorted(range(len(order)), key=order.__getitem__)


@functools.cache
def _parse(spec: str) -> tuple[Axis, ...]:
    axes, at = [], 0
    while found := _TOKEN.match(spec, at):
        letter, blocks, blocked = found.groups()
        parts = [int(n) for n in blocks.split("+")] if blocks else [1]
        if sum(parts) > _MOST_BLOCKS:
            break
        parts = [1] * parts[0] if len(parts) == 1 else parts
        axes.append(Axis(letter or blocked, tuple(n // (math.gcd(*parts) or 1) for n in parts)))
        at = found.end()
    complete = {"i", "o"} <= {axis.letter for axis in axes}
    if at < len(spec) or not complete or not all(axis.blocks and all(axis.blocks) for axis in axes):
        raise ValueError(_refusal(spec))
    return tuple(axes)


def _refusal(spec: object) -> str:
    return (
        f"{spec!r} does not describe a matrix. Type one letter per axis, i (input), o (output) or b "
        "(batch), with at least one i and one o, such as 'io', 'oi' or 'bio', and an axis of several "
        "matrices with its blocks, such as 'i(3o)' or 'i(32+8+8 o)'."
    )


def _sizes(axis: Axis, size: int) -> list[int]:
    return [size * block // sum(axis.blocks) for block in axis.blocks]
