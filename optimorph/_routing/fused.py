"""Layers that hold several side by side, where no name says so: by what the layers beside them take in."""

import re
from collections.abc import Sequence

from optimorph._core.types import Shape
from optimorph._routing.grouping import group_by, without_numbers
from optimorph._routing.leaf_spec import LeafSpec, unresolved
from optimorph._routing.output_layer import is_inside, layer_name, number_of, sides_of

_PARTS = range(2, 9)

_ONE = re.compile(r"(^|[/_])w?(q|k|v|kv|query|key|value)(_\w+)?$", re.IGNORECASE)
"""A name of one layer of attention, however wide."""


def with_fused_layers(
    paths: Sequence[str], shapes: Sequence[Shape], specs: Sequence[LeafSpec]
) -> list[LeafSpec]:
    """The specs with a question for each layer that may be several layers side by side.

    Query, key and value, a gate and its input, or several modulations share one leaf. No other leaf takes in
    all of its outputs, and a leaf of the same module takes in a half of them, or a third, ..., or an eighth.
    The last of several numbered layers is more likely a single one.
    """
    names = [layer_name(path.replace(".", "/")) for path in paths]
    modules = [name.rpartition("/")[0] for name in names]
    chains = group_by(range(len(names)), lambda k: (modules[k], without_numbers(names[k])))
    last = {max(chain, key=lambda k: number_of(names[k])) for chain in chains if len(chain) > 1}
    sides = [*map(sides_of, paths, shapes, specs)]
    taken = set[int]().union(*(inputs for inputs, _ in sides))
    takers: dict[tuple[str, int], set[int]] = {}
    for k, (inputs, _) in enumerate(sides):
        module = names[k] if specs[k].axes is not None else ""
        while module := module.rpartition("/")[0]:
            for width in inputs:
                takers.setdefault((module, width), set()).add(k)
    found = list(specs)
    for k, (_, outputs) in enumerate(sides):
        axes = specs[k].axes
        if axes is None or specs[k].role not in ("dense", "experts") or not is_inside(paths[k]):
            continue
        if axes.spec.strip("b") not in ("io", "oi") or not outputs.isdisjoint(taken) or _ONE.search(names[k]):
            continue
        parts = [n for n in _PARTS if takers.get((modules[k], max(outputs) / n), {k}) != {k}]
        if parts:
            answers = [axes.spec.replace("o", f"({parts[0]}o)"), axes.spec][:: -1 if k in last else 1]
            cause = "may be several layers side by side, by its width"
            found[k] = unresolved(paths[k], shapes[k], cause, first=answers)
    return found
