"""Layers that hold several side by side, where no name says so: by what the layers beside them take in."""

import itertools
import re
from collections.abc import Sequence

from optimorph._core.types import Shape
from optimorph._routing.grouping import without_numbers
from optimorph._routing.layer_widths import is_inside, layer_name, number_of, sides_of
from optimorph._routing.leaf_spec import HEAD, INFERRED_HEAD, LeafSpec, unresolved
from optimorph._routing.name_patterns import WEIGHT
from optimorph._routing.names import outputs_first

_PARTS = range(2, 9)

_QKV = re.compile(rf"(?<![^/.])(w?qkv(_proj)?|query_key_value)[/.]{WEIGHT}$")
"""A name of query, key and value in one leaf, one after the other."""

_ONE = re.compile(r"(^|[/_])w?(q|k|v|kv|query|key|value)(_\w+)?$", re.IGNORECASE)
"""A name of one layer of attention, however wide."""


def with_fused_layers(
    paths: Sequence[str], shapes: Sequence[Shape], specs: Sequence[LeafSpec]
) -> list[LeafSpec]:
    """The specs with a question for each layer that may be several layers side by side.

    Query, key and value, a gate and its input, or several modulations share one leaf. No other leaf of its
    module takes in all of its outputs, but one takes in a half of them, or a third, ..., or an eighth, or two
    take in a query and the hidden numbers of a perceptron. Either no leaf of the tree takes in all, or none
    of the module puts out the part. The last of several numbered layers is more likely a single one.
    """
    sides = [*map(sides_of, paths, shapes, specs)]
    taken = set[int]().union(*(inputs for inputs, _ in sides))
    read = [k for k, spec in enumerate(specs) if spec.axes or spec.role in (HEAD, INFERRED_HEAD)]
    names = {k: layer_name(paths[k].replace(".", "/")) for k in read}
    takers: dict[tuple[str, int], set[int]] = {}
    givers: dict[tuple[str, int], set[int]] = {}
    inside: dict[str, list[int]] = {}
    for k, module in names.items():
        while module := module.rpartition("/")[0]:
            inside.setdefault(module, []).append(k)
            for widths, layers in zip(sides[k], (takers, givers), strict=True):
                for width in widths:
                    layers.setdefault((module, width), set()).add(k)

    def follows(k: int, module: str, width: int) -> bool:
        """Whether no layer before it takes in the width."""
        same = [j for j in takers[module, width] if without_numbers(names[j]) == without_numbers(names[k])]
        return all(number_of(names[j]) > number_of(names[k]) for j in same)

    def is_last(k: int) -> bool:
        """Whether it is the last of several numbered layers of its module."""
        module, kind = names[k].rpartition("/")[0], without_numbers(names[k])
        numbers = [number_of(names[j]) for j in inside[module] if without_numbers(names[j]) == kind]
        return number_of(names[k]) == max(numbers) > min(numbers)

    def equal_parts(k: int, module: str) -> list[int]:
        """Of how many equal parts its outputs may be, by what other layers of a module take in."""
        width = max(sides[k][1])
        return [n for n in _PARTS if width % n == 0 and takers.get((module, width // n), {k}) != {k}]

    def parts(k: int) -> str | None:
        """The blocks of its outputs."""
        module, width = names[k].rpartition("/")[0], max(sides[k][1])
        if takers.get((module, width), {k}) != {k}:
            return None
        equal = equal_parts(k, module)
        if width in taken:
            inner = [n for n in equal if (module, width // n) not in givers]
            equal = [n for n in inner if n < 5 and follows(k, module, width // n)]
        elif not equal and module:
            widths = {n for j in inside[module] if j != k for n in sides[j][0]}
            inner = {n for n in widths if (module, n) not in givers}
            if blocks := _attention_and_perceptron(width, widths, inner):
                return blocks
            equal = equal_parts(k, module.rpartition("/")[0]) if is_last(k) else []
        return f"{equal[0]}o" if equal else None

    def feeds_one_beside(k: int) -> bool:
        """Whether the only other layer of its module follows it and takes in a half of its outputs."""
        module = names[k].rpartition("/")[0]
        beside = [j for j in inside.get(module, ()) if j != k]
        if len(beside) != 1 or number_of(names[beside[0]]) < number_of(names[k]):
            return False
        return max(sides[k][1]) in {2 * n for n in sides[beside[0]][0]}

    fused = {
        k: blocks
        for k, name in names.items()
        if specs[k].role in ("dense", "experts") and _spec(specs[k]).strip("b") in ("io", "oi")
        if (is_inside(paths[k]) or feeds_one_beside(k)) and not _ONE.search(name) and (blocks := parts(k))
    }
    found = list(specs)
    for k, blocks in fused.items():
        spec = _spec(specs[k])
        answers = [spec.replace("o", f"({blocks})"), spec][:: -1 if is_last(k) else 1]
        cause = "may be several layers side by side, by its width"
        found[k] = unresolved(paths[k], shapes[k], cause, first=answers)
    for k, spec in enumerate(specs):
        asked = spec.unresolved and not spec.layout and len(shapes[k]) == 2
        if asked and (of := _QKV.search(paths[k].lower())):
            outputs = 0 if outputs_first(paths[k]) else 1
            widths = {n for j in inside.get(paths[k][: of.start()].rstrip("/."), ()) for n in sides[j][0]}
            if blocks := _attention_and_perceptron(shapes[k][outputs], widths, {0}):
                first = f"i({blocks})" if outputs else f"({blocks})i"
                found[k] = spec._replace(answers=tuple(dict.fromkeys([first, *spec.answers])))
    return found


def _attention_and_perceptron(width: int, taken: set[int], inner: set[int]) -> str | None:
    """The blocks of a query, a key, a value, and a perceptron's input and gate, if they make up `width`.

    Args:
      width: of all of them.
      taken: what the layers beside them take in: the query's width is one of these.
      inner: those that no other layer puts out: the perceptron's width is one of these; 0 for none.
    """
    for query, hidden, times in itertools.product(sorted(taken), sorted(inner), (2, 1)):
        key, odd = divmod(width - query - times * hidden, 2)
        if query == key and not hidden:
            return "3o"
        if not odd and 0 < key <= query and query % key == 0 and query != hidden:
            return "+".join(map(str, filter(None, (query, key, key, *[hidden] * times)))) + " o"
    return None


def _spec(spec: LeafSpec) -> str:
    return "" if spec.axes is None else spec.axes.spec
