"""The output layer of a model whose names do not tell it, from the widths of its layers."""

import re
from collections.abc import Sequence

from optimorph._core.types import Shape
from optimorph._routing.leaf_spec import LeafSpec

_ANY_LAYER = re.compile(r"(^|/)(dense|linear|lin|fc|layers?)[_/]?\d*/(kernel|weight|w)$", re.IGNORECASE)
"""A name that does not say what a layer is for."""

_IN_BLOCK = re.compile(r"(block|layer|stage|expert|(^|/)h)s?[_/]?\d+/.+/|attn|attention", re.IGNORECASE)


def output_layer(paths: Sequence[str], shapes: Sequence[Shape], specs: Sequence[LeafSpec]) -> int | None:
    """The index of the only layer without a telling name whose outputs no other leaf takes in.

    Its inputs must be the outputs of another layer. Where a leaf is called a head, or where several layers
    may be the output, or none, as in an autoencoder, the answer is None.

    Args:
      paths: of all leaves.
      shapes: of all leaves.
      specs: how the default rules and the user's read them.
    """
    if any(spec.role == "head" for spec in specs):
        return None
    leaves = [
        (path.rpartition("/")[0], *_sides(shape, spec))
        for path, shape, spec in zip(paths, shapes, specs, strict=True)
    ]
    unnamed = [
        k
        for k, (path, spec) in enumerate(zip(paths, specs, strict=True))
        if spec.role == "dense"
        and spec.axes is not None
        and len(shapes[k]) == 2
        and _ANY_LAYER.search(path)
        and not _IN_BLOCK.search(path)
    ]

    def taken(k: int) -> bool:
        module, _, outputs = leaves[k]
        return any(other != module and outputs <= inputs for other, inputs, _ in leaves)

    sinks = [k for k in unnamed if not taken(k)]
    if len(sinks) != 1:
        return None
    module, inputs, _ = leaves[sinks[0]]
    return sinks[0] if any(m != module and inputs <= outputs for m, _, outputs in leaves) else None


def _sides(shape: Shape, spec: LeafSpec) -> tuple[set[int], set[int]]:
    """The widths that a leaf takes in, and those that it puts out; all of them if it is no matrix."""
    if spec.axes is None:
        return {*shape}, ({*shape} if len(shape) > 1 else set())
    stacks = spec.axes.stacks(shape)
    return {stack[-2] for stack in stacks}, {stack[-1] for stack in stacks}
