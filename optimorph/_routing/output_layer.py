"""The output layer of a model whose layers have no telling names, by widths."""

import re
from collections.abc import Iterator, Sequence
from itertools import islice

from optimorph._core.types import Shape
from optimorph._routing.leaf_spec import HEAD, INFERRED_HEAD, LeafSpec, unresolved
from optimorph.linalg import Axes

_ANY_LAYER = re.compile(
    r"(^|/)(dense|linear|lin|fc|layers?|hidden)[_/]?\d*/(kernel|weight|w)$", re.IGNORECASE
)
"""A name that does not say what a layer is for."""

_IN_BLOCK = re.compile(r"(block|layer|stage|expert|(^|/)h)s?[_/]?\d+/.+/|attn|attention", re.IGNORECASE)

_IN_PERCEPTRON = re.compile(r"mlp|(^|[/_])ffn?([/_]|$)|feed_?forward", re.IGNORECASE)


INPUTS, OUTPUTS = 0, 1


def has_no_name(path: str) -> bool:
    """Whether a leaf belongs to a layer whose name does not say what it is for."""
    return _ANY_LAYER.search(path) is not None and not _IN_BLOCK.search(path)


def with_output_layer(
    paths: Sequence[str], shapes: Sequence[Shape], specs: Sequence[LeafSpec]
) -> list[LeafSpec]:
    """The specs with the output layer inferred, or asked for if several layers without names may be it.

    The output layer is a layer without a telling name whose inputs are the outputs of another layer, and
    whose outputs no other leaf takes in. If there is only one and no such layer of its module has a higher
    number, it is inferred. If there are several, or if outputs are taken in by no later layer, as in an
    autoencoder, it is asked for. Where a leaf is called a head, nothing changes.

    Args:
      paths: of all leaves.
      shapes: of all leaves.
      specs: how the default rules and the user's read them.
    """
    specs = list(specs)
    unnamed = [
        k
        for k, (path, spec) in enumerate(zip(paths, specs, strict=True))
        if spec.role == "dense" and spec.axes is not None and _is_one(spec.axes) and has_no_name(path)
    ]
    if not unnamed or any(spec.role == HEAD for spec in specs):
        return specs
    sides = [_sides(shape, spec) for shape, spec in zip(shapes, specs, strict=True)]
    modules = [path.rpartition("/")[0] for path in paths]
    by_width: tuple[dict[int, list[int]], ...] = ({}, {})
    for k, pair in enumerate(sides):
        for side, widths in enumerate(pair):
            for width in widths:
                by_width[side].setdefault(width, []).append(k)

    def others(k: int, own: int, side: int) -> Iterator[int]:
        """The leaves of other modules on whose side `side` all widths of side `own` of leaf `k` are."""
        widths = sides[k][own]
        for j in by_width[side].get(min(widths), ()):
            if modules[j] != modules[k] and widths <= sides[j][side]:
                yield j

    def takers(k: int) -> Iterator[int]:
        return others(k, OUTPUTS, INPUTS)

    def givers(k: int) -> Iterator[int]:
        return others(k, INPUTS, OUTPUTS)

    def takes_its_own_end(k: int) -> bool:
        """Whether only layers before it take in its outputs, and these have no other inputs."""
        return sides[k][INPUTS] != sides[k][OUTPUTS] and all(
            specs[j].axes is not None and _before(paths[j], paths[k]) and [*islice(givers(j), 2)] == [k]
            for j in takers(k)
        )

    convolutions = any(spec.role == "convolution" for spec in specs)

    def is_fed(k: int) -> bool:
        """Whether a layer takes in the outputs of another, or features of convolutions."""
        narrower = convolutions and min(sides[k][INPUTS]) > max(sides[k][OUTPUTS])
        return narrower or next(givers(k), None) is not None

    fed = [k for k in unnamed if is_fed(k)]
    sinks = [k for k in fed if next(takers(k), None) is None]
    last: dict[str, int] = {}
    for k in unnamed:
        module = _parent(paths[k])
        last[module] = max(last.get(module, 0), _number(paths[k]))
    ends = sinks or [k for k in fed if takes_its_own_end(k)]
    for k in ends:
        form = specs[k].axes
        answers = (None, None if form is None else form.spec)
        if len(ends) == 1 and (sinks or len(unnamed) == 1):
            if _number(paths[k]) == last[_parent(paths[k])]:
                specs[k] = LeafSpec(None, INFERRED_HEAD, answers=answers)
        elif sinks or not _IN_PERCEPTRON.search(paths[k]):
            cause = "may be the output layer, by its width"
            specs[k] = unresolved(paths[k], shapes[k], cause, first=answers)
    return specs


def _is_one(axes: Axes) -> bool:
    """Whether a leaf is one matrix, or one for each index of other axes."""
    sides = [axis for axis in axes.parts if axis.letter != "b"]
    return len(sides) == 2 and all(axis.whole for axis in sides)


def _before(path: str, other: str) -> bool:
    """Whether a layer comes before another: by their numbers in one module, or in another module."""
    same = _parent(path) == _parent(other)
    return not same or _number(path) < _number(other)


def _parent(path: str) -> str:
    """The module that has the layer of a leaf."""
    return path.rpartition("/")[0].rpartition("/")[0]


def _number(path: str) -> int:
    """The number of a layer; 0 for one without."""
    numbers = re.findall(r"\d+", path)
    return int(numbers[-1]) if numbers else 0


def _sides(shape: Shape, spec: LeafSpec) -> tuple[set[int], set[int]]:
    """The widths that a leaf takes in, and those that it puts out; all of them if it is no matrix.

    Of an embedding these are the features: the output layer of a language model has as many outputs as the
    embedding has rows, and the embedding does not take them in.
    """
    if spec.axes is None and spec.role == "embedding" and len(shape) > 1:
        return {shape[-1]}, {shape[-1]}
    if spec.axes is None:
        return {*shape}, ({*shape} if len(shape) > 1 else set())
    stacks = spec.axes.stacks(shape)
    return {stack[-2] for stack in stacks}, {stack[-1] for stack in stacks}
