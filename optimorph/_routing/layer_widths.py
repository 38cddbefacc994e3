"""What a layer takes in and puts out, and what its name says of it."""

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from optimorph._core.types import Shape
from optimorph._routing.grouping import group_by, numbers_in, without_numbers
from optimorph._routing.leaf_spec import HEAD, INFERRED_HEAD, LeafSpec, axes_of
from optimorph._routing.name_patterns import BLOCK, WEIGHT
from optimorph._routing.names import sides
from optimorph.linalg import Axes

_ANY_LAYER = re.compile(
    r"(^|/)_?(((dense|linear|lin|fc|layers?|l)[_/]?\d*|conv(_?[123]_?d)?(_?transpose)?(_?\d+)?|hidden_?\d+|\d+)/"
    rf"{WEIGHT}|w_?\d+|\d+)$",
    re.IGNORECASE,
)
"""A name that does not say what a layer is for."""

_IN_BLOCK = re.compile(
    r"layer_stack|(block|layer|stage|expert|(^|/)h)s?(_[a-z]+)?[_/]?\d+/|attn|attention|time(step)?s?_?emb\w*/\w*\d",
    re.IGNORECASE,
)

_INSIDE = re.compile(BLOCK.replace("|conv", "|feed_?forward|pool|adapt|bottleneck"))
"""Parts of names of layers and modules that are no output layers, whatever their widths."""

DISTRIBUTION = "distribution"

_OF_LAYER = re.compile(rf"/{WEIGHT}$|(?<=\d)/\d+$", re.IGNORECASE)


def has_no_name(path: str) -> bool:
    """Whether a leaf belongs to a layer whose name does not say what it is for."""
    path = path.replace(".", "/")
    return _ANY_LAYER.search(path) is not None and not _IN_BLOCK.search(layer_name(path))


def is_inside(path: str) -> bool:
    """Whether a name says that a layer is a part of a block."""
    return _INSIDE.search(layer_name(path).lower()) is not None


def layer_name(path: str) -> str:
    """The path of a layer, of that of its matrix."""
    return _OF_LAYER.sub("", path)


def number_of(name: str) -> int:
    """The number of a layer; 0 for one without."""
    numbers = re.findall(r"\d+", name.rpartition("/")[2])
    return int(numbers[-1]) if numbers else 0


def sides_of(path: str, shape: Shape, spec: LeafSpec) -> tuple[set[int], set[int]]:
    """The widths that a leaf takes in, and those that it puts out; all of them if it is no matrix.

    Of an embedding these are the features: the output layer of a language model has as many outputs as the
    embedding has rows, and the embedding does not take them in. A bias, or a vector without a name, is a part
    of a layer. Of a convolution of one channel the window is no width.
    """
    if spec.role == INFERRED_HEAD and (as_matrix := spec.answers[1]) is not None:
        spec = LeafSpec(axes_of(as_matrix), "dense")
    if spec.axes is None and spec.role == "embedding" and len(shape) > 1:
        return {shape[-1]}, {shape[-1]}
    if spec.axes is None and len(shape) == 2 and (spec.role in (DISTRIBUTION, HEAD) or has_no_name(path)):
        inputs, outputs = sides(path, shape)
        return {inputs}, {outputs}
    if spec.role == "one channel":
        both_sides = {*sides(path, shape)}
        return both_sides, both_sides
    if spec.axes is None and len(shape) > 1 and spec.role != "bias" and (spec.role != "vector" or 1 in shape):
        return {*shape}, {*shape}
    if spec.axes is None:
        return ({*shape} if spec.role == "norm" else set()), set()
    if spec.role != "attention" and (both := channels(spec.axes)):
        return {shape[both[0]]}, {shape[both[1]]}
    stacks = spec.axes.stacks(shape)
    return {stack[-2] for stack in stacks}, {stack[-1] for stack in stacks}


def channels(axes: Axes | None) -> tuple[int, int] | None:
    """The axes of a convolution's input and output channels; None for other leaves."""
    letters = "".join(axis.letter for axis in axes.parts) if axes is not None else ""
    if letters.count("o") != 1 or letters.count("i") < 2:
        return None
    o = letters.index("o")
    first_in = o == len(letters) - 1 or (o == 1 and len(letters) > 3)  # or PyTorch transposes it
    return (o - 1 if first_in else o + 1), o


def ends_of_stacks(
    layers: Sequence[int], paths: Sequence[str], shapes: Sequence[Shape], specs: Sequence[LeafSpec]
) -> Iterator[int]:
    """The last of layers in modules that differ only in numbers, if no other has a side like its outputs."""

    def kind(k: int) -> tuple[Any, str]:
        module, _, name = layer_name(paths[k]).rpartition("/")
        return without_numbers(module), name

    for group in group_by(layers, kind):
        *others, last = sorted(group, key=lambda k: numbers_in(paths[k]))
        out = max(sides_of(paths[last], shapes[last], specs[last])[1])
        if others and all(out not in shapes[k] for k in others):
            yield last


def heads_that_feed(
    paths: Sequence[str], shapes: Sequence[Shape], heads: Collection[int]
) -> Iterator[tuple[int, bool]]:
    """The heads without a telling name that are followed by other layers, as in an autoencoder.

    These take in as many numbers, more than one, and the first layer with the same name does not: it may take
    in observations that are as many as the actions. The bool is whether the layer with the next number does.
    """

    def of(k: int) -> tuple[int, int]:
        return sides(paths[k], shapes[k])

    layers = [k for k, path in enumerate(paths) if len(shapes[k]) == 2 and has_no_name(path)]
    for chain in group_by(layers, lambda k: without_numbers(paths[k])):
        chain.sort(key=lambda k: numbers_in(paths[k]))
        for k, after in zip(chain, [*chain[1:], None], strict=True):
            width = of(k)[1]
            if k in heads and width > 1 and of(chain[0])[0] != width:
                if after is not None and of(after)[0] == width:
                    yield k, True
                elif any(of(j)[0] == width for j in layers if j not in chain):
                    yield k, False


def heads_of_vocabularies(
    paths: Sequence[str], shapes: Sequence[Shape], specs: Sequence[LeafSpec]
) -> Iterator[int]:
    """The layers with as many inputs as an embedding has features, and as many outputs as it has rows.

    These are more than eight times as many, so no inner layer of a perceptron is meant.
    """
    rows = {shape for shape, spec in zip(shapes, specs, strict=True) if spec.role == "embedding"}
    for k, spec in enumerate(specs):
        if spec.role == "dense" and spec.axes is not None and len(shapes[k]) == 2:
            inputs, outputs = sides_of(paths[k], shapes[k], spec)
            if any((n, m) in rows for n in outputs for m in inputs if n > 8 * m):
                yield k
