"""Conditions on shapes, for rules that names do not decide."""

import math
from collections.abc import Callable

from optimorph._core.types import Shape


def flipped(condition: Callable[[Shape], bool]) -> Callable[[Shape], bool]:
    """A condition on (*window, in, out), as a condition on (out, in, *window)."""
    return lambda shape: condition(shape[::-1])


def is_window(sides: Shape, longest: int) -> bool:
    """Whether the sides are equal, apart from sides of 1, and short enough for a convolution."""
    return max(sides, default=1) <= longest and len({*sides} - {1}) < 2


def convolution(shape: Shape) -> bool:
    """(*window, in, out), where the name says that it is a convolution."""
    return is_window(shape[:-2], 32)


def maybe_convolution(shape: Shape) -> bool:
    """(*window, in, out), where the name does not say so; three axes may also be a stack."""
    return len(shape) != 3 and is_window(shape[:-2], 7 if 1 in shape[:-2] else 15)


def one_channel(shape: Shape) -> bool:
    """(window, 1, out), where the name does not say so; a longer axis may be a model's width."""
    return len(shape) == 3 and shape[1] == 1 and shape[0] <= 7


def even_window(shape: Shape) -> bool:
    """(in, out, *window) of an even window, such as that of a transposed convolution of stride 2."""
    longest = 8 if len(shape) > 3 else 32
    return len(shape) > 2 and is_window(shape[2:], longest) and all(side % 2 == 0 for side in shape[2:])


def of_image(shape: Shape) -> bool:
    """(height, width, channels, out) with as few inputs as an image has channels."""
    return len(shape) == 4 and shape[2] <= 4


def is_patches(shape: Shape) -> bool:
    """(height, width, channels, out) of large windows of an image."""
    return of_image(shape) and 8 <= shape[0] == shape[1] <= 64


def few_channels(shape: Shape) -> bool:
    """(*window, in, out) with as few outputs as an image has channels."""
    return len(shape) > 3 and shape[-1] <= 4 and shape[-2] >= 16 and is_window(shape[:-2], 32)


def heads(shape: Shape) -> bool:
    """(model, heads, size), not a stack, also of small matrices: heads x size is at most 4 x model."""
    model, *heads = shape
    size = math.prod(heads)
    return len(heads) < 2 or (size <= 4 * model and (heads[1] >= 8 or 16 * size > model))


def many_heads(shape: Shape) -> bool:
    """(model, heads, size), where heads x size is more than 4 x model."""
    return len(shape) == 3 and shape[1] < shape[0] and 4 * shape[0] < shape[1] * shape[2]


def heads_of_latents(shape: Shape) -> bool:
    """(rank, heads, size), where heads x size may be far larger than rank."""
    rank, heads, *size = shape
    return not size or heads < rank


def heads_first(shape: Shape) -> bool:
    """(heads, size, model), not a stack."""
    if len(shape) < 3 or shape[0] == 1:
        return True
    heads, size, model = shape
    return size <= 256 and size != model and heads * size <= 4 * model


def only_heads_first(shape: Shape) -> bool:
    """(heads, size, model), where the first axis is too short for the model."""
    return len(shape) == 3 and not heads(shape) and heads_first(shape)


def heads_last(shape: Shape) -> bool:
    """(model, heads, size) of as many numbers as the model has."""
    return len(shape) == 3 and shape[0] == shape[1] * shape[2]


def layers_second(shape: Shape) -> bool:
    """(in, layers, ...): the second axis is far shorter than the first."""
    return 2 * shape[1] <= shape[0]


def no_heads(shape: Shape) -> bool:
    """Three axes, of which neither the first nor the last counts heads or the numbers of one."""
    return len(shape) == 3 and min(shape[0], shape[2]) > 256


def maybe_not_layers_first(shape: Shape) -> bool:
    """A stack whose first axis may be too long to count layers."""
    return len(shape) > 2 and 2 * shape[0] > shape[1]


def out_not_layers_first(shape: Shape) -> bool:
    """Four axes that are not (layers, heads, size, model)."""
    return len(shape) == 4 and shape[1] * shape[2] != shape[3]


def few_outputs(shape: Shape) -> bool:
    """(in, out) or (layers, in, out), with as few outputs as a router has experts."""
    return len(shape) in (2, 3) and 16 * shape[-1] <= max(shape[:-1])


def few_outputs_first(shape: Shape) -> bool:
    """(out, in) or (layers, out, in), with as few outputs as a router has experts."""
    return len(shape) in (2, 3) and 16 * shape[-2] <= shape[-1]


def is_vocabulary(shape: Shape) -> bool:
    """(in, out), with a vocabulary of outputs."""
    return len(shape) == 2 and shape[1] >= max(1 << 14, 16 * shape[0])


def is_narrow(shape: Shape) -> bool:
    """(in, out), with at most a quarter as many outputs as inputs."""
    return len(shape) == 2 and 4 * shape[1] <= shape[0]


def is_output(shape: Shape) -> bool:
    """(in, out), with a vocabulary of outputs, or a few for many inputs."""
    return is_vocabulary(shape) or (len(shape) == 2 and shape[1] <= 10 and shape[0] >= 64)


def has_two_axes(shape: Shape) -> bool:
    """(in, out)."""
    return len(shape) == 2


def has_gates(n: int) -> Callable[[Shape], bool]:
    """(in, n x out)."""
    return lambda shape: len(shape) == 2 and shape[1] % n == 0


def fused(n: int, axis: int = -1) -> Callable[[Shape], bool]:
    """(in, n x in); with axis=-2, (n x in, in)."""
    return lambda shape: shape[axis] == n * shape[-3 - axis]


def three_of_pixels(shape: Shape) -> bool:
    """(1, 1, in, 3 x out)."""
    return len(shape) == 4 and shape[:2] == (1, 1) and shape[3] % 3 == 0


def three_before_heads(shape: Shape) -> bool:
    """(..., 3, heads, size)."""
    return shape[-3:-2] == (3,) != shape[-2:-1]
