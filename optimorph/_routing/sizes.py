"""What the sizes of a leaf say, where its name is not enough."""

import math

from optimorph._core.types import Shape


def few_axes(shape: Shape) -> bool:
    """A vector or a scalar."""
    return len(shape) < 2


def one_input(shape: Shape) -> bool:
    """A convolution's kernel with one input channel."""
    return len(shape) > 2 and shape[-2] == 1


def one_input_second(shape: Shape) -> bool:
    """A convolution's weight with one input channel."""
    return len(shape) > 2 and shape[1] == 1


def convolves(shape: Shape) -> bool:
    """(*window, in, out), with sides such as a convolution's windows have."""
    return _is_window(shape[:-2], 32)


def convolves_last(shape: Shape) -> bool:
    """(out, in, *window)."""
    return _is_window(shape[2:], 32)


def maybe_convolves(shape: Shape) -> bool:
    """As `convolves`, where the name does not say so: over two axes or more, and stacks have more layers."""
    return len(shape) != 3 and _is_window(shape[:-2], 7 if 1 in shape[:-2] else 15)


def maybe_convolves_last(shape: Shape) -> bool:
    """As `convolves_last`, where the name does not say so."""
    return len(shape) != 3 and _is_window(shape[2:], 7 if 1 in shape[2:] else 15)


def _is_window(sides: Shape, most: int) -> bool:
    """Equal sides, or some of 1: one of 12 x 5 is rather twelve layers, whose name does not say so."""
    return max(sides, default=1) <= most and len({*sides} - {1}) < 2


def has_heads(shape: Shape) -> bool:
    """(model, heads, size) rather than a stack: what heads hold is not many times what they are made of."""
    model, *heads = shape
    return len(heads) < 2 or math.prod(heads) <= 4 * model


def has_heads_of_latents(shape: Shape) -> bool:
    """(rank, heads, size), whose heads may hold more than the latents that they are made of."""
    rank, heads, *size = shape
    return not size or heads < rank


def has_heads_first(shape: Shape) -> bool:
    """(heads, size, model) rather than a stack."""
    if len(shape) < 3 or shape[0] == 1:
        return True
    heads, size, model = shape
    return size <= 256 and size != model and heads * size <= 4 * model


def layers_second(shape: Shape) -> bool:
    """The second axis counts layers: it is far smaller than the first."""
    return 2 * shape[1] <= shape[0]


def not_layers_first(shape: Shape) -> bool:
    """A stack of which the first axis may not be what counts the layers."""
    return len(shape) > 2 and 2 * shape[0] > shape[1]


def out_layers_second(shape: Shape) -> bool:
    """(heads, layers, size, width), where heads hold as much as the width."""
    return shape[0] * shape[2] == shape[3]


def out_not_layers_first(shape: Shape) -> bool:
    """Of four axes, and not (layers, heads, size, width) either."""
    return len(shape) == 4 and shape[1] * shape[2] != shape[3]


def few_outputs(shape: Shape) -> bool:
    """(in, out), or layers of it, with so few outputs that they are a choice."""
    return _is_dense(shape) and 16 * shape[-1] <= max(shape[:-1])


def few_outputs_first(shape: Shape) -> bool:
    """(out, in), or layers of it, with so few outputs that they are a choice."""
    return _is_dense(shape) and 16 * shape[-2] <= shape[-1]


def _is_dense(shape: Shape) -> bool:
    return len(shape) in (2, 3)


def times(n: int, shape: Shape) -> bool:
    """The last axis is n times the one before."""
    return shape[-1] == n * shape[-2]


def times_first(n: int, shape: Shape) -> bool:
    """The last axis but one is n times the last."""
    return shape[-2] == n * shape[-1]


def three_before_heads(shape: Shape) -> bool:
    """(model, 3, heads, size), or (3, heads, size, model) of which the last is left out."""
    return shape[-3:-2] == (3,) != shape[-2:-1]


def three_after_heads(shape: Shape) -> bool:
    """(model, heads, 3, size)."""
    return shape[-2:-1] == (3,) != shape[-3:-2]
