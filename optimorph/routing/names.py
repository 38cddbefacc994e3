"""What the frameworks call their parameters, and what that says of them."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

from optimorph.core.types import Shape
from optimorph.linalg.axes import Axes

UNDECIDED = "?"
"""The spec of a leaf that its name and shape do not decide."""


def _one_input(shape: Shape) -> bool:
    return len(shape) > 2 and shape[-2] == 1


def _one_input_second(shape: Shape) -> bool:
    return len(shape) > 2 and shape[1] == 1


def _layers_second(shape: Shape) -> bool:
    return shape[1] < shape[0]


def _three_outputs(shape: Shape) -> bool:
    return shape[-1] == 3 * shape[-2] or (len(shape) > 3 and 3 in shape[1:3])


def _three_outputs_first(shape: Shape) -> bool:
    return shape[-2] == 3 * shape[-1]


class Row(NamedTuple):
    """Leaves of one kind.

    Args:
      role: what the plan calls them.
      pattern: their path, in lower case, from its first letter to its last.
      specs: how they read, without the axes of a stack: one for each number of axes; none for no matrix.
      only: what must hold of the shape, where the path is not enough.
      whole: whether the specs name the axes of a stack themselves.
    """

    role: str
    pattern: str
    specs: tuple[str, ...] = ()
    only: Callable[[Shape], bool] = lambda shape: True
    whole: bool = False


_HEAD = r"[^/]*(unembed|logits|classifier|lmhead)[^/]*|(?!multi)(\w+_)?head(_\d+)?"
_KERNEL = r"(kernel|w\d*)"
_CONV = r"(.*/)?[^/]*conv[^/]*/([^/]+/)?"
_ATTENTION = "(.*/)?[^/]*(attn|attention|mha|msa)[^/]*/(.*/)?"
_T5X = r"(.*/)?(decoder|encoder)/((\w+_)?layers|scanned_blocks)/(?!\d)(.*/)?"
_HALIAX = r"(.*/)?layers/(stacked|blocks/\d+)/(.*/)?"

ROWS = (
    Row("low rank", r"(.*/)?lora_?[ab]", ("io",)),
    Row("low rank", r"(.*/)?lora(_\w+)?/(lora_)?[ab]", ("io",)),
    Row("low rank", r"(.*/)?lora_?[ab]/kernel", ("io",)),
    Row("low rank", r"(.*/)?lora_?[ab]/weight", ("oi",)),
    Row("bias", r"(.*/)?((\w+_)?bias(es)?(_\w+)?|b\d*|offset|beta|(\w+_)?sinks?|a_log)"),
    Row("norm", r"(.*/)?((\w+_)?scale|gamma|g)"),
    Row("norm", r"(.*/)?([^/]*norm[^/]*|ln(_\w+|\d*)|bn(_\w+|\d*))/(weight|gain)"),
    Row("head", r"(?!.*(attn|attention))(.*/)?(" + _HEAD + r")(/[^/]+)?(/[^/]+)?"),
    Row("embedding", r"(.*/)?[^/]*(embed|wte|wpe|pos_emb|relative_position|codebook)[^/]*(/[^/]+)?"),
    Row("embedding", r"(.*/)?[^/]*patch_embed[^/]*/.*"),
    Row("embedding", r"(.*/)?(\w+_)?tokens?|(.*/)?cls"),
    Row("router", r"(.*/)?[^/]*router[^/]*(/[^/]+)?"),
    Row("router", r"(.*/)?[^/]*(moe|expert)[^/]*/(.*/)?gate/(kernel|weight|w)"),
    # scanned layers of MaxText and T5X, whose second axis counts them
    Row("experts", r"(.*/)?moeblock_\d+/(.*/)?(wi\w*|wo)", ("bio", "bbio"), whole=True),
    Row("attention", _T5X + r"(query|key|value|wq|wq_b|wkv_b)/kernel", ("iboo",), _layers_second, True),
    Row("attention", _T5X + r"qkv_proj/kernel", ("ibboo",), _layers_second, True),
    Row("attention", _T5X + r"[^/]*attention[^/]*/(.*/)?out/kernel", ("ibio",), whole=True),
    Row("dense", _T5X + "kernel", ("ibo",), _layers_second, True),
    # Levanter's, whose heads are axes and whose outputs come first
    Row("attention", _HALIAX + "q_proj/weight", ("oi", "ooi", "oooi")),
    Row("attention", _HALIAX + "[kv]_proj/weight", ("oi", "ooi")),
    Row("attention", _HALIAX + "o_proj/weight", ("oi", "oii")),
    Row("experts", _HALIAX + r"experts/(\w+/)?weight", ("io",)),
    # a convolution with one input channel works within channels: depthwise, or the first on grey pictures
    Row("one channel", _CONV + _KERNEL, (), _one_input),
    Row("one channel", _CONV + "weight", (), _one_input_second),
    Row("convolution", r"(.*/)?[^/]*conv\w*_transpose[^/]*/w", ("ioi", "iioi", "iiioi")),
    Row("convolution", _CONV + _KERNEL, ("iio", "iiio", "iiiio")),
    Row("convolution", _CONV + "weight", ("oii", "oiii", "oiiii")),
    Row("attention", r"(.*/)?[^/]*(qkv|c_attn)[^/]*/(kernel|w)", ("i(3o)", "iboo"), _three_outputs),
    Row("attention", r"(.*/)?[^/]*(qkv|c_attn)[^/]*/weight", ("(3o)i",), _three_outputs_first),
    Row("attention", r"(.*/)?[^/]*(qkv|c_attn)[^/]*/(kernel|w|weight)", (UNDECIDED,)),
    Row("attention", r"(.*/)?(query|key|value|[qkv]_proj|w?[qkv]|to_[qkv])/kernel", ("io", "ioo")),
    Row("attention", _ATTENTION + "(out|o|proj|o_proj|out_proj|output|wo|c_proj)/kernel", ("io", "iio")),
    Row("gates", r"(.*/)?[^/]*lstm[^/]*/(.*/)?weight_[ih]h", ("(4o)i",)),
    Row("gates", r"(.*/)?[^/]*gru[^/]*/(.*/)?weight_[ih]h", ("(3o)i",)),
    Row("gates", r"(.*/)?weight_[ih]h", (UNDECIDED,)),
    Row("gates", r"(.*/)?[^/]*lstm[^/]*/(.*/)?(dense_[ih]/kernel|linear/w)", ("i(4o)",)),
    Row("gates", r"(.*/)?[^/]*gru[^/]*/(.*/)?(dense_[ih]/kernel|w_[ih])", ("i(3o)",)),
    Row("experts", "(.*/)?[^/]*(expert|moe)[^/]*/(.*/)?weight", ("oi",)),
    Row("experts", "(.*/)?[^/]*(expert|moe)[^/]*(/.*)?", ("io",)),
    Row("one channel", "(.*/)?kernel", (), lambda shape: len(shape) > 3 and _one_input(shape)),
    Row("one channel", "(.*/)?weight", (), lambda shape: len(shape) > 3 and _one_input_second(shape)),
    Row("dense", "(.*/)?weight", ("oi", "oiii", "oiiii")),
    Row("dense", "(.*/)?" + _KERNEL, ("io", "iiio", "iiiio")),
    Row("dense", ".*", ("io",)),
)
"""What a path says, the first row first."""

_STACK = re.compile(r"(.*/)?([^/]*scan[^/]*|stacked|[^/]*layer_stack[^/]*|vmap\w*)/.*")
_MAYBE_A_STACK = re.compile(r"(.*/)?(\w+_)?(layers|blocks|stages)/(?P<rest>.*)")
_NUMBERED = re.compile(r"(.*/)?((layer|block|stage)s?_?)?\d+/.*")
_SURELY_A_MATRIX = re.compile(r"(.*/)?(kernel|(?!weight)w\w*)")  # a stacked vector would not be called so
_EXPERTS = re.compile(r"(.*/)?[^/]*(expert|moe)[^/]*(/.*)?")


@functools.lru_cache(maxsize=1 << 16)
def by_name(path: str, shape: Shape) -> tuple[str, str | None]:
    """What a leaf is called, and its spec: None for no matrix, `UNDECIDED` for a question."""
    path = path.lower()
    for row in (row for row in ROWS if re.fullmatch(row.pattern, path)):
        if not row.specs and row.only(shape):
            return row.role, None
        if sum(size > 1 for size in shape) < 2:
            return "vector", None
        if not row.only(shape):
            continue
        found = _readings(row, path, len(shape))
        if found or not row.whole:
            return row.role, found[0] if len(found) == 1 else UNDECIDED
    return "vector", None


def _readings(row: Row, path: str, ndim: int) -> list[str]:
    """Every spec that the path allows: the row's, behind as many batch axes as there may be."""
    specs = {Axes(spec).ndim: spec for spec in row.specs if spec != UNDECIDED}
    if row.whole:
        return [specs[ndim]] if ndim in specs else []
    surely = bool(_STACK.fullmatch(path))
    within = _MAYBE_A_STACK.fullmatch(path)
    stacked = surely or bool(within and not _NUMBERED.fullmatch(within["rest"]))
    deepest = stacked + bool(_EXPERTS.fullmatch(path))
    found = {n: "b" * n + specs[ndim - n] for n in range(deepest + 1) if ndim - n in specs}
    matrix = ndim == 2 and _SURELY_A_MATRIX.fullmatch(path)
    if stacked and not matrix and (surely or list(found) == [0]):
        found.pop(0, None)  # a stack, if of what is not known
    return list(found.values())
