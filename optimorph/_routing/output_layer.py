"""The output layer of a model whose layers have no telling names, by their widths and numbers."""

import re
from collections.abc import Sequence

from optimorph._core.types import Shape
from optimorph._routing.connections import IN_PERCEPTRON, Layers, is_stack
from optimorph._routing.grouping import without_numbers
from optimorph._routing.layer_widths import (
    channels,
    ends_of_stacks,
    has_no_name,
    heads_of_vocabularies,
    is_inside,
)
from optimorph._routing.leaf_spec import HEAD, INFERRED_HEAD, LeafSpec, axes_of, unresolved
from optimorph._routing.name_rules import WEIGHT
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
    asked for if there are several; if outputs are taken in by no later layer, as in an autoencoder; and if
    a layer is the last of its module, or the next begins anew, but others take in as many inputs as it has
    outputs. A layer outside blocks whose name no rule knows is also the output layer if it has fewer outputs
    than inputs. Every other layer outside blocks whose outputs no leaf takes in, or only the first layers of
    other modules, is asked for, also beside a leaf that is called a head; so is one of at most four outputs
    that no leaf takes in.

    Args:
      paths: of all leaves.
      shapes: of all leaves.
      specs: how the default rules and the user's read them.
    """
    specs, paths = list(specs), [path.replace(".", "/") for path in paths]
    for k in [*heads_of_vocabularies(paths, shapes, specs)]:
        specs[k] = LeafSpec(None, HEAD)
    nameless = [has_no_name(path) for path in paths]
    single = [
        k
        for k, spec in enumerate(specs)
        if spec.role in ("dense", "convolution") and spec.axes is not None and _is_one(spec.axes)
        if not (is_stack(spec.axes) and (_SCAN.search(paths[k]) or not nameless[k]))
    ]
    unnamed = [k for k in single if nameless[k]]
    stack_ends = {*ends_of_stacks([k for k in single if not nameless[k]], paths, shapes, specs)}
    others = [k for k in single if not nameless[k] and (not is_inside(paths[k]) or k in stack_ends)]
    heads = [k for k, spec in enumerate(specs) if spec.role == HEAD]
    if not unnamed and not others:
        return specs
    named = not all(nameless[k] for k in heads)
    ruled = [k for k, spec in enumerate(specs) if nameless[k] and spec.role.startswith("rule")]
    heads += [k for k in ruled if specs[k].axes is None and len(shapes[k]) > 1]
    vectors = [k for k, spec in enumerate(specs) if spec.role == "vector" and len(shapes[k]) > 1]
    heads += [k for k in vectors if nameless[k] and sides(paths[k], shapes[k])[1] == 1]
    confirmed = any(
        spec.role.startswith("rule") and spec.axes is None and _may_be_head(path, shape)
        for path, shape, spec in zip(paths, shapes, specs, strict=True)
    )
    layers = Layers(paths, shapes, specs, sorted({*unnamed, *heads, *ruled}), others)
    rows = {shape[0] for shape, spec in zip(shapes, specs, strict=True) if spec.role == "embedding"}
    for k in [k for k in heads if specs[k].role == HEAD and nameless[k] and len(shapes[k]) == 2]:
        if shapes[k][-1] not in rows and layers.is_reshaped(k):
            specs[k] = LeafSpec(axes_of("io"), "dense")
    fed = [k for k in unnamed if layers.is_fed(k)]
    sinks = [k for k in fed if layers.is_sink(k)]
    ends_of_others = [k for k in others if layers.is_fed(k) or layers.joins(k) if layers.is_sink(k)]
    kinds = {without_numbers(paths[k]) for k in ends_of_others if layers.is_narrower(k)}
    narrow = [k for k in ends_of_others if without_numbers(paths[k]) in kinds]
    sinks += [] if named else narrow
    if named:
        certain = set[int]()
        ends = [k for k in sinks if layers.next_of(k) is None and not is_stack(specs[k].axes)]
        widths = [layers.outputs[k] for k in heads]
        ends += [k for k in ends_of_others if k in narrow or layers.outputs[k] in widths]
    elif sinks or heads or confirmed:
        certain = {*sinks}
        ends = sinks + [k for k in fed if k not in certain and layers.next_begins_anew(k)]
    else:
        own = {k for k in fed if layers.takes_its_own_end(k)}
        certain = own if len(unnamed) == 1 else {k for k in fed if k not in own and layers.is_last_of_all(k)}
        asked = {k for k in own if not IN_PERCEPTRON.search(paths[k])}
        ends = [k for k in fed if k in asked or k in certain or layers.may_be_last(k)]
        ends += [] if layers.embeddings else ends_of_others
        ends += [k for k in others if k not in ends and layers.is_fed(k) and layers.only_earlier_take(k)]
        widths = [layers.outputs[k] for k in ends if layers.is_narrower(k) and k not in certain]
        ends += [k for k in fed if k not in ends and layers.is_narrower(k) and layers.outputs[k] in widths]
    known = sinks or heads or not layers.embeddings  # otherwise the embedding may be the output layer too
    last = [k for k in [*fed, *others] if known and k not in ends and layers.is_end(k)]
    few = [k for k in single if k not in ends + last and layers.has_few_outputs(k)]
    unlikely = {*ends} - {*sinks} if sinks else {k for k in ends if layers.inputs[k] == layers.outputs[k]}
    unlikely |= {k for k in last if is_inside(paths[k]) or not layers.is_narrower(k)}
    candidates = ends + last + few
    for k in candidates:
        form = specs[k].axes
        answers = (None, None if form is None else form.spec)
        if candidates == [k] and k in certain and layers.next_of(k) is None and not layers.is_in_list(k):
            specs[k] = LeafSpec(None, INFERRED_HEAD, answers=answers)
        else:
            cause = "may be the output layer, by its width"
            inner = (k in unlikely and (k in last or len(unlikely) < len(ends))) or layers.is_in_list(k)
            likelier = answers[::-1] if inner else answers
            specs[k] = unresolved(paths[k], shapes[k], cause, first=likelier)
    return specs


def _may_be_head(path: str, shape: Shape) -> bool:
    """Whether a leaf that is called no matrix may be an output layer with a name that no rule knows."""
    role, spec = by_name(path, shape)
    return role in ("dense", "convolution") and spec is not None and not is_inside(path)


def _is_one(axes: Axes) -> bool:
    """Whether a leaf is one matrix, or one for each index of other axes, or a convolution."""
    sides = [axis for axis in axes.parts if axis.letter != "b"]
    return (len(sides) == 2 or channels(axes) is not None) and all(axis.whole for axis in sides)
