"""What the frameworks call their parameters, and what that says of them."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

from optimorph.core.types import Shape
from optimorph.linalg.axes import Axes

UNDECIDED = "?"
"""The spec of a leaf that its name and shape do not decide."""


def _few_axes(shape: Shape) -> bool:
    return len(shape) < 2


def _many_axes(shape: Shape) -> bool:
    return len(shape) > 2


def _one_input(shape: Shape) -> bool:
    return len(shape) > 2 and shape[-2] == 1


def _one_input_second(shape: Shape) -> bool:
    return len(shape) > 2 and shape[1] == 1


def _window(shape: Shape) -> bool:
    """No more axes than two, or such as a convolution's window first."""
    return len(shape) == 2 or (len(shape) > 3 and max(shape[-4:-2]) <= 15)


def _window_last(shape: Shape) -> bool:
    return len(shape) == 2 or (len(shape) > 3 and max(shape[-2:]) <= 15)


def _layers_second(shape: Shape) -> bool:
    return shape[1] < shape[0]


def _not_layers_first(shape: Shape) -> bool:
    """(heads, layers, size, width) unless the sizes say (layers, heads, size, width)."""
    first, second, size, width = shape
    return first * size == width or second * size != width


def _triple(shape: Shape) -> bool:
    return shape[-1] == 3 * shape[-2]


def _triple_first(shape: Shape) -> bool:
    return shape[-2] == 3 * shape[-1]


class Row(NamedTuple):
    """Leaves of one kind.

    Args:
      role: what the plan calls them.
      pattern: how their path ends, in lower case, from the beginning of a name.
      specs: how they read, without the axes of a stack: one for each number of axes; none for no matrix.
      only: what must hold of the shape, where the path is not enough.
      whole: whether the specs name the axes of a stack themselves.
      outside: what the path must not have anywhere.
    """

    role: str
    pattern: str
    specs: tuple[str, ...] = ()
    only: Callable[[Shape], bool] = lambda shape: True
    whole: bool = False
    outside: str = "$^"


_KERNEL = r"(kernel|w\d*)"
_CONV = r"\w*conv\w*/([^/]+/)?"
_IN_A_STACK = r"((\w+_)?(layers|blocks|stages)|\w*scan\w*|stacked|\w*layer_stack\w*)/(.*/)?"
_IN_ATTENTION = r"\w*(attn|attention|mha|msa)\w*/(.*/)?"
_OF_ATTENTION = r"attn|attention|multi_?head|(^|/)(query|key|value|[qkvo])/"
_MAXTEXT = r"decoder/((\w+_)?layers|scanned_blocks)/(?!\d)(.*/)?"
_LEVANTER = r"layers/(stacked|blocks/\d+)/(.*/)?"
_FUSED = r"\w*(qkv|query_key_value|c_attn)\w*"
_EMBEDDING = (
    r"(\w*(embed|positional|codebook)\w*|(\w+_)?emb(s|_\w+)?|wte|wpe|w_e|w_pos|pe|pos(_(emb|enc)\w*)?|"
    r"rel_pos\w*|relative_\w+|vocab\w*|lookup\w*|word_vectors)"
)

ROWS = (
    Row("low rank", r"lora_?[ab](/kernel)?", ("io",)),
    Row("low rank", r"lora_?[ab]/weight", ("oi",)),
    Row("low rank", r"\w*(lora|adapter)\w*/(.*/)?[ab]", ("io",)),
    Row("bias", r"(\w+_)?bias(es)?(_\w+)?|offset|beta|(\w+_)?sinks?|a_log"),
    Row("bias", r"b\d*|g", (), _few_axes),
    Row("bias", _IN_A_STACK + r"(b\d*|g)"),
    Row("norm", r"(\w+_)?scale|gamma|\w*norms?(_weights?|\d*)|(ln|rms|ls)(_\w+|\d*)"),
    Row("norm", r"(\w*norm\w*|(ln|bn|rms)(_\w+|\d*))/(weight|gain|w|mean|var)"),
    Row(
        "head",
        r"(\w*(unembed|logits|classifier|lmhead)\w*|(\w+_)?heads?(_\d+)?)(/.*)?",
        outside=_OF_ATTENTION,
    ),
    Row(
        "head",
        r"^(params/|model/)?(out|output|readout|out(put)?_(layer|proj)|qa_outputs|w_u)(/(kernel|weight|w))?",
    ),
    Row("embedding", _EMBEDDING + r"(/[^/]+)?|\w*patch_embed\w*/.*|(\w+_)?tokens?|cls"),
    Row("router", r"\w*router\w*(/[^/]+)?|switch/(kernel|weight|w)"),
    Row("router", r"\w*moe\w*/(gate|gating|w_?g(ate)?|switch)(/(kernel|weight|w))?"),
    # a convolution with one input channel works within channels: depthwise, or the first on grey pictures
    Row("one channel", _CONV + _KERNEL, (), _one_input),
    Row("one channel", _CONV + "weight", (), _one_input_second),
    Row("convolution", r"\w*conv\w*_transpose\w*/w", ("ioi", "iioi", "iiioi"), _many_axes),
    Row("convolution", _CONV + _KERNEL, ("iio", "iiio", "iiiio"), _many_axes),
    Row("convolution", _CONV + "weight", ("oii", "oiii", "oiiii"), _many_axes),
    # MaxText's scanned layers, which the second axis counts
    Row("experts", r"moeblock_\d+/(.*/)?(wi\w*|wo)", ("bio", "bbio"), whole=True),
    Row(
        "attention",
        _MAXTEXT + r"self_attention/(query|key|value|wq|wq_b|wkv_b)/kernel",
        ("iboo",),
        _layers_second,
        True,
    ),
    Row("attention", _MAXTEXT + r"self_attention/qkv_proj/kernel", ("ibboo",), _layers_second, True),
    Row("attention", _MAXTEXT + r"self_attention/(wq_a|wkv_a)/kernel", ("ibo",), _layers_second, True),
    Row("attention", _MAXTEXT + r"self_attention/out/kernel", ("ibio",), _not_layers_first, True),
    Row("dense", _MAXTEXT + r"(mlp|shared_experts)/(wi\w*|wo)/kernel", ("ibo",), _layers_second, True),
    # Levanter's, whose heads are axes and whose outputs come first
    Row("attention", _LEVANTER + "q_proj/weight", ("oi", "ooi", "oooi")),
    Row("attention", _LEVANTER + "[kv]_proj/weight", ("oi", "ooi")),
    Row("attention", _LEVANTER + "o_proj/weight", ("oi", "oii")),
    Row("experts", _LEVANTER + r"experts/(\w+/)?weight", ("io",)),
    Row("attention", _FUSED + r"(/weight|_weight)|in_proj_weight", ("(3o)i",), _triple_first),
    Row("attention", _FUSED + r"(/(kernel|w))?", ("i(3o)",), _triple),
    Row("attention", _FUSED + "/kernel", ("iboo",), lambda shape: shape[-3:-2] == (3,) != shape[-2:-1], True),
    Row("attention", _FUSED + "/kernel", ("iobo",), lambda shape: shape[-2:-1] == (3,) != shape[-3:-2], True),
    Row("attention", _FUSED + r"(/(kernel|w|weight))?|in_proj_weight", (UNDECIDED,)),
    Row("attention", r"(query|key|value|[qkv]_proj|w?[qkv]|to_[qkv]|wq_b|wkv_b)/kernel", ("io", "ioo")),
    Row("attention", _IN_ATTENTION + "(out|o|proj|o_proj|out_proj|output|wo|c_proj)/kernel", ("io", "iio")),
    Row("gates", r"\w*lstm\w*/(.*/)?weight_[ih]h", ("(4o)i",)),
    Row("gates", r"\w*gru\w*/(.*/)?weight_[ih]h", ("(3o)i",)),
    Row("gates", "weight_hh", ("(4o)i",), lambda shape: shape[-2] == 4 * shape[-1]),
    Row("gates", "weight_hh", ("(3o)i",), _triple_first),
    Row("gates", "weight_[ih]h", (UNDECIDED,)),
    Row("gates", r"\w*lstm\w*/(.*/)?(dense_[ih]/kernel|linear/w)", ("i(4o)",)),
    Row("gates", r"\w*gru\w*/(.*/)?(dense_[ih]/kernel|w_[ih])", ("i(3o)",)),
    Row("experts", r"\w*(expert|moe)\w*/([^/]+/)?weight", ("oi",), outside=_OF_ATTENTION),
    Row("experts", r"\w*(expert|moe)\w*(/[^/]+){0,2}", ("io",), outside=_OF_ATTENTION),
    Row("one channel", "kernel", (), lambda shape: len(shape) > 3 and _one_input(shape)),
    Row("one channel", "weight", (), lambda shape: len(shape) > 3 and _one_input_second(shape)),
    Row("dense", "weight", ("oi", "oiii", "oiiii"), _window_last),
    Row("dense", "weight", ("oi",)),
    Row("dense", "kernel", ("io", "iiio", "iiiio"), _window, outside=_OF_ATTENTION + "|kv|einsum|mlp|ffn"),
    Row("dense", r"b\d*|g", (UNDECIDED,)),
    Row("dense", ".*", ("io",)),
)
"""What a path says, the first row first."""

_STACK = re.compile(r"(^|/)(scan(ned)?(_\w+)?|\w*Scan[A-Z]\w*|Vmap[A-Z]\w*|stacked|\w*layer_stack\w*)/")
_MAYBE_A_STACK = re.compile(
    r"(^|/)(\w+_)?(layers|blocks|stages)/(?!\d|(layer|block|stage)s?[_/]?\d)", re.IGNORECASE
)
_SURELY_A_MATRIX = re.compile(r"(^|/)(kernel|(?!weight)w\w*)$")  # a stacked vector would not be called so


@functools.cache
def _compiled(row: Row) -> tuple[re.Pattern[str], re.Pattern[str]]:
    anchored = row.pattern if row.pattern.startswith("^") else f"(?:^|/)(?:{row.pattern})"
    return re.compile(f"{anchored}$"), re.compile(row.outside)


@functools.lru_cache(maxsize=1 << 16)
def by_name(path: str, shape: Shape) -> tuple[str, str | None]:
    """What a leaf is called, and its spec: None for no matrix, `UNDECIDED` for a question."""
    lower = path.lower()
    for row in ROWS:
        pattern, outside = _compiled(row)
        if not pattern.search(lower) or outside.search(lower):
            continue
        if not row.specs and row.only(shape):
            return row.role, None
        if row.specs and sum(size > 1 for size in shape) < 2:
            return "vector", None
        found = _readings(row, path, len(shape))
        if (found or not row.whole) and row.only(shape):
            return row.role, found[0] if len(found) == 1 else UNDECIDED
    return "vector", None


def _readings(row: Row, path: str, ndim: int) -> list[str]:
    """Every spec that the path allows: the row's, behind as many batch axes as there may be."""
    specs = {Axes(spec).ndim: spec for spec in row.specs if spec != UNDECIDED}
    if row.whole:
        return [specs[ndim]] if ndim in specs else []
    surely = bool(_STACK.search(path))
    stacked = surely or bool(_MAYBE_A_STACK.search(path))
    deepest = stacked + (row.role == "experts")
    found = {n: "b" * n + specs[ndim - n] for n in range(deepest + 1) if ndim - n in specs}
    matrix = ndim == 2 and _SURELY_A_MATRIX.search(path)
    unknown = list(found) == [0]  # a stack of what is not known
    if stacked and not matrix and (unknown or (surely and row.role != "convolution")):
        found.pop(0, None)
    return list(found.values())
