"""Layers that hold several side by side, where no name says so: by what the layers beside them take in."""

import re
from collections.abc import Sequence

from optimorph._core.types import Shape
from optimorph._routing.grouping import without_numbers
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
    sides = [*map(sides_of, paths, shapes, specs)]
    taken = set[int]().union(*(inputs for inputs, _ in sides))
    names = {k: layer_name(paths[k].replace(".", "/")) for k, spec in enumerate(specs) if spec.axes}
    takers: dict[tuple[str, int], set[int]] = {}
    inside: dict[str, list[int]] = {}
    for k, module in names.items():
        while module := module.rpartition("/")[0]:
            inside.setdefault(module, []).append(k)
            for width in sides[k][0]:
                takers.setdefault((module, width), set()).add(k)

    def parts(k: int) -> list[int]:
        module, width = names[k].rpartition("/")[0], max(sides[k][1])
        return [n for n in _PARTS if width % n == 0 and takers.get((module, width // n), {k}) != {k}]

    fused = [
        k
        for k, name in names.items()
        if specs[k].role in ("dense", "experts") and _spec(specs[k]).strip("b") in ("io", "oi")
        if sides[k][1].isdisjoint(taken) and is_inside(paths[k]) and not _ONE.search(name) and parts(k)
    ]
    found = list(specs)
    for k in fused:
        spec = _spec(specs[k])
        module, kind = names[k].rpartition("/")[0], without_numbers(names[k])
        numbers = [number_of(names[j]) for j in inside[module] if without_numbers(names[j]) == kind]
        is_last = number_of(names[k]) == max(numbers) > min(numbers)
        answers = [spec.replace("o", f"({parts(k)[0]}o)"), spec][:: -1 if is_last else 1]
        cause = "may be several layers side by side, by its width"
        found[k] = unresolved(paths[k], shapes[k], cause, first=answers)
    return found


def _spec(spec: LeafSpec) -> str:
    return "" if spec.axes is None else spec.axes.spec
