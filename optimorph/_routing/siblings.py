"""What the other leaves of a tree tell of a leaf: which axis counts layers, and which counts experts."""

import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from optimorph._core.types import Shape
from optimorph._routing.grouping import group_by, module_of, numbers_in, parents, without_numbers
from optimorph._routing.name_patterns import WEIGHT
from optimorph._routing.names import outputs_first, sides

_DOWN = re.compile(r"(down|wo|w_?2|out|fc_?2|c_proj|output)(_|/|\d*$)")
"""The layer of a perceptron whose outputs are as wide as the model."""

_UP = re.compile(r"(^|/)(up|gate|w_?[13]|wi|in|fc_?1)(_\w+)?$")
"""The first layers of a perceptron."""

_FACTOR = re.compile(
    r"((?<![A-Za-z0-9])[abAB]|(?<=lora_|lora/|pter_|pter/)(down|up))(?=(/\w+){0,2}$)|(?<=/[a-vx-z])[12]$"
)
_GATE = re.compile(rf"(^|[/.])\w*gate([/.]{WEIGHT})?$")
SEVERAL = re.compile(r"gate_?(and_?)?up|up_?gate")
"""A name of a gate and its input in one leaf."""

_EXPERTS = re.compile(r"(^|/)experts/(?!\d)", re.IGNORECASE)
"""A module with all experts, and not one of them."""

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
    heads = {(module_of(path), shapes[path][1:]) for path in attention if len(shapes[path]) == 3}
    for path, shape in shapes.items():
        module, _, name = path.replace(".", "/").rpartition("/")
        kernel = shapes.get(path[:-1] + "w", ()) if name == "b" else ()
        of_kernel = len(kernel) > len(shape) > 1 and path[:-1] + "a" not in shapes
        if of_kernel or (name in ("u", "v") and (module, shape) in heads):
            yield path


def stems(paths: Sequence[str], shapes: Sequence[Shape], roles: Sequence[str]) -> Iterator[tuple[int, Shape]]:
    """The layers of patches of an image whose outputs a convolution takes in, with their shapes if 3 x 3.

    A model of patches has dense layers behind them; such a layer is the first of several convolutions.
    """
    images = [k for k, shape in enumerate(shapes) if len(shape) == 4]
    first = {k: outputs_first(paths[k]) for k in images}
    windows = {k: shapes[k][2:] if first[k] else shapes[k][:2] for k in images}
    layers = [k for k in images if roles[k] in ("convolution", "dense") and max(windows[k]) > 1]
    taken = {sides(paths[k], shapes[k])[0] for k in layers}
    for k in images:
        if roles[k] == "embedding" and sides(paths[k], shapes[k])[1] in taken:
            yield k, (*shapes[k][:2], 3, 3) if first[k] else (3, 3, *shapes[k][2:])


def pairs_of_tables(paths: Sequence[str], shapes: Sequence[Shape], asked: set[int]) -> Iterator[int]:
    """The arrays whose module has one other, of as many columns, that is asked about: both may be tables."""
    for pair in group_by(range(len(paths)), lambda k: paths[k].rpartition("/")[0]):
        columns = {shapes[k][1] if len(shapes[k]) == 2 else None for k in pair}
        if len(pair) == 2 and len(columns) == 1 and None not in columns and not asked.isdisjoint(pair):
            yield from {*pair} - asked


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
    modules = [(module_of(paths[k]), k) for k in heads]
    for module in group_by(heads, lambda k: module_of(paths[k])):
        own = module_of(paths[module[0]]) + "/"
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
    yield from (k for k in square if (module_of(paths[k]), shapes[k][:1]) in norms)
    biases = {path: shape for path, shape in zip(paths, shapes, strict=True) if path.endswith("/bias")}
    for k in square:
        if max(biases.get(f"{module_of(paths[k])}/bias", ()), default=0) > shapes[k][0]:
            yield k
    dense = [k for k, shape in enumerate(shapes) if len(shape) == 2 and shape[0] > 16]
    taken = {sides(paths[k], shapes[k])[0] for k in dense}
    windows = [k for k in heads if len(shapes[k]) > 3]
    for k in windows:
        inputs, outputs = sides(paths[k], shapes[k])
        if outputs in taken or outputs >= 4 * inputs > 64:
            yield k


def expert_spec(
    path: str, shape: Shape, routers: Mapping[str, Sequence[Shape]], widths: Collection[int]
) -> str | None:
    """The spec of a leaf that has one expert for each output of a router beside it; None of other leaves.

    The last layer of an expert has as many outputs as the model is wide, and the others as many inputs. Where
    both sides are so many, or the name of the layer tells no place in a perceptron, the name of the array
    tells which are first. In a leaf of two axes, of which the first is far longer, or longer in a module of
    all experts, the experts lie one after the other.

    Args:
      path: of the leaf.
      shape: without an axis of layers.
      routers: module → the shapes of the routers in it or beside it, likewise.
      widths: of the norms.
    """
    if len(shape) not in (2, 3) or SEVERAL.search(path):
        return None
    first = outputs_first(path)
    name = re.sub(rf"/{WEIGHT}$", "", path)
    down = _DOWN.search(name.rpartition("/")[2]) is not None
    near = [router for module in parents(path) for router in routers.get(module, ())]
    if len(shape) == 2:
        rows, width = shape
        several = rows > width if _EXPERTS.search(path) else rows >= 16 * width
        counts = {sum(router) - width for router in near if width in router}
        fitting = [n for n in counts if n and rows % n == 0 and several]
        return ("({}i)o" if down else "({}o)i").format(fitting[0]) if fitting else None
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
        if any((module_of(path.replace(".", "/")), n) in counts for n in shapes[path]):
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


def routers_of_modules(routers: Mapping[str, Shape]) -> dict[str, list[Shape]]:
    """Module → the shapes of routers of two axes that are in it, or are modules of it.

    Args:
      routers: path → shape, without an axis of layers.
    """
    found: dict[str, list[Shape]] = {}
    for path, shape in routers.items():
        path = path.replace(".", "/")
        for module in {module_of(path), re.split(r"/[^/]*router", path)[0]} if len(shape) == 2 else ():
            found.setdefault(module, []).append(shape)
    return found
