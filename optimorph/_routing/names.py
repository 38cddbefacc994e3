"""What a leaf is by default: the first of `name_rules.RULES` that matches its path and shape."""

import re
from collections.abc import Sequence
from functools import cache, lru_cache

from optimorph._core.types import Shape
from optimorph._routing.name_rule import UNDECIDED, NameRule
from optimorph._routing.name_rules import RULES
from optimorph._routing.shape_conditions import is_window
from optimorph.linalg import Axes

STACK = re.compile(r"(^|/)(scan(ned)?(_\w+)?|\w*Scan[A-Z]\w*|Vmap[A-Z]\w*|stacked|\w*layer_stack\w*)/")
MAYBE_STACK = re.compile(
    r"(^|/)(\w+_)?(layers|blocks|stages)/(?!\d|(layer|block|stage)s?[_/]?\d)", re.IGNORECASE
)
"""Names of modules that may be stacks of layers."""

_ANY_STACK = re.compile(r"(^|/)(\w+_)?(layers|blocks|stages)/(?!\d|blocks/)", re.IGNORECASE)

UNSTACKED = -1
"""The axis of layers of a leaf that has none."""

_OF_LINEN = re.compile(r"(^|/)(?!\w*(Norm|Embed))[A-Z][A-Za-z0-9]*_\d+/weight$")
"""A `weight` of a module that Flax numbers: unlike those of PyTorch and Equinox it has inputs first."""

_WRAPPED = re.compile(
    r"(?<=[^/.])[/.](?:base_|orig_|inner_|wrapped_?)?layer([/.](?:kernel|weight|w|bias|b))$"
)
"""The name of a layer in a module that has no other, and the name of its array."""

_MATRIX_NAME = re.compile(r"(^|/)(kernel|w|[wW]_?h?h)$")  # of two axes a matrix, no stack of vectors


def by_name(path: str, shape: Shape, layers: int | None = None) -> tuple[str, str | None]:
    """A leaf's role and spec. The spec is None if the leaf is not a matrix, `UNDECIDED` if it is ambiguous.

    Names are separated by dots or slashes. Rules see every number as 0.

    Args:
      path: the leaf's keys.
      shape: the leaf's shape.
      layers: the axis that counts layers, or `UNSTACKED`; None if only the names may tell.
    """
    role, spec = _by_name(_normal(path, layers), without_layers(shape, layers))
    return role, with_layers(spec, layers)


def unwrapped(path: str) -> str:
    """The path without the name of the array in a named array, as Haliax has them, or of a wrapped layer."""
    path = re.sub(r"(?<=[^/.])[/.]array$", "", path)
    return _WRAPPED.sub(r"\1", path)


def outputs_first(path: str) -> bool:
    """Whether the axis of outputs is the first, by the name of a leaf: that of a `weight`."""
    return path.endswith("weight") and not _OF_LINEN.search(path.replace(".", "/"))


def sides(path: str, shape: Shape) -> tuple[int, int]:
    """A layer's numbers of inputs and outputs, by the name of its leaf."""
    return (shape[:2][-1], shape[0]) if outputs_first(path) else (shape[-2:][0], shape[-1])


def offers(path: str, shape: Shape, layers: int | None = None) -> tuple[list[str | None], str]:
    """What the rule that leaves a leaf `UNDECIDED` takes for likely, and its layout."""
    single = without_layers(shape, layers)
    rule = _deciding(_normal(path, layers), single)
    specs: Sequence[str | None] = ()
    if rule.specs[:1] == (UNDECIDED,):
        specs = rule.specs[1:]
    elif rule.role == "attention" and len(single) > 3 and not is_window(single[:2], 3):
        _, spec = by_name(path, single[1:], layers and UNSTACKED)
        found = offers(path, single[1:])[0] if spec == UNDECIDED else [spec]
        specs = [spec and f"b{spec}" for spec in found]
    heads = max(min(single) // 64, 1)  # most models' heads have 64 numbers
    return [with_layers(spec and spec.replace("HEADS", str(heads)), layers) for spec in specs], (
        rule.layout.replace("HEADS", str(heads))
    )


@lru_cache(maxsize=1 << 16)
def _deciding(path: str, shape: Shape) -> NameRule:
    return next(rule for rule in RULES if _match(rule, path, shape) is not None)


def without_layers(shape: Shape, layers: int | None) -> Shape:
    """A shape without its axis of layers."""
    return shape if layers is None or layers == UNSTACKED else shape[:layers] + shape[layers + 1 :]


def with_layers(spec: str | None, layers: int | None) -> str | None:
    """A spec of one layer, as that of a stack of layers."""
    if spec in (None, UNDECIDED) or layers is None or layers == UNSTACKED:
        return spec
    axes = [*map(str, Axes(spec).parts)]
    return "".join([*axes[:layers], "b", *axes[layers:]])


@lru_cache(maxsize=1 << 16)
def _normal(path: str, layers: int | None) -> str:
    """A path as rules see it: where siblings tell of layers, their names do not."""
    path = unwrapped(path).replace(".", "/").replace("/~/", "/")  # Haiku's ~ is no module
    path = re.sub(r"(?<![^/])(attn|attention|mlp|ffn?)_(?=[wW]\w*$)", r"\1/", path)  # a flat name
    path = re.sub(r"\[[\d,]+\][^/]*$", "", path)  # one of several arrays, as e3nn names them
    path = re.sub(r"/weight(/(weight|args|value))*(/0)+$", "/weight", re.sub(r"\d+", "0", path))  # wrapped
    path = re.sub(r"weight$", "kernel", path) if _OF_LINEN.search(path) else path
    return path if layers is None else _ANY_STACK.sub(r"\g<0>0/", STACK.sub(r"\1blocks/0/", path))


@lru_cache(maxsize=1 << 16)
def _by_name(path: str, shape: Shape) -> tuple[str, str | None]:
    return next(match for rule in RULES if (match := _match(rule, path, shape)) is not None)


def _match(rule: NameRule, path: str, shape: Shape) -> tuple[str, str | None] | None:
    """The role and spec by one rule; None if it does not match. The last rule matches every leaf."""
    pattern, not_in = _compiled(rule.pattern, rule.not_in)
    lower = path.lower()
    if not pattern.search(lower) or not_in.search(lower):
        return None
    if not rule.specs and rule.when(shape):
        return rule.role, None
    if rule.specs and sum(size > 1 for size in shape) < 2:
        return "vector", None
    specs = [] if UNDECIDED in rule.specs else _specs(rule, path, shape)
    fits = len(specs) == 1 and Axes(specs[0]).misfit(shape) is None
    if fits and all(1 in stack[-2:] for stack in Axes(specs[0]).stacks(shape)):
        return "vector", None
    if (specs or not rule.batch_axes) and rule.when(shape):
        return rule.role, specs[0] if len(specs) == 1 else UNDECIDED
    return None


@cache
def _compiled(pattern: str, not_in: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    return re.compile(f"(?:^|/)(?:{pattern})$", re.DOTALL), re.compile(not_in)


def _specs(rule: NameRule, path: str, shape: Shape) -> list[str]:
    """The rule's specs that fit the shape, with every possible number of batch axes in front."""
    ndim = len(shape)
    by_ndim = {Axes(spec).ndim: spec for spec in rule.specs if spec is not None}
    if rule.batch_axes:
        return [by_ndim[ndim]] if ndim in by_ndim else []
    stacked = bool(STACK.search(path))
    maybe_stacked = stacked or bool(MAYBE_STACK.search(path))
    specs = {
        n: "b" * n + by_ndim[ndim - n]
        for n in range(maybe_stacked + (rule.role == "experts") + 1)
        if ndim - n in by_ndim and rule.shape_ok(shape[n:])
    }
    matrix = ndim == 2 and _MATRIX_NAME.search(path)
    only_unstacked = list(specs) == [0]  # but the path names a stack, so nothing fits
    if maybe_stacked and not matrix and (only_unstacked or (stacked and rule.role != "convolution")):
        specs.pop(0, None)
    return list(specs.values())
