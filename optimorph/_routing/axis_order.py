"""What biases, widths and neighbours tell of a leaf's axes: which are inputs, and which are outputs."""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping

from optimorph._core.types import Shape
from optimorph._routing.grouping import group_by, module_of, numbers_in, without_numbers
from optimorph._routing.name_patterns import WEIGHT
from optimorph._routing.names import outputs_first, sides

_NUMBER = re.compile(r"(?<![^/.])\d+$")
_ARRAY = re.compile(rf"{_NUMBER.pattern}|\d[/.]\w+_weight$")
"""An array of a list, or of a layer of one, whose name does not tell which side is first."""

_C_PROJ = re.compile(r"attn[/.]c_proj[/.]")
_IN_LIST = re.compile(r"[/.]\d+[/.]weight$")
_FIRST = re.compile(r"(?<![^/.])(?P<name>linear1|fc1|w1|wi|w3|(up|gate)(_proj)?)(_\d)?(?=[/.]weight$)")
_LAST = {"linear1": "linear2", "fc1": "fc2", "wi": "wo", "w1": "w2", "w3": "w2"} | {
    name + end: "down" + end for name in ("up", "gate") for end in ("", "_proj")
}
"""The name of the first layer of a perceptron → that of the last."""


def projections_of_embeddings(shapes: Mapping[str, Shape], embeddings: Collection[str]) -> Iterator[str]:
    """The layers called embeddings that have biases and take in the features of tables.

    So does one without a bias that has the shape of one in the same module.

    Args:
      shapes: of all leaves, without an axis of layers.
      embeddings: the paths of embeddings.
    """
    matrices = [path for path in embeddings if len(shapes[path]) == 2]
    layers = [path for path in matrices if shapes.get(_bias_of(path)) == (sides(path, shapes[path])[1],)]
    features = {shapes[path][1] for path in {*matrices} - {*layers} if shapes[path][0] > shapes[path][1]}
    found = {(module_of(path), shapes[path]) for path in layers if sides(path, shapes[path])[0] in features}
    yield from (path for path in matrices if (module_of(path), shapes[path]) in found)


def specs_by_bias(shapes: Mapping[str, Shape]) -> tuple[dict[str, str], dict[str, str]]:
    """Path → the spec that the bias of its layer tells: its axes are the outputs, all others inputs.

    Where they may be several, the outputs are the last, or of a `weight` the first. A bias that may be
    stacked tells nothing.

    Args:
      shapes: of all leaves, without an axis of layers.

    Returns:
      of layers with a bias; and of those without one, beside one of the same shape in the same module.
    """
    found, alike = {}, {}
    for path, shape in shapes.items():
        own = shapes.get(_bias_of(path), ())
        if len(shape) == 3 and 1 not in shape and own == (shape[0] * shape[2],) != shape[1:2]:
            found[path] = "bio"  # layers side by side, whose biases lie one after the other
            continue
        of_heads = len(own) < len(shape) and own == shape[-len(own) :]
        bias = own if of_heads else tuple(n for n in own if n > 1)
        others = len(shape) - len(bias)
        stacked = own == (*shape[:1], *shape[-1:]) or (len(bias) > 1 and bias[:1] == shape[:1])
        if not bias or others < 1 or stacked:
            continue
        usual = 0 if outputs_first(path) else others
        places = [k for k in range(others + 1) if shape[k : k + len(bias)] == bias]
        if usual in places or len(places) == 1:
            k = usual if usual in places else places[0]
            found[path] = "i" * k + "o" * len(bias) + "i" * (others - k)
            if len(bias) > 1 or len(shape) != 3:  # attention's output may have the shape of its queries
                alike[module_of(path), shape] = found[path]
    keys = {path: (module_of(path), shape) for path, shape in shapes.items() if path not in found}
    return found, {path: alike[key] for path, key in keys.items() if key in alike}


def specs_by_chain(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Path → inputs before outputs, of a `weight` in a list of three or more layers that fit only so.

    Each layer then takes in the outputs of the one before it. Convolutions are transposed ones.

    Args:
      shapes: of all leaves, without an axis of layers.
    """
    weights = [path for path, shape in shapes.items() if _IN_LIST.search(path) and len(shape) in (2, 4)]
    found = {}
    for chain in group_by(weights, lambda path: (without_numbers(path), len(shapes[path]))):
        chain.sort(key=numbers_in)
        pairs = [(shapes[one], shapes[after]) for one, after in itertools.pairwise(chain)]
        if len(pairs) > 1 and all(a[1] == b[0] for a, b in pairs) and any(a[0] != b[1] for a, b in pairs):
            found |= dict.fromkeys(chain, "io" + "ii"[: len(shapes[chain[0]]) - 2])
    return found


def specs_in_lists(shapes: Mapping[str, Shape]) -> tuple[dict[str, str], dict[str, str | None]]:
    """Path → spec of matrices without telling names in lists, if all biases agree; without these, all widths.

    By the widths each matrix of a list takes in the outputs of the one before it.

    Args:
      shapes: of all leaves, without an axis of layers.

    Returns:
      what is certain; and of other lists what is likelier: how most matrices fit, and None of one whose
      outputs the next does not take in.
    """
    certain, likely = {}, {}
    arrays = [path for path, shape in shapes.items() if len(shape) == 2 and _ARRAY.search(path)]
    biases = {path: shapes[bias] for path in arrays if len(shapes.get(bias := _bias_of(path), ())) == 1}
    sides = [(shapes[path], own) for path, own in biases.items() if len({*shapes[path]}) > 1]
    by_bias = {"oi" if own == shape[:1] else "io" for shape, own in sides if own[0] in shape}
    if len(by_bias) == 1:
        certain = dict.fromkeys(biases, by_bias.pop())
    for group in group_by([path for path in arrays if path not in certain], without_numbers):
        group.sort(key=numbers_in)
        pairs = [(shapes[one], shapes[after]) for one, after in itertools.pairwise(group)]
        fits = {"io": [a[1] == b[0] for a, b in pairs], "oi": [a[0] == b[1] for a, b in pairs]}
        told = [spec for spec, fit in fits.items() if pairs and all(fit)]
        best = max(fits, key=lambda spec: sum(fits[spec]))
        if len(told) == 1:
            certain |= dict.fromkeys(group, told[0])
        elif sum(fits["io"]) != sum(fits["oi"]):
            fitting = [*fits[best], False]
            likely |= {path: best if fit else None for path, fit in zip(group, fitting, strict=True)}
    return certain, likely


def specs_beside_fused(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Path → spec of GPT-2's square `c_proj`, whose `c_attn` has query, key and value on the side of outputs.

    Args:
      shapes: of all leaves, without an axis of layers.
    """
    found = {}
    for path in [path for path, shape in shapes.items() if shape and _C_PROJ.search(path)]:
        n, fused = shapes[path][0], shapes.get(path.replace("c_proj", "c_attn"))
        if shapes[path] == (n, n) and fused in ((n, 3 * n), (3 * n, n)):
            found[path] = "io" if fused[0] == n else "oi"
    return found


def specs_by_pair(shapes: Mapping[str, Shape], widths: Collection[int]) -> dict[str, str]:
    """Path → spec of the first and the last layer of perceptrons whose order only their widths tell.

    Of a `weight` without a bias, the inner width is the larger, and only the other one is that of norms.
    Gemma's gate and input have as outputs what their `linear`, (inputs, outputs), takes in.

    Args:
      shapes: of all leaves, without an axis of layers.
      widths: of the norms.
    """
    found = {}
    for path, shape in shapes.items():
        sides, linear = shape[-2:], shapes.get(path.replace("gating_einsum", "linear"), ())[-2:]
        if "gating_einsum" in path and len(shape) > 2 and sides in (linear, linear[::-1]):
            found[path] = "b" * (len(shape) - 2) + ("oi" if sides == linear else "io")
        first = _FIRST.search(path)
        if first is None or len(shape) != 2:
            continue
        last = path[: first.start()] + _LAST[first["name"]] + path[first.end() :]
        if shapes.get(last) == sides[::-1] and min(sides) in widths and max(sides) not in widths:
            found |= dict.fromkeys((path, last), "io" if sides[0] < sides[1] else "oi")
    return found


def _bias_of(path: str) -> str:
    """The path of the bias of a layer, of that of its matrix."""
    found = re.search(rf"(?<![^/.]){WEIGHT}$", path)
    if found is None:
        number = _NUMBER.search(path)
        return f"{path}_bias" if number is None else f"{path[: number.start()]}{int(number[0]) + 1}"
    return path[: found.start()] + ("b" if found[0] == "w" else "bias")
