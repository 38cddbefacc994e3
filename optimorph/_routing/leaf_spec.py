"""How one leaf reads as matrices, and the question if that is not known."""

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

from optimorph._core.types import Shape
from optimorph.linalg import Axes


@functools.cache
def axes_of(spec: str) -> Axes:
    return Axes(spec)


HEAD, INFERRED_HEAD, UNDECIDED_ROLE = "head", "head, inferred", "undecided"


class LeafSpec(NamedTuple):
    """How one leaf reads as matrices.

    Args:
      axes: the spec; None if the leaf is not a matrix.
      role: the role by the default rules, or the rule that decided.
      unresolved: why no spec was found; None if the leaf is resolved.
      answers: of an unresolved leaf what to type, the likeliest first; of an inferred head None, and its spec
        as a matrix.
      layout: of an unresolved leaf, what of `layouts` decides it.
    """

    axes: Axes | None
    role: str
    unresolved: str | None = None
    answers: tuple[str | None, ...] = ()
    layout: str = ""

    def question(self, path: str) -> str | None:
        """Why the leaf is unresolved, and rules to type, one a line; None if it is resolved."""
        if self.unresolved is None:
            return None
        lines = [f"  axes={{{path!r}: {spec!r}}}  # {_meaning(spec)}" for spec in self.answers]
        if self.layout:
            lines.append(f"  axes=optimorph.layouts.{self.layout}  # for all leaves of such a model")
        return "\n".join([f"{path!r} {self.unresolved}. Type one of", *lines])


def unresolved(
    path: str, shape: Shape, cause: str, role: str = UNDECIDED_ROLE, first: Iterable[str | None] = ()
) -> LeafSpec:
    """An unresolved leaf, with everything that it may be.

    Args:
      path: the leaf's keys.
      shape: the leaf's shape.
      cause: why it is unresolved.
      role: the role by the default rules, or the rule that decided.
      first: answers that are likelier than others.
    """
    answers = tuple(spec for spec in dict.fromkeys([*first, *likely(path, shape)]) if _fits(spec, shape))
    return LeafSpec(None, role, f"has shape {shape}, and {cause}", answers)


def likely(path: str, shape: Shape) -> list[str | None]:
    """Everything that a leaf may be by its shape, and whether its outputs come first by its name."""
    window_first = len(shape) == 4 and max(shape[:2]) <= 7 < shape[3]
    outputs_first = re.search(r"weight(_\w+|(/args)?(/\d+)+)?$", path) is not None and not window_first
    return _likely(outputs_first, shape, re.search("conv", path, re.IGNORECASE) is not None)


@functools.lru_cache(maxsize=1 << 10)
def _likely(outputs_first: bool, shape: Shape, window_named: bool) -> list[str | None]:
    meanings = _WEIGHTS if outputs_first else _KERNELS
    window = shape[2:] if outputs_first else shape[:-2]
    found = [spec for spec in meanings if _fits(spec, shape)]
    if outputs_first and len(shape) == 3 and shape[2] <= 9 < min(shape[1], 8 * shape[0]):
        found.sort(key=lambda spec: spec != "oii")
    if len(window) > 1 and (max(window) > 32 or (len({*window} - {1}) > 1 and not window_named)):
        found = sorted(found, key=lambda spec: spec.count("i") - spec.count("b") > 2)
    if not outputs_first and len(shape) > 2 and shape[0] >= 64 and shape[0] >= 8 * shape[1] < 8 * shape[2]:
        found.sort(key=lambda spec: spec[0] == "b")
    if len(shape) == 3 and shape[0] == shape[2] != shape[1]:
        found.sort(key=lambda spec: spec != "ibo")
    if not found and len(shape) > 1:
        found = ["b" * (len(shape) - 2) + "io"]
    found.sort(key=lambda spec: all(1 in stack[-2:] for stack in axes_of(spec).stacks(shape)))
    channels, last = (shape[1 if outputs_first else -2], shape[-1]) if len(shape) > 2 else (0, 0)
    depthwise = channels == 1 and min(max(window), last) < 32
    of_image, one_output = len(shape) == 4 and channels <= 4, last == 1 and not outputs_first
    few = depthwise or of_image or one_output
    return [None, *found] if few else [*found, None]


def _fits(spec: str | None, shape: Shape) -> bool:
    return spec in (None, HEAD) or axes_of(spec).misfit(shape) is None


_KERNELS = {
    "io": "inputs x outputs",
    "oi": "outputs x inputs",
    "i(3o)": "query, key and value side by side",
    "i(36o)": "query, key and value of 12 heads, each by itself",
    "i(32+8+8 o)": "32 query heads, 8 key heads and 8 value heads",
    "i(4o)": "the gates of an LSTM",
    "bio": "stacked layers or experts, inputs x outputs",
    "ibo": "stacked layers, where the second axis counts the layers",
    "ioo": "attention's query, key or value: (width, heads, size)",
    "iio": "attention's output: (heads, size, width); or a convolution over one axis",
    "iiio": "a convolution over two axes",
    "bbio": "stacked layers of experts",
    "bioo": "stacked layers of attention's query, key or value",
    "biio": "stacked layers of attention's output, or of convolutions over one axis",
    "iboo": "attention's query, key or value, where the second axis counts the layers; or all three",
    "ibio": "attention's output, where the second axis counts the layers",
    "iiiio": "a convolution over three axes",
    "biiio": "stacked convolutions over two axes",
    "biboo": "stacked layers of attention's query, key and value in one",
    "ibboo": "attention's query, key and value in one, where the third axis counts the layers",
    "biiiio": "stacked convolutions over three axes",
    "bbiiio": "stacks of stacked convolutions over two axes",
}
"""Spec → what a leaf with inputs before outputs may be. Of each number of axes, the likeliest is first."""

_WEIGHTS = {
    "oi": "outputs x inputs",
    "io": "inputs x outputs",
    "(3o)i": "query, key and value, or the gates of a GRU",
    "(36o)i": "query, key and value of 12 heads, each by itself",
    "(4o)i": "the gates of an LSTM",
    "boi": "stacked layers or experts, outputs x inputs",
    "oii": "a convolution over one axis; or attention's output: (width, heads, size)",
    "ooi": "attention's query, key or value: (heads, size, width)",
    "oiii": "a convolution over two axes",
    "bboi": "stacked layers of experts",
    "booi": "stacked layers of attention's query, key or value; or one layer with all three",
    "boii": "stacked layers of attention's output, or of convolutions over one axis",
    "oiiii": "a convolution over three axes",
    "boiii": "stacked convolutions over two axes",
    "bbooi": "stacked layers of attention's query, key and value in one",
    "boooi": "stacked layers of attention's query: (groups, heads, size, width)",
    "boiiii": "stacked convolutions over three axes",
    "bboiii": "stacks of stacked convolutions over two axes",
}
"""The same for a leaf with outputs before inputs."""


def _meaning(spec: str | None) -> str:
    if spec is None:
        return "not a matrix"
    if spec == HEAD:
        return "the output layer"
    text = _KERNELS.get(spec) or _WEIGHTS.get(spec)
    if text is None and "b" in spec:
        return "stacks: " + _meaning(spec.replace("b", "", 1))
    return text or ", ".join(
        f"{_SIDES[axis.letter]}{' of several matrices' * (not axis.whole)}" for axis in axes_of(spec).parts
    )


_SIDES = {"i": "inputs", "o": "outputs", "b": "batch"}
