"""The output layer of a model whose layers have no telling names, by their widths and numbers."""

import re
from collections.abc import Iterator, Sequence

from optimorph._core.types import Shape
from optimorph._routing.connections import IN_PERCEPTRON, Layers, is_stack
from optimorph._routing.grouping import group_by, module_of, without_numbers
from optimorph._routing.layer_widths import (
    channels,
    ends_of_stacks,
    has_no_name,
    heads_of_vocabularies,
    is_inside,
)
from optimorph._routing.leaf_spec import HEAD, INFERRED_HEAD, LeafSpec, axes_of, unresolved
from optimorph._routing.name_patterns import WEIGHT
from optimorph._routing.names import by_name, sides
from optimorph.linalg import Axes

_SCAN = re.compile(rf"(^|/)layers?/{WEIGHT}$", re.IGNORECASE)
"""The name of all layers of a scan, where the leaf is a stack."""


def with_output_layer(
    paths: Sequence[str], shapes: Sequence[Shape], specs: Sequence[LeafSpec]
) -> list[LeafSpec]:
    """The specs with the output layer inferred, or asked for if several layers without names may be it.

    The output layer is a layer without a telling name whose inputs are the outputs of another layer, and
    whose outputs no other leaf takes in. If there is only one, the last of its module, it is inferred. It is
    asked for if there are several; if it is a convolution beside a head; if outputs are taken in by no later
    layer, as in an autoencoder; and if a layer is the last of its module, or the next begins anew, but others
    take in as many inputs as it has outputs. A layer outside blocks whose name no rule knows is also the
    output layer if it has fewer outputs than inputs, or one for each row of an embedding. Every other layer
    outside blocks whose outputs no leaf takes in, or only the first layers of other modules, is asked for,
    also beside a leaf that is called a head; so is one of at most four outputs that no leaf takes in.

    Args:
      paths: of all leaves.
      shapes: of all leaves.
      specs: how the default rules and the user's read them.
    """
    specs, paths = list(specs), [path.replace(".", "/") for path in paths]
    for k in [*heads_of_vocabularies(paths, shapes, specs)]:
        specs[k] = LeafSpec(None, HEAD)
    found = _Candidates(paths, shapes, specs)
    if found.unnamed or found.others:
        for k, spec in found.outputs():
            specs[k] = spec
    return specs


class _Candidates:
    """The layers that may be the output layer.

    Attributes:
      single: the layers that are one matrix, or a convolution; of attention only what is alone in a module.
      unnamed: those of them without a telling name.
      others: those of them outside blocks, or at the end of stacks, whose name no rule knows.
      heads: the output layers by name or by rule, and layers without a telling name that have one output.
    """

    def __init__(self, paths: Sequence[str], shapes: Sequence[Shape], specs: Sequence[LeafSpec]):
        self.paths, self.shapes, self.specs = paths, shapes, specs
        self.nameless = nameless = [has_no_name(path) for path in paths]
        attention = [k for k, spec in enumerate(specs) if spec.role == "attention"]
        groups = group_by(attention, lambda k: module_of(paths[k]))
        alone = [group[0] for group in groups if len(group) == 1]
        self.single = [
            k
            for k, spec in enumerate(specs)
            if spec.role in ("dense", "convolution") or k in alone
            if spec.axes is not None and _is_one(spec.axes)
            if not (is_stack(spec.axes) and (_SCAN.search(paths[k]) or not nameless[k]))
        ]
        self.unnamed = [k for k in self.single if nameless[k]]
        named = [k for k in self.single if not nameless[k]]
        stack_ends = {*ends_of_stacks(named, paths, shapes, specs)}
        self.others = [k for k in named if not is_inside(paths[k]) or k in stack_ends]
        self.by_name = [k for k, spec in enumerate(specs) if spec.role == HEAD]
        ruled = [k for k, spec in enumerate(specs) if nameless[k] and spec.role.startswith("rule")]
        vectors = [k for k, spec in enumerate(specs) if spec.role == "vector" and len(shapes[k]) > 1]
        self.heads = [
            *self.by_name,
            *(k for k in ruled if specs[k].axes is None and len(shapes[k]) > 1),
            *(k for k in vectors if nameless[k] and sides(paths[k], shapes[k])[1] == 1),
        ]
        self.layers = Layers(paths, shapes, specs, sorted({*self.unnamed, *self.heads, *ruled}), self.others)
        self.fed = [k for k in self.unnamed if self.layers.is_fed(k)]

    def outputs(self) -> Iterator[tuple[int, LeafSpec]]:
        """The layers that are, or may be, the output layer, and those that only looked so by a name."""
        layers, reshaped = self.layers, [*self._reshaped()]
        yield from ((k, LeafSpec(axes_of("io"), "dense")) for k in reshaped)
        ends, sinks, certain = self._ends()
        known = sinks or self.heads or not layers.embeddings  # otherwise the embedding may be it too
        last = [k for k in [*self.fed, *self.others] if known or layers.has_window(k)]
        last = [k for k in last if k not in ends and layers.is_end(k)]
        few = [k for k in self.single if k not in ends + last and layers.has_few_outputs(k)]
        unlikely = {*ends} - {*sinks} if sinks else {k for k in ends if layers.inputs[k] == layers.outputs[k]}
        unlikely |= {k for k in last if is_inside(self.paths[k]) or not layers.is_narrower(k)}
        candidates = ends + last + few
        for k in candidates:
            form, in_list = self.specs[k].axes, layers.is_in_list(k)
            as_matrix = None if form is None else form.spec
            alone = candidates == [k] and not (self.by_name and layers.has_window(k))
            if alone and k in certain and layers.next_of(k) is None and not in_list:
                yield k, LeafSpec(None, INFERRED_HEAD, answers=(None, as_matrix))
            else:
                cause = "may be the output layer, by its width"
                inner = (k in unlikely and (k in last or len(unlikely) < len(ends))) or in_list
                first = (as_matrix, HEAD) if inner else (HEAD, as_matrix)
                yield k, unresolved(self.paths[k], self.shapes[k], cause, first=first)

    def _reshaped(self) -> Iterator[int]:
        """The heads without a telling name whose outputs a layer takes in, in another shape."""
        rows = {
            shape[0]
            for shape, spec in zip(self.shapes, self.specs, strict=True)
            if shape and spec.role == "embedding"
        }
        for k in self.by_name:
            shape = self.shapes[k]
            if self.nameless[k] and len(shape) == 2 and shape[-1] not in rows and self.layers.is_reshaped(k):
                yield k

    def _ends(self) -> tuple[list[int], list[int], set[int]]:
        """The layers that may be last; the sinks, whose outputs no leaf takes in; and the certain ones."""
        layers = self.layers
        sinks = [k for k in self.fed if layers.is_sink(k)]
        sinks_of_others = [k for k in self.others if layers.is_fed(k) or layers.joins(k) if layers.is_sink(k)]
        likely = [k for k in sinks_of_others if layers.is_narrower(k) or layers.puts_out_words(k)]
        kinds = {without_numbers(self.paths[k]) for k in likely}
        narrow = [k for k in sinks_of_others if without_numbers(self.paths[k]) in kinds]
        if not all(self.nameless[k] for k in self.by_name):  # beside an output layer with a telling name
            ends = [k for k in sinks if layers.next_of(k) is None and not is_stack(self.specs[k].axes)]
            widths = [layers.outputs[k] for k in self.heads]
            ends += [k for k in sinks_of_others if k in narrow or layers.outputs[k] in widths]
            return ends, sinks, set()
        sinks += narrow
        if sinks or self.heads or self._is_confirmed():
            anew = [k for k in self.fed if k not in sinks and layers.next_begins_anew(k)]
            return sinks + anew, sinks, {*sinks}
        return self._ends_without_sinks(sinks_of_others)

    def _ends_without_sinks(self, others: list[int]) -> tuple[list[int], list[int], set[int]]:
        """The same, if a leaf takes in the outputs of every layer without a telling name."""
        layers, fed = self.layers, self.fed
        own = {k for k in fed if layers.takes_its_own_end(k)}
        one = len(self.unnamed) == 1
        certain = own if one else {k for k in fed if k not in own and layers.is_last_of_all(k)}
        asked = {k for k in own if not IN_PERCEPTRON.search(self.paths[k])}
        ends = [k for k in fed if k in asked or k in certain or layers.may_be_last(k)]
        ends += [] if layers.embeddings else others
        ends += [k for k in self.others if k not in ends and layers.is_fed(k) and layers.only_earlier_take(k)]
        widths = [layers.outputs[k] for k in ends if layers.is_narrower(k) and k not in certain]
        ends += [k for k in fed if k not in ends and layers.is_narrower(k) and layers.outputs[k] in widths]
        return ends, [], certain

    def _is_confirmed(self) -> bool:
        """Whether a rule says of a layer that may be the output layer that it is no matrix."""
        return any(
            spec.role.startswith("rule") and spec.axes is None and _may_be_head(path, shape)
            for path, shape, spec in zip(self.paths, self.shapes, self.specs, strict=True)
        )


def _may_be_head(path: str, shape: Shape) -> bool:
    """Whether a leaf that is called no matrix may be an output layer with a name that no rule knows."""
    role, spec = by_name(path, shape)
    return role in ("dense", "convolution", "attention") and spec is not None and not is_inside(path)


def _is_one(axes: Axes) -> bool:
    """Whether a leaf is one matrix, or one for each index of other axes, or a convolution."""
    sides = [axis for axis in axes.parts if axis.letter != "b"]
    return (len(sides) == 2 or channels(axes) is not None) and all(axis.whole for axis in sides)
