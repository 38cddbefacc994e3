"""The default rules for all leaves of a tree: what their names say, with what each tells of the others."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from optimorph._core.types import Shape
from optimorph._routing.axis_order import (
    projections_of_embeddings,
    specs_beside_fused,
    specs_by_bias,
    specs_by_chain,
    specs_by_pair,
    specs_in_lists,
)
from optimorph._routing.layer_widths import heads_that_feed
from optimorph._routing.leaf_spec import HEAD, LeafSpec, axes_of, likely, unresolved
from optimorph._routing.name_rule import UNDECIDED
from optimorph._routing.names import by_name, offers, outputs_first, sides, with_layers, without_layers
from optimorph._routing.shape_conditions import few_channels
from optimorph._routing.siblings import (
    SEVERAL,
    arrays_beside_modules,
    biases_of_layers,
    expert_spec,
    hidden_of_heads,
    low_rank_spec,
    networks_called_heads,
    pairs_of_tables,
    routers_of_experts,
    routers_of_modules,
    stems,
)
from optimorph._routing.stacked_layers import StackedLayers

_OUTPUTS = re.compile(r"(^|[/_])(out|output|o|post)(_proj(ection)?|_dense)?/[^/]+$")
_QUERY = re.compile(r"(^|[/_])(q|k|v|query|key|value)(_proj(ection)?)?/[^/]+$")
_PERCEPTRON = re.compile(r"expert|moe|mlp|ff[nw]?(?![a-z])")


class _Leaf(NamedTuple):
    """A leaf; `layers` is the axis that counts layers, `single` the shape without it."""

    path: str
    shape: Shape
    layers: int | None
    single: Shape

    def stacked(self, spec: str | None) -> str | None:
        """The spec of all layers, of that of one."""
        return with_layers(spec, self.layers)


def by_siblings(paths: Sequence[str], shapes: Sequence[Shape]) -> list[LeafSpec]:
    """The default rules for all leaves of a tree, with what each tells of the others."""
    stacks = StackedLayers(paths, shapes)
    layers = [*map(stacks.axis, paths, shapes)]
    leaves = [
        _Leaf(path, shape, k, without_layers(shape, k))
        for path, shape, k in zip(paths, shapes, layers, strict=True)
    ]
    named = [by_name(leaf.path, leaf.shape, leaf.layers) for leaf in leaves]
    last_names = ["/".join(re.split("[./]", path)[-2:]) for path in paths]

    def heads() -> list[int]:
        return [k for k, (role, _) in enumerate(named) if role == HEAD]

    for k in networks_called_heads(paths, heads()):
        named[k] = by_name(last_names[k], shapes[k], layers[k])
    for k in hidden_of_heads(paths, shapes, heads()):
        named[k] = by_name(last_names[k], shapes[k], layers[k])
        if named[k][0] == HEAD:  # also without the names of modules around it
            name = "conv" if len(shapes[k]) > 3 else "linear"
            named[k] = by_name(f"{name}/{last_names[k].rpartition('/')[2]}", shapes[k], layers[k])
    for k, certain in heads_that_feed(paths, shapes, {k for k in heads() if named[k][1] is None}):
        named[k] = "dense", ("oi" if outputs_first(paths[k]) else "io") if certain else UNDECIDED
    for k, small in stems(paths, shapes, [role for role, _ in named]):
        found = by_name(paths[k], small, layers[k])  # without the size of the window
        named[k] = found if found[0] in ("convolution", "dense") else named[k]
    asked = {k for k, (_, spec) in enumerate(named) if spec == UNDECIDED}
    for k in pairs_of_tables(paths, shapes, asked):
        named[k] = ("dense", UNDECIDED) if named[k][0] == "dense" else named[k]
    tree = _Tree(leaves, named, stacks)
    return [tree.spec(leaf, *own) for leaf, own in zip(leaves, named, strict=True)]


def by_default(path: str, shape: Shape, layers: int | None, role: str, spec: str | None) -> LeafSpec:
    """How a leaf reads by a role and a spec of the default rules."""
    if spec is None:
        return LeafSpec(None, role)
    if spec != UNDECIDED and axes_of(spec).misfit(shape) is None:
        return LeafSpec(axes_of(spec), role)
    one_layer = [with_layers(answer, layers) for answer in likely(path, without_layers(shape, layers))]
    offered, layout = offers(path, shape, layers)
    if role == HEAD:
        offered = [HEAD if answer is None else answer for answer in offered]
    cause = "no rule says which of its axes are inputs (i), outputs (o) or batch (b)"
    return unresolved(path, shape, cause, first=[*offered, *one_layer])._replace(layout=layout)


class _Tree:
    """What the leaves of a tree tell of each other.

    Args:
      leaves: all leaves.
      named: their roles and specs by their names.
      stacks: which axis of each leaf counts layers.
    """

    def __init__(
        self, leaves: Sequence[_Leaf], named: Sequence[tuple[str, str | None]], stacks: StackedLayers
    ):
        self.stacks = stacks
        self.shapes = {leaf.path: leaf.single for leaf in leaves}
        of_role: dict[str, dict[str, str | None]] = {}
        for leaf, (role, spec) in zip(leaves, named, strict=True):
            of_role.setdefault(role, {})[leaf.path] = spec
        self.gates = of_role.get("gates", {})
        self.gates_of_experts = {*routers_of_experts(self.shapes, of_role.get("experts", ()))}
        routers = {*of_role.get("router", ()), *self.gates_of_experts}
        routers = {path: shape for path, shape in self.shapes.items() if path in routers}
        self.routers = routers_of_modules(routers)
        norms = [self.shapes[path] for path in of_role.get("norm", ())]
        experts = {sides(path, shape)[1] for path, shape in routers.items() if shape}
        self.widths = {shape[0] for shape in norms if len(shape) == 1} - experts
        heads = [path for path in of_role.get(HEAD, ()) if self.shapes[path]]
        outputs = {sides(path, self.shapes[path])[1] for path in heads}
        self.vocabulary = {n for n in outputs if n >= 1 << 12}
        self.arrays = {*arrays_beside_modules([*self.shapes])}
        self.biases = {*biases_of_layers(self.shapes, of_role.get("attention", ()))}
        by_bias, self.alike = specs_by_bias(self.shapes)
        in_lists, self.likely = specs_in_lists(self.shapes)
        self.decided = in_lists | specs_beside_fused(self.shapes)
        self.has_kernels = any(
            path.endswith("kernel") and len(shape) > 1 for path, shape in self.shapes.items()
        )
        self.projections = {*projections_of_embeddings(self.shapes, of_role.get("embedding", ()))}
        self.told = (
            specs_by_chain(self.shapes) | specs_by_pair(self.shapes, self.widths) | by_bias | self.decided
        )

    def spec(self, leaf: _Leaf, role: str, spec: str | None) -> LeafSpec:
        """How a leaf reads that has this role and this spec by its name."""
        if leaf.path in self.biases:
            return LeafSpec(None, "bias")
        if leaf.path in self.gates_of_experts:
            return LeafSpec(None, "router")
        rows, *columns = leaf.single or (0,)
        if role == "dense" and rows in self.vocabulary and rows >= 16 * math.prod(columns):
            return LeafSpec(None, "embedding")  # of tokens as vectors of zeros and a one
        if leaf.path in self.arrays and len(leaf.single) == 2:
            return self._array(leaf)
        role, spec = self._among_others(leaf, role, spec)
        found = by_default(leaf.path, leaf.shape, leaf.layers, role, spec)
        first = self._likeliest(leaf, found)
        return found._replace(answers=tuple(dict.fromkeys([*first, *found.answers]))) if first else found

    def _array(self, leaf: _Leaf) -> LeafSpec:
        """An array without a name in a list of modules."""
        if leaf.single[0] >= 16 * leaf.single[1]:
            return LeafSpec(None, "embedding")
        cause = "may be an embedding, because it has no name in a list of modules"
        return unresolved(leaf.path, leaf.shape, cause, first=(None,))

    def _among_others(self, leaf: _Leaf, role: str, spec: str | None) -> tuple[str, str | None]:
        """The role and the spec: of experts beside a router, of two factors, of gates, beside a bias."""
        path, _, _, shape = leaf
        asked = spec == UNDECIDED
        of_expert = self._of_expert(path) if asked or role == "experts" else None
        if of_expert:
            return "experts", leaf.stacked(of_expert)
        if asked or role in ("bias", "low rank") or (role == "dense" and len(shape) > 2):
            of_factor = leaf.stacked(low_rank_spec(path, shape, self.shapes))
            if of_factor not in (None, spec):
                return "low rank", of_factor
        if asked or role == "dense":
            spec = self.gates.get(_recurrent_twin(path), spec)
        if spec == UNDECIDED:
            told, offered = self.told.get(path, ""), offers(path, leaf.shape, leaf.layers)[0]
            fits = len(told) > 2 and None not in offered[:1] and not _fits_too(offered, told, shape)
            return role, leaf.stacked(told) if fits or path in self.decided else spec
        if self.told.get(path) == "ioii" and few_channels(shape[2:] + shape[:2]):
            return HEAD, None  # the last of transposed convolutions
        if (
            role == "convolution"
            and self.told.get(path) == "iio"
            and outputs_first(path)
            and max(shape[:1]) > 9
        ):
            return role, UNDECIDED  # no window
        if path in self.projections:
            return "dense", leaf.stacked("oi" if outputs_first(path) else "io")
        told = leaf.stacked(self.told.get(path) or self.alike.get(path))
        return role, spec if spec is None or told is None else _with_outputs(spec, told)

    def _of_expert(self, path: str) -> str | None:
        return expert_spec(path, self.shapes.get(path, ()), self.routers, self.widths)

    def _likeliest(self, leaf: _Leaf, found: LeafSpec) -> list[str | None]:
        """The answers to put first, of a question that the name does not answer."""
        if not found.answers:
            return []
        if f"{leaf.path}_bias" in self.shapes:  # gpt-oss, whose gate and input alternate
            return [answer for answer in found.answers if answer is not None and "~" in answer]
        if leaf.path in self.likely:
            return [self.likely[leaf.path]]
        if SEVERAL.search(leaf.path) and self._of_expert(SEVERAL.sub("down", leaf.path)) == "boi":
            return [leaf.stacked("b(2o)i")]
        if self.has_kernels and leaf.path.endswith("_weight"):
            return [leaf.stacked("io")]
        if len(leaf.single) < 3:
            return []
        if leaf.layers is None and (k := self.stacks.maybe_axis(leaf.path, leaf.shape)) is not None:
            _, spec = by_name(leaf.path, leaf.shape, k)
            if spec not in (None, UNDECIDED):
                return [spec]
        if outputs_first(leaf.path) and self.told.get(leaf.path) == "iio":
            return [leaf.stacked("bio"), leaf.stacked("iio")]
        if outputs_first(leaf.path) and leaf.single[-1] <= 9:  # a convolution
            return []
        if found.answers[0] in [None, *offers(leaf.path, leaf.shape, leaf.layers)[0]]:
            return []
        first, *rest = [size in self.widths for size in leaf.single]
        if first and not any(rest[:-1]):
            few = len(rest) == 2 and 1 < leaf.single[1] < 4  # a gate and its input, or query, key and value
            side, other = "oi" if _OUTPUTS.search(leaf.path.lower()) else "io"
            return [leaf.stacked("ibo" if few else side + other * len(rest))]
        if [first, *rest] == [False, False, True] and not _PERCEPTRON.search(leaf.path.lower()):
            of_heads = "ooi" if _QUERY.search(leaf.path.lower()) else "iio"
            certain = leaf.layers is not None or _OUTPUTS.search(leaf.path.lower())
            return [leaf.stacked(of_heads)] if certain else []
        return []


def _with_outputs(spec: str, told: str) -> str:
    """The spec with the outputs where another one has them, if both have the same batch axes."""
    parts, letters = axes_of(spec).parts, "".join(axis.letter for axis in axes_of(spec).parts)
    if letters == told or letters.count("b") != told.count("b"):
        return spec
    if letters.count("o") != told.count("o"):
        return told
    of = {letter: iter([axis for axis in parts if axis.letter == letter]) for letter in "bio"}
    return "".join(str(next(of[letter])) for letter in told)


def _fits_too(offered: Sequence[str | None], told: str, shape: Shape) -> bool:
    """Whether the bias that tells one spec is as long as the outputs of the likeliest other one."""
    other = next((spec for spec in offered if spec), told)
    sizes = [[n for letter, n in zip(spec, shape, strict=False) if letter == "o"] for spec in (other, told)]
    return other != told and len(other) == len(shape) and sizes[0] == sizes[1]


def _recurrent_twin(path: str) -> str:
    """The leaf that has the gates of a recurrent layer as this one has, for hidden states."""
    path = re.sub(r"(?<=dense_)i/", "h/", re.sub(r"[xi](?=2h/)", "h", path))
    path = re.sub(r"(?<![^/.])kernel$", "recurrent_kernel", path) if "dense_" not in path else path
    return re.sub(r"(weight_|[wW]_?)(?:i|x)(h?(_l\d+(_reverse)?)?)$", r"\1h\2", path)
