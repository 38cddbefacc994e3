"""What the other leaves of a tree tell of a leaf: which axis counts layers, and which counts experts."""

import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from optimorph._core.types import Shape
from optimorph._routing.grouping import group_by, numbers_in, without_numbers
from optimorph._routing.name_patterns import WEIGHT
from optimorph._routing.names import outputs_first, sides

_DOWN = re.compile(r"(down|wo|w_?2|out|fc_?2|c_proj|output)(_|/|\d*$)")
"""The layer of a perceptron whose outputs are as wide as the model."""

_UP = re.compile(r"(^|/)(up|gate|w_?[13]|wi|in|fc_?1)(_\w+)?$")
"""The first layers of a perceptron."""

_FACTOR = re.compile(
    r"((?<![A-Za-z0-9])[abAB]|(?<=lora_|lora/|pter_|pter/)(down|up))(?=(/\w+){0,2}$)|(?<=/[a-vx-z])[12]$"
)
_NUMBER = re.compile(r"(?<![^/.])\d+$")
_ARRAY = re.compile(rf"{_NUMBER.pattern}|\d[/.]\w+_weight$")
"""An array of a list, or of a layer of one, whose name does not tell which side is first."""

_IN_LIST = re.compile(r"[/.]\d+[/.]weight$")
_GATE = re.compile(rf"(^|[/.])\w*gate([/.]{WEIGHT})?$")
SEVERAL = re.compile(r"gate_?(and_?)?up|up_?gate")
"""A name of a gate and its input in one leaf."""

_EXPERTS = re.compile(r"(^|/)experts/(?!\d)", re.IGNORECASE)
"""A module with all experts, and not one of them."""

_FIRST = re.compile(r"(?<![^/.])(?P<name>linear1|fc1|w1|wi|w3|(up|gate)(_proj)?)(_\d)?(?=[/.]weight$)")
_LAST = {"linear1": "linear2", "fc1": "fc2", "wi": "wo", "w1": "w2", "w3": "w2"} | {
    name + end: "down" + end for name in ("up", "gate") for end in ("", "_proj")
}
"""The name of the first layer of a perceptron → that of the last."""

_IN_WEIGHT = re.compile(r"[/.]weight[/.][^/.]+$")
"""The name of a part of a `weight`, whose outputs are first."""

_TWIN = {"a": "b", "b": "a", "A": "B", "B": "A", "down": "up", "up": "down", "1": "2", "2": "1"}
"""The names of two factors of a matrix."""


def arrays_beside_modules(paths: Sequence[str]) -> Iterator[str]:
    """The arrays without names in lists that also have modules: one of these is an embedding."""
    lists = {found[1] for path in paths if (found := re.search(r"^(|.*/)\d+/[^/]+$", path))}
    yield from (path for path in paths if re.sub(r"\d+$", "", path) in lists and path[-1:].isdigit())


def biases_of_layers(shapes: Mapping[str, Shape], attention: Collection[str]) -> Iterator[str]:
    """The leaves with several axes that are biases: a `b` beside a `w` of more axes, and biases of heads.

    Args:
      shapes: of all leaves, without an axis of layers.
      attention: the paths of leaves of attention.
    """
    heads = {(_grandparent(path), shapes[path][1:]) for path in attention if len(shapes[path]) == 3}
    for path, shape in shapes.items():
        module, _, name = path.replace(".", "/").rpartition("/")
        kernel = shapes.get(path[:-1] + "w", ()) if name == "b" else ()
        of_kernel = len(kernel) > len(shape) > 1 and path[:-1] + "a" not in shapes
        if of_kernel or (name in ("u", "v") and (module, shape) in heads):
            yield path


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
    found = {
        (_grandparent(path), shapes[path]) for path in layers if sides(path, shapes[path])[0] in features
    }
    yield from (path for path in matrices if (_grandparent(path), shapes[path]) in found)


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
        stacked = own == (*shape[:1], *shape[-1:]) or (len(bias) > 1 and bias[0] == shape[0])
        if not bias or others < 1 or stacked:
            continue
        usual = 0 if outputs_first(path) else others
        places = [k for k in range(others + 1) if shape[k : k + len(bias)] == bias]
        if usual in places or len(places) == 1:
            k = usual if usual in places else places[0]
            found[path] = "i" * k + "o" * len(bias) + "i" * (others - k)
            if len(bias) > 1 or len(shape) != 3:  # attention's output may have the shape of its queries
                alike[_grandparent(path), shape] = found[path]
    keys = {path: (_grandparent(path), shape) for path, shape in shapes.items() if path not in found}
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
    """Path → spec of matrices without telling names in lists, if all biases agree, or of those without all widths.

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


_NORM = re.compile(r"/(\w*norm|ln)(_\w+)?/(weight|scale)$", re.IGNORECASE)
"""The end of the path of a norm's weight."""


_NETWORK = re.compile(
    r"^((.*/)?(\w+_)?heads?(_?\d+)?/)(.*/)?\w*(transformer|attention|attn|layer_stack)", re.IGNORECASE
)


_PROJECTION = re.compile(r"^(.*/)?(query|key|value|q|k|v)_heads?(?=[/.])", re.IGNORECASE)


def networks_called_heads(paths: Sequence[str], heads: Sequence[int]) -> Iterator[int]:
    """The leaves of modules that are called heads and have attention in them, or are parts of it.

    The projections of queries, keys and values may be called heads; two of them are in one module.
    """
    modules = {found[1] for path in paths if (found := _NETWORK.search(path))}
    yield from (k for k in heads if any(map(paths[k].startswith, modules)))
    parts = {k: found for k in heads if (found := _PROJECTION.search(paths[k]))}
    for module in group_by(parts, lambda k: parts[k][1]):
        if len({parts[k][2] for k in module}) > 1:
            yield from module


def hidden_of_heads(paths: Sequence[str], shapes: Sequence[Shape], heads: Sequence[int]) -> Iterator[int]:
    """The layers of a head before its last: those whose outputs another layer of the head takes in.

    In lists and of layers with numbers, that is the one with the next number. The other layer may be in a
    module around that of the first. Of a convolution it may be any dense layer. A square layer beside a norm
    is one too, as in heads whose last layer is the embedding; so is one whose head has more biases than it
    has outputs.
    """

    def feeds(k: int, other: int) -> bool:
        matrices = min(len(shapes[k]), len(shapes[other])) > 1
        return matrices and sides(paths[k], shapes[k])[1] == sides(paths[other], shapes[other])[0]

    for chain in group_by(heads, lambda k: without_numbers(paths[k])):
        chain.sort(key=lambda k: numbers_in(paths[k]))
        side_by_side = "heads/" in paths[chain[0]] and feeds(chain[-1], chain[-1])
        yield from (k for k, after in itertools.pairwise(chain) if feeds(k, after) and not side_by_side)
    modules = [(_grandparent(paths[k]), k) for k in heads]
    for module in group_by(heads, lambda k: _grandparent(paths[k])):
        own = _grandparent(paths[module[0]]) + "/"
        beside = re.sub(
            r"(heads/)\w+_head/$", r"\1", own
        )  # parts of one head, such as box_head and box_predictor
        around = [
            k
            for name, k in modules
            if name and (own.startswith(f"{name}/") or (beside != own and name.startswith(beside)))
        ]
        last = [k for k in around if not any(feeds(k, other) for other in around)]
        yield from (k for k in module if any(feeds(k, end) for end in last))
    norms = {(_NORM.sub("", path), shapes[k]) for k, path in enumerate(paths) if _NORM.search(path)}
    square = [k for k in heads if len(shapes[k]) == 2 and feeds(k, k)]
    yield from (k for k in square if (_grandparent(paths[k]), shapes[k][:1]) in norms)
    biases = {path: shape for path, shape in zip(paths, shapes, strict=True) if path.endswith("/bias")}
    for k in square:
        if max(biases.get(f"{_grandparent(paths[k])}/bias", (0,))) > shapes[k][0]:
            yield k
    dense = [k for k, shape in enumerate(shapes) if len(shape) == 2 and shape[0] > 16]
    taken = {sides(paths[k], shapes[k])[0] for k in dense}
    windows = [k for k in heads if len(shapes[k]) > 3]
    for k in windows:
        inputs, outputs = sides(paths[k], shapes[k])
        if outputs in taken or outputs >= 4 * inputs > 64:
            yield k


def expert_spec(
    path: str, shape: Shape, routers: Sequence[tuple[str, Shape]], widths: Collection[int]
) -> str | None:
    """The spec of a leaf that has one expert for each output of a router beside it; None of other leaves.

    The last layer of an expert has as many outputs as the model is wide, and the others as many inputs. Where
    both sides are so many, or the name tells no place in a perceptron, that of the array tells which are first. In a leaf of two axes, of which the
    first is far longer, or longer in a module of all experts, the experts lie one after the other.

    Args:
      path: of the leaf.
      shape: without an axis of layers.
      routers: paths and shapes of the tree's routers, likewise.
      widths: of the norms.
    """
    if len(shape) not in (2, 3) or SEVERAL.search(path):
        return None
    first = outputs_first(path)
    name = re.sub(rf"/{WEIGHT}$", "", path)
    down = _DOWN.search(name.rpartition("/")[2]) is not None
    near = [router for other, router in routers if len(router) == 2 and _is_beside(path, other)]
    if len(shape) == 2:
        rows, width = shape
        several = rows > width if _EXPERTS.search(path) else rows >= 16 * width
        counts = {sum(router) - width for router in near if width in router}
        count = next((n for n in counts if n and rows % n == 0 and several), None)
        return count and ("({}i)o" if down else "({}o)i").format(count)
    models = {sum(router) - shape[0] for router in near if shape[0] in router}
    fits = [size in (models or widths) for size in shape[1:]]
    known = fits[0] != fits[1] and (down or _UP.search(name) is not None)
    if known:
        first = fits[0] == down
    beside = fits[down != first] if models else known and _EXPERTS.search(path) is not None
    return ("boi" if first else "bio") if beside else None


def routers_of_experts(shapes: Mapping[str, Shape], experts: Collection[str]) -> Iterator[str]:
    """The gates that have one row or column for each of the experts in their module.

    Args:
      shapes: of all leaves, without an axis of layers.
      experts: the paths of experts.
    """
    counts = {(name, shapes[path][0]) for path in experts if len(shapes[path]) == 3 for name in parents(path)}
    for path in [path for path, shape in shapes.items() if len(shape) == 2 and _GATE.search(path)]:
        if any((_grandparent(path.replace(".", "/")), n) in counts for n in shapes[path]):
            yield path


def low_rank_spec(path: str, shape: Shape, shapes: Mapping[str, Shape]) -> str | None:
    """The spec of one of two factors of a matrix, such as `lora_A` and `lora_B`; None of other leaves.

        (*batch, *inputs, rank) and (*batch, rank, *outputs), or
        (*batch, rank, *inputs) and (*batch, *outputs, rank)

    The rank is at most half of the inputs and of the outputs. Where several readings fit, none is taken.

    Args:
      path: of the leaf.
      shape: without an axis of layers.
      shapes: of all leaves, likewise.
    """
    if (found := _FACTOR.search(path)) is None:
        return None
    beside = {
        name: path[: found.start()] + name + path[found.end() :] for name in ("c", "C", _TWIN[found[0]])
    }
    other = shapes.get(beside.pop(_TWIN[found[0]]), ())
    if any(name in shapes for name in beside.values()):  # matrices of a state space
        return None
    is_first = found[0].lower() in ("a", "down", "1")
    specs = {pair[not is_first] for pair in _factors(*((shape, other) if is_first else (other, shape)))}
    spec = specs.pop() if len(specs) == 1 else None
    return spec.replace("io", "oi") if spec and _IN_WEIGHT.search(path) else spec


def _factors(a: Shape, b: Shape) -> Iterator[tuple[str, str]]:
    """How two factors may read."""
    for n in range(min(len(a), len(b)) - 1):
        m, k = len(a) - n - 1, len(b) - n - 1
        if a[:n] != b[:n] or min(m, k) > 1:
            continue
        if a[-1] == b[n] and 2 * a[-1] <= min(math.prod(a[n:-1]), math.prod(b[n + 1 :])):
            yield "b" * n + "i" * m + "o", "b" * n + "i" + "o" * k
        if a[n] == b[-1] and 2 * a[n] <= min(math.prod(a[n + 1 :]), math.prod(b[n:-1])):
            yield "b" * n + "o" + "i" * m, "b" * n + "o" * k + "i"


def _is_beside(path: str, router: str) -> bool:
    """Whether a leaf is in the module that has the router."""
    return path.startswith((_grandparent(router), re.split(r"/[^/]*router", router)[0] + "/"))


def _grandparent(path: str) -> str:
    """The module that has the layer of a leaf."""
    module = path.rpartition("/")[0] if re.search(r"/(kernel|w|weights?)$", path) else path
    return module.rpartition("/")[0]


def parents(path: str) -> Iterator[str]:
    """The modules that a leaf is in, the innermost first."""
    path = path.replace(".", "/")
    while path:
        path = path.rpartition("/")[0]
        yield path
