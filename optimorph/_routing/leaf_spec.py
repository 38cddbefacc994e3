"""How leaves read as matrices: by the user's rules first, then by the default rules, then by their widths."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from optimorph._core.checks import LeafError
from optimorph._core.numbers import is_absent
from optimorph._core.rule import Leaf, Leaves, handed
from optimorph._core.types import AxesRules, Rules, Shape
from optimorph._distributed.shardings import by_whole_shape
from optimorph._routing.name_rules import UNDECIDED
from optimorph._routing.names import by_name
from optimorph._routing.rules import NO_MATCH, labels, lookup, lookup_if_given, matching_pattern
from optimorph.linalg import Axes

_axes = functools.cache(Axes)

_ANY_LAYER = re.compile(r"(^|/)(dense|linear|lin|fc|layers?)[_/]?\d*/(kernel|weight|w)$", re.IGNORECASE)
"""A name that does not say what a layer is for."""

_IN_BLOCK = re.compile(r"(block|layer|stage|expert|(^|/)h)s?[_/]?\d+/.+/|attn|attention", re.IGNORECASE)


class LeafSpec(NamedTuple):
    """How one leaf reads as matrices.

    Args:
      axes: the spec; None if the leaf is not a matrix.
      role: the role by the default rules, or the rule that decided.
      unresolved: why no spec was found, and what to type; None if the leaf is resolved.
    """

    axes: Axes | None
    role: str
    unresolved: str | None = None

    def resolved_axes(self, who: str) -> Axes | None:
        """The spec.

        Raises:
          LeafError: naming `who`, if the leaf is unresolved.
        """
        if self.unresolved is not None:
            raise LeafError(f"{who}: {self.unresolved}")
        return self.axes


def resolve_axes(who: str, rules: AxesRules | None) -> Callable[[str, Shape], LeafSpec]:
    """(path, shape) → the `LeafSpec` by `rules`, or by the default rules where none of these matches.

    Args:
      who: the function that errors name.
      rules: pattern → spec, or (path, shape) → spec, or a tree of specs, as those of `labels`. The spec None
        means "not a matrix".

    Raises:
      ValueError: a spec in place of rules.
    """
    if isinstance(rules, str | Axes):
        raise ValueError(
            f"{who}: axes must map patterns of paths to specs, but is {rules!r}. "
            f"Type axes={{'*': {rules!r}}} for all leaves."
        )
    rules = {} if rules is None else rules
    match, pattern_of = lookup(rules), matching_pattern(rules)

    def resolve(path: str, shape: Shape) -> LeafSpec:
        spec = match(path, shape)
        if spec is not NO_MATCH:
            pattern = pattern_of(path)
            return _by_rule(spec, "rule" if pattern is None else f"rule {pattern}", path, shape)
        role, spec = by_name(path, shape)
        if spec == UNDECIDED:
            cause = "no rule says which of its axes are inputs (i), outputs (o) or batch (b)"
            return LeafSpec(None, "undecided", suggest(path, shape, cause))
        return LeafSpec(None if spec is None else _axes(spec), role)

    return resolve


def leaf_axes(who: str, rules: AxesRules | None) -> Callable[[str, Shape], Axes | None]:
    """(path, shape) → the leaf's spec, None if it is not a matrix; a `LeafError` if it is unresolved."""
    resolve = resolve_axes(who, rules)
    return lambda path, shape: resolve(path, shape).resolved_axes(who)


def has_no_name(path: str) -> bool:
    """Whether a leaf belongs to a layer whose name does not say what it is for."""
    return _ANY_LAYER.search(path) is not None and not _IN_BLOCK.search(path)


def output_layer(paths: Sequence[str], shapes: Sequence[Shape], specs: Sequence[LeafSpec]) -> int | None:
    """The index of the only layer without a telling name whose outputs no other leaf takes in.

    Its inputs must be the outputs of another layer, and no other such layer may have a higher number. Where a
    leaf is called a head, or where several layers may be the output, or none, as in an autoencoder, the
    answer is None.

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
        if spec.role == "dense" and spec.axes is not None and len(shapes[k]) == 2 and has_no_name(path)
    ]

    def taken(k: int) -> bool:
        module, _, outputs = leaves[k]
        return any(other != module and outputs <= inputs for other, inputs, _ in leaves)

    sinks = [k for k in unnamed if not taken(k)]
    if len(sinks) != 1 or any(_number(paths[k]) > _number(paths[sinks[0]]) for k in unnamed):
        return None
    module, inputs, _ = leaves[sinks[0]]
    return sinks[0] if any(m != module and inputs <= outputs for m, _, outputs in leaves) else None


def _number(path: str) -> int:
    """The number of a layer; 0 for one without."""
    numbers = re.findall(r"\d+", path)
    return int(numbers[-1]) if numbers else 0


def _sides(shape: Shape, spec: LeafSpec) -> tuple[set[int], set[int]]:
    """The widths that a leaf takes in, and those that it puts out; all of them if it is no matrix."""
    if spec.axes is None:
        return {*shape}, ({*shape} if len(shape) > 1 else set())
    stacks = spec.axes.stacks(shape)
    return {stack[-2] for stack in stacks}, {stack[-1] for stack in stacks}


class AxesOfLeaves:
    """How a transform finds the axes of leaves: from `route_matrices` around it, or from its own rules."""

    def __init__(self, who: str, axes: AxesRules | None, shardings: Rules | None):
        self.given, self.match = axes is not None, lookup_if_given(shardings)
        self.form = by_whole_shape(who, self.match, leaf_axes(who, axes))

    def check(self, params: Any) -> None:
        """Refuse leaves that the transform's own rules do not decide, if it has any."""
        if self.given:
            labels(self.form)(params)

    def axes_and_shardings(self, leaves: Leaves) -> tuple[Sequence[Axes | None], Any]:
        """The axes of every leaf, None for no matrix; and the function from leaves to shardings, or None."""
        if not self.given and handed("matrix_axes") is not None:
            return handed("matrix_axes"), handed("shardings")
        pairs = zip(leaves.paths, leaves.values, strict=True)
        return [None if is_absent(x) else self.form(path, np.shape(x)) for path, x in pairs], self.match

    def of(self, leaf: Leaf) -> tuple[Axes | None, Any]:
        """Those of one leaf, for `init`."""
        if not self.given and (forms := handed("matrix_axes")) is not None:
            return forms[leaf.index], handed("shardings")
        return self.form(leaf.path, np.shape(leaf.weight)), self.match


def _by_rule(spec: Any, role: str, path: str, shape: Shape) -> LeafSpec:
    if spec is None:
        return LeafSpec(None, role)
    if not isinstance(spec, str | Axes):
        return LeafSpec(None, role, suggest(path, shape, f"{spec!r} is not a spec"))
    try:
        axes = spec if isinstance(spec, Axes) else _axes(spec)
    except ValueError as error:
        return LeafSpec(None, role, suggest(path, shape, str(error).rstrip(".")))
    cause = axes.misfit(shape)
    return LeafSpec(axes, role) if cause is None else LeafSpec(None, role, suggest(path, shape, cause))


def suggest(path: str, shape: Shape, cause: str) -> str:
    """Why a leaf is unresolved, and a rule to type for everything that the leaf may be."""
    outputs_first = path.split("/")[-1].startswith("weight") or path.endswith("weight")
    meanings = _WEIGHTS if outputs_first else _KERNELS
    fitting = {spec: text for spec, text in meanings.items() if _axes(spec).misfit(shape) is None}
    if not fitting and len(shape) > 1:
        fitting = {"b" * (len(shape) - 2) + "io": "stacks of stacks, inputs x outputs"}
    if len(shape) > 2 and shape[1 if outputs_first else -2] == 1:
        rules = {None: "a depthwise convolution: not a matrix", **fitting}
    else:
        rules = {**fitting, None: "not a matrix"}
    lines = [f"  axes={{{path!r}: {spec!r}}}  # {text}" for spec, text in rules.items()]
    return "\n".join([f"{path!r} has shape {shape}, and {cause}. Type one of", *lines])


_KERNELS = {
    "io": "inputs x outputs",
    "oi": "outputs x inputs",
    "i(3o)": "query, key and value side by side",
    "i(36o)": "query, key and value of 12 heads, ordered head by head",
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
    "(36o)i": "query, key and value of 12 heads, ordered head by head",
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
