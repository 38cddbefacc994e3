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

from optimorph._core.shown import shown
from optimorph._core.types import Shape

_BLOCKS = r"[0-9]+(?:\s*\+\s*[0-9]+)*"
_REPEATED = rf"([0-9]*)\s*([*~])\s*(?:([0-9]+)|\(\s*({_BLOCKS})\s*\))"
_TOKEN = re.compile(rf"\s*(?:([iob])|\(\s*(?:{_REPEATED}|({_BLOCKS}))\s*([io])\s*\))\s*")

_MOST_BLOCKS = 1 << 16


class Axis(NamedTuple):
    """One axis of a spec.

    Args:
      letter: "i", "o" or "b".
      blocks: the relative sizes of its blocks, (1,) for no blocks.
      times: how often the blocks are repeated; 0 for as often as they fit, with sizes that are exact.
      interleaved: whether a block of all repetitions is one matrix.
      unit: what the sizes were divided by, where blocks are not repeated: of 32+8+8 it is 8.
    """

    letter: str
    blocks: tuple[int, ...]
    times: int = 1
    interleaved: bool = False
    unit: int = 1

    @property
    def whole(self) -> bool:
        return len(self.blocks) == 1 and self.times == 1

    @property
    def equal(self) -> bool:
        """Whether all blocks have the same size, and follow each other."""
        return len(set(self.blocks)) == 1 and self.times == 1

    @property
    def written(self) -> list[int]:
        """The sizes of its blocks as they were written, if these are not repeated."""
        return [n * self.unit for n in self.blocks]

    def repetitions(self, size: int) -> int:
        """How often the blocks are repeated in an axis of this size."""
        return self.times or size // sum(self.blocks)

    def __str__(self) -> str:
        if self.whole:
            return self.letter
        sizes = str(len(self.blocks)) if {*self.written} == {1} else "+".join(map(str, self.written))
        if self.times == 1:
            return f"({sizes}{' ' * ('+' in sizes)}{self.letter})"
        repeated = f"{self.times or ''}{'~' if self.interleaved else '*'}"
        return (
            f"({repeated}({sizes}) {self.letter})" if "+" in sizes else f"({repeated}{sizes} {self.letter})"
        )


@dataclasses.dataclass(frozen=True)
class Axes:
    """One letter per axis: `i` input (summed over), `o` output, `b` batch (each slice its own matrix).

    All `i` axes together are the inputs of the matrix, and all `o` axes its outputs. If an axis holds several
    matrices side by side, its blocks are written in parentheses. `(3o)` means three equal blocks. `(32+8+8
    o)` means three blocks whose sizes have the ratio 32 : 8 : 8; the numbers may count heads or elements.
    Each block is a matrix of its own. Blocks may be repeated: `(128*(192+64) o)` means a block of 192 and a
    block of 64, 128 times, each its own matrix. With `~` they are interleaved: `(8~(4+1+1) o)` means three
    blocks, 8 times, but the 8 first blocks together are one matrix, as are the 8 second blocks and the 8
    third blocks. In `(~2 o)` the elements of two matrices alternate.

    | leaf | shape | spec |
    |---|---|---|
    | dense kernel (Flax, Haiku) | (in, out) | `io` |
    | dense weight (Equinox, PyTorch) | (out, in) | `oi` |
    | convolution kernel (Flax, Haiku) | (height, width, in, out) | `iiio` |
    | convolution weight (Equinox) | (out, in, height, width) | `oiii` |
    | layers stacked by a scan | (layer, in, out) | `bio` |
    | experts of stacked layers | (layer, expert, in, out) | `bbio` |
    | attention's query, as one matrix | (model, head, size) | `ioo` |
    | attention's query, each head a matrix | (model, head, size) | `ibo` |
    | attention's output | (head, size, model) | `iio` |
    | query, key and value in one kernel | (model, 3 x model) | `i(3o)` |
    | the same, each of 12 heads a matrix | (model, 3 x 12 x size) | `i(36o)` |
    | the same, 32 query heads that share 8 keys and values | (model, 48 x size) | `i(32+8+8 o)` |
    | gate and up projection of a gated MLP | (model, 2 x hidden) | `i(2o)` |
    | gate and up projection, alternating columns | (model, 2 x hidden) | `i(~2 o)` |
    | 8 groups of 4 queries, a key and a value | (model, 48 x size) | `i(8~(4+1+1) o)` |
    | keys and values of 128 latent heads, each a matrix | (rank, 128 x (192 + 64)) | `i(128*(192+64) o)` |
    | gates of an LSTM (Equinox) | (4 x hidden, in) | `(4o)i` |

    Args:
      spec: the letters, with at least one `i` and one `o`.

    Raises:
      ValueError: a spec that cannot be parsed.
    """

    spec: str

    def __post_init__(self):
        if not isinstance(self.spec, str):
            raise ValueError(_refusal(self.spec))
        _parse(self.spec)

    @property
    def parts(self) -> tuple[Axis, ...]:
        """The axes in order."""
        return _parse(self.spec)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(_parse(self.spec))

    def misfit(self, shape: Shape) -> str | None:
        """Why an array of this shape does not fit the spec; None if it fits."""
        axes = _parse(self.spec)
        if len(axes) != len(shape):
            return f"the spec {self.spec!r} describes {len(axes)} axes, not {len(shape)}"
        for size, axis in zip(shape, axes, strict=True):
            times = axis.times or 1
            if size % (times * sum(axis.blocks)):
                parts = "+".join(map(str, axis.blocks)) + (f" parts {times} times" if times > 1 else " parts")
                return f"an axis of {size} does not divide into {parts}"
        return None

    def _check(self, shape: Shape) -> None:
        if (cause := self.misfit(shape)) is not None:
            raise ValueError(f"Axes: {cause}.")

    def laid_out(self, shape: Shape) -> tuple[tuple[Axis, ...], Shape]:
        """The axes and the shape after each axis of repeated blocks is split into repetitions and blocks."""
        return _laid_out(self.spec, shape)

    def stacks(self, shape: Shape) -> tuple[Shape, ...]:
        """The shapes `(*batch, inputs, outputs)` of the stacks in an array; one unless blocks differ."""
        self._check(shape)
        axes, longer = _laid_out(self.spec, shape)
        return tuple(_view(axes, piece).stack for piece in _pieces(axes, longer))

    def matrices(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """The array as stacks `(*batch, inputs, outputs)`."""
        self._check(x.shape)
        axes, longer = _laid_out(self.spec, x.shape)
        pieces = [x.reshape(longer)]
        for k, axis in _unequal(axes):
            ends = list(itertools.accumulate(_sizes(axis, longer[k])))[:-1]
            pieces = [part for piece in pieces for part in jnp.split(piece, ends, axis=k)]
        return tuple(_stack(axes, piece) for piece in pieces)

    def array(self, stacks: Sequence[jax.Array], shape: Shape) -> jax.Array:
        """The inverse of `matrices`: the array of this shape from its stacks."""
        axes, longer = _laid_out(self.spec, shape)
        pieces = [_unstack(axes, *pair) for pair in zip(stacks, _pieces(axes, longer), strict=True)]
        for k, axis in reversed(_unequal(axes)):
            n = len(axis.blocks)
            pieces = [jnp.concatenate(pieces[j : j + n], axis=k) for j in range(0, len(pieces), n)]
        return pieces[0].reshape(shape)

    def in_blocks(self, shape: Shape, size: int) -> "Axes":
        """The spec in which sides longer than `size` are divided into nearly equal blocks of at most `size`.

        The first axis of a side is divided. An axis that already has blocks does not change.
        """
        axes = list(_parse(self.spec))
        for letter in "io":
            side = [k for k, axis in enumerate(axes) if axis.letter == letter]
            longest = math.prod(shape[k] // (len(axes[k].blocks) if axes[k].equal else 1) for k in side)
            count = -(-longest // size)
            k = side[0]
            if count > 1 and len(axes[k].blocks) == 1:
                count = min(count, shape[k])
                part = -(-shape[k] // count)
                whole, rest = divmod(shape[k], part)
                axes[k] = Axis(letter, (1,) * whole if rest == 0 else (part,) * whole + (rest,))
        return Axes("".join(map(str, axes)))

    def spread(self, f: Callable[[int, int], float], shape: Shape) -> np.ndarray:
        """f(inputs, outputs) of each element's matrix, in a shape that broadcasts against the array."""
        axes, longer = _laid_out(self.spec, shape)
        sizes = [[1] if axis.equal else _sizes(axis, size) for size, axis in zip(longer, axes, strict=True)]
        values = np.array([f(*stack[-2:]) for stack in self.stacks(shape)])
        values = values.reshape([len(blocks) for blocks in sizes])
        for k, blocks in enumerate(sizes):
            values = np.repeat(values, blocks, axis=k)
        one = longer == shape or values.size == 1
        return values if one else np.broadcast_to(values, longer).reshape(shape)

    def reduce(self, f: Callable[..., jax.Array], x: jax.Array, letters: str = "io") -> jax.Array:
        """Reduce some sides of every matrix. A reduced axis keeps one number for each of its blocks.

        An axis of repeated blocks becomes two axes, repetitions and blocks.

        Args:
          f: a reduction such as `jnp.sum`, with arguments `axis`, `keepdims` and `initial`.
          x: the array.
          letters: the sides: "i", "o" or "io".
        """
        axes, longer = _laid_out(self.spec, x.shape)
        sides = [(k, axis.blocks) for k, axis in enumerate(axes) if axis.letter in letters]
        whole = tuple(k for k, blocks in sides if len(blocks) == 1)
        x = f(x.reshape(longer), axis=whole, keepdims=True, initial=0)
        for k, blocks in [side for side in sides if len(side[1]) > 1]:
            n = len(blocks)
            if letters != "io" and axes[k].equal:  # of a large array a view, in parts for 8 devices
                parts = n * math.gcd(x.shape[k] // n, 8) if n <= 8 else n
                x = f(x.reshape(*x.shape[:k], parts, -1, *x.shape[k + 1 :]), axis=k + 1, initial=0)
            if x.shape[k] != n:  # masks: slices of a divided axis would be sent
                within = np.repeat(np.arange(n), _sizes(axes[k], x.shape[k]))
                within = within.reshape(-1, *[1] * (x.ndim - 1 - k))
                each = [jnp.where(within == j, x, 0) for j in range(n)]
                x = jnp.concatenate([f(part, axis=k, keepdims=True, initial=0) for part in each], axis=k)
        return x

    def repeat(self, y: jax.Array, shape: Shape) -> jax.Array:
        """The output of `reduce`, reshaped so that it broadcasts against an array of this shape."""
        axes, longer = _laid_out(self.spec, shape)
        for k, (axis, size) in enumerate(zip(axes, longer, strict=True)):
            if 1 < len(axis.blocks) == y.shape[k] < size:
                y = jnp.take(y, np.repeat(np.arange(y.shape[k]), _sizes(axis, size)), axis=k)
        return y if longer == shape else jnp.broadcast_to(y, longer).reshape(shape)

    def counts(self, shape: Shape, letters: str = "io") -> np.ndarray:
        """How many elements of an array of this shape each number in the output of `reduce` comes from."""
        axes, longer = _laid_out(self.spec, shape)
        counts = np.ones([1] * len(longer))
        for k, (axis, size) in enumerate(zip(axes, longer, strict=True)):
            if axis.letter in letters:
                counts = counts * np.reshape(_sizes(axis, size), (-1, *[1] * (len(longer) - 1 - k)))
        return counts


def inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _stack(axes: tuple[Axis, ...], piece: jax.Array) -> jax.Array:
    view = _view(axes, piece.shape)
    return piece.reshape(view.sizes).transpose(view.order).reshape(view.stack)


def _unstack(axes: tuple[Axis, ...], stack: jax.Array, piece: Shape) -> jax.Array:
    view = _view(axes, piece)
    return stack.reshape([view.sizes[k] for k in view.order]).transpose(inverse(view.order)).reshape(piece)


class _View(NamedTuple):
    """A piece as a stack: reshape to `sizes`, transpose by `order`, reshape to `stack`."""

    sizes: Shape
    order: tuple[int, ...]
    stack: Shape


@functools.lru_cache(maxsize=1 << 12)
def _view(axes: tuple[Axis, ...], piece: Shape) -> _View:
    """Every axis of equal blocks becomes two, (block, within); the order is batch, inputs, outputs."""
    letters, sizes = "", ()
    for size, axis in zip(piece, axes, strict=True):
        n = len(axis.blocks) if axis.equal else 1
        letters += axis.letter if n == 1 else "b" + axis.letter
        sizes += (size,) if n == 1 else (n, size // n)
    batch, inputs, outputs = ([k for k, x in enumerate(letters) if x == letter] for letter in "bio")
    n, m = (math.prod(sizes[k] for k in side) for side in (inputs, outputs))
    return _View(sizes, (*batch, *inputs, *outputs), (*(sizes[k] for k in batch), n, m))


@functools.lru_cache(maxsize=1 << 12)
def _laid_out(spec: str, shape: Shape) -> tuple[tuple[Axis, ...], Shape]:
    """The axes and sizes, with an axis of repetitions and one of blocks in the place of both in one."""
    axes, sizes = [], []
    for size, axis in zip(shape, _parse(spec), strict=True):
        times = axis.repetitions(size)
        if axis.times == 1:
            axes, sizes = [*axes, axis], [*sizes, size]
        else:
            axes += [Axis(axis.letter if axis.interleaved else "b", (1,)), Axis(axis.letter, axis.blocks)]
            sizes += [times, size // times if times else 0]
    return (*axes,), (*sizes,)


@functools.lru_cache(maxsize=1 << 12)
def _pieces(axes: tuple[Axis, ...], shape: Shape) -> tuple[Shape, ...]:
    """The shapes of the parts of an array that unequal blocks make: one, unless blocks are unequal."""
    sizes = [[size] if axis.equal else _sizes(axis, size) for size, axis in zip(shape, axes, strict=True)]
    return tuple(itertools.product(*sizes))


@functools.cache
def _unequal(axes: tuple[Axis, ...]) -> tuple[tuple[int, Axis], ...]:
    return tuple((k, axis) for k, axis in enumerate(axes) if not axis.equal)


@functools.cache
def _parse(spec: str) -> tuple[Axis, ...]:
    axes, position = [], 0
    while token := _TOKEN.match(spec, position):
        letter, times, kind, count, inner, blocks, blocked = token.groups()
        parts = [int(n) for n in (count or inner or blocks or "1").split("+")]
        number = int(times or 0) if kind else 1
        if sum(parts) > _MOST_BLOCKS or number > _MOST_BLOCKS or (kind == "*" and number == 0):
            break
        parts = [1] * parts[0] if len(parts) == 1 else parts
        unit = math.gcd(*parts) or 1
        if number:  # exact sizes count only where they say how often they fit
            parts = [n // unit for n in parts]
        if kind == "*" and len({*parts}) == 1:
            number, parts = 1, parts * number
        interleaved, unit = kind == "~" and number != 1, 1 if kind else unit
        axes.append(Axis(letter or blocked, (*parts,), number, interleaved, unit))
        position = token.end()
    complete = {"i", "o"} <= {axis.letter for axis in axes}
    if position < len(spec) or not complete or not all(axis.blocks and all(axis.blocks) for axis in axes):
        raise ValueError(_refusal(spec))
    return tuple(axes)


def _refusal(spec: object) -> str:
    return (
        f"{shown(spec)} does not describe a matrix. Type one letter per axis, i (input), o (output) or b "
        "(batch), with at least one i and one o, such as 'io', 'oi' or 'bio', and an axis of several "
        "matrices with its blocks, such as 'i(3o)', 'i(32+8+8 o)' or 'i(8*(4+1+1) o)'."
    )


def _sizes(axis: Axis, size: int) -> list[int]:
    return [size * block // sum(axis.blocks) for block in axis.blocks]
