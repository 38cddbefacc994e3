"""What the frameworks call their parameters, and what that says of them."""

import re
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import NamedTuple

from optimorph._core.types import Shape
from optimorph._routing import sizes
from optimorph.linalg import Axes

UNDECIDED = "?"
"""The spec of a leaf that its name and shape do not decide."""


class Row(NamedTuple):
    """Leaves of one kind.

    Args:
      role: what the plan calls them.
      pattern: how their path ends, in lower case, from the beginning of a name; numbers are alike.
      specs: how they read, without the axes of a stack: one for each number of axes; none for no matrix.
      only: what must hold of the shape, where the path is not enough; else the row is not meant.
      fits: what must hold of the sizes that a spec describes, those of a stack left out; else it is none.
      whole: whether the specs name the axes of a stack themselves.
      outside: what the path must not have anywhere.
    """

    role: str
    pattern: str
    specs: tuple[str, ...] = ()
    only: Callable[[Shape], bool] = lambda shape: True
    fits: Callable[[Shape], bool] = lambda shape: True
    whole: bool = False
    outside: str = "(?!)"


_WEIGHT = "(kernel|weight|w)"
_KERNEL = r"(kernel|w\d*)"
_CONV = r"\w*conv\w*/"
_IN_CONV = _CONV + "[^/]+/"
_IN_A_STACK = r"((\w+_)?(layers|blocks|stages)(?!/\d)|\w*scan\w*|stacked|\w*layer_stack\w*)/(.*/)?"
_IN_ATTENTION = r"\w*(attn|attention|mha|msa)\w*/(.*/)?"
_OF_ATTENTION = r"attn|attention|multi_?head|(^|/)(query|key|value|[qkvo])/"
_IN_A_BLOCK = (
    _OF_ATTENTION
    + r"|mlp|(^|[/_])ffn?([/_]|$)|block|layers|layer_?\d|(^|/)(layer|h)/|stage|mixer|expert|moe|"
    "cell|rnn|lstm|gru|ssm|mamba|conv|lora"
)
_MAXTEXT = r"decoder/((\w+_)?layers|scanned_blocks)/(?!\d)(.*/)?"
_MAXTEXT_ATTENTION = _MAXTEXT + r"\w*attention\w*/"
_MAXTEXT_DENSE = _MAXTEXT + r"\w*(mlp|experts)\w*/(wi\w*|wo)/kernel"
_LEVANTER = r"(layers|blocks)/(stacked|blocks/\d+)/(.*/)?"
_GATE = r"(gate|gating)(_\d+)?"
_GATE_OF_EXPERTS = rf"\w*moe\w*/(gate|gating|w_?g(ate)?|switch)(_\d+)?(/dense(_\d+)?)?(/{_WEIGHT})?"
_FUSED = r"\w*(qkv|query_key_value|c_attn)\w*"
_LAYER = r"(proj|projection|dense|linear|fc|mlp|ffn?|attn|attention)(_?\d+)?"
_NO_LAYER = rf"(?!\w*{_LAYER}(/|$))"  # what an embedding is projected by is no embedding
_EMBEDDING = (
    r"(\w*(embed|positional|codebook|posemb)\w*|(\w+_)?emb(s|_\w+)?|wte|wpe|w_e|w_pos|pe|pos_enc\w*|"
    r"rel_pos\w*|relative_\w+|vocab\w*|lookup\w*|word_vectors)"
)
_TABLE = r"(\w+_)?(tok|tokens?|pos|positions?|segments?|latents?|prompts?|tables?)"


def _many_axes(shape: Shape) -> bool:
    return len(shape) > 2


_triple, _triple_first = partial(sizes.times, 3), partial(sizes.times_first, 3)
_quadruple, _quadruple_first = partial(sizes.times, 4), partial(sizes.times_first, 4)

ROWS = (
    Row("low rank", r"lora_?[ab](/kernel)?", ("io",)),
    Row("low rank", r"lora_?[ab]/weight", ("oi",)),
    Row("low rank", r"\w*(lora|adapter)\w*/(.*/)?[ab]", ("io",)),
    Row("bias", r"(\w+_)?bias(es)?(_\w+)?|offset|beta|(\w+_)?sinks?|a_log"),
    Row("bias", r"b\d*|g", (), sizes.few_axes),
    Row("bias", _IN_A_STACK + r"(b(\d+|_\w+)?|g)", (), lambda shape: len(shape) < 3),
    Row("bias", r"\w*(expert|moe)\w*/([^/]+/)?b(\d+|_\w+)?"),
    Row("norm", r"(\w+_)?scale|gamma|\w*norms?(_weights?|\d*)|(ln|rms|ls)(_\w+|\d*)"),
    Row("norm", _NO_LAYER + r"(\w*norm\w*|(ln|bn|rms)(_\w+|\d*))/(weight|gain|w|mean|var)"),
    # a perceptron behind a norm, or the norms of a stack in front of one
    Row(
        "norm",
        r"\w*norm_(mlp|ffn?|attn|attention)/(weight|gain|w)",
        (UNDECIDED,),
        lambda shape: len(shape) == 2,
    ),
    Row("vector", r"alpha\d*|time_(decay|first|mix\w*)"),
    Row(
        "head",
        r"(\w*(unembed|logit|classifier|lmhead)\w*|(\w+_)?heads?(_\d+)?|predictions/decoder|final_layer)(/.*)?",
        outside=_OF_ATTENTION + "|/w[qkvo]$|mixer",
    ),
    Row(
        "head",
        rf"(\w*readout|(\w+_)?output_proj(ection)?|score|final_(proj\w*|dense|linear|fc|out\w*))(/{_WEIGHT})?",
        outside=_IN_A_BLOCK,
    ),
    Row(
        "head",
        rf"^((params|model)/)*([^/]*[a-z_][^/]*/)?(out|output|output_(layer|dense)|proj_out|fc_out)(/{_WEIGHT})?",
        outside=_IN_A_BLOCK,
    ),
    Row("head", rf"^((params|model)/)*(out_(layer|proj)|qa_outputs|w_u|(fc|decoder)(?=/))(/{_WEIGHT})?"),
    Row("embedding", _NO_LAYER + _EMBEDDING + r"(/[^/]+)?|\w*patch_embed\w*/.*|cls"),
    Row("embedding", _TABLE + r"(/(weight|w))?|\w*queries", outside=_OF_ATTENTION),
    # an Equinox layer that shares its weight, as an embedding with its head
    Row("embedding", r"pytree/\d+/weight|^(model/)?shared/weight"),
    Row("router", r"\w*router\w*(/[^/]+)?|switch/(kernel|weight|w)"),
    Row("router", _GATE_OF_EXPERTS, (), lambda shape: len(shape) != 3 or sizes.few_outputs(shape)),
    Row("router", _GATE_OF_EXPERTS, (UNDECIDED,)),
    Row("router", r"\w*moe\w*/dense(_\d+)?/kernel", (), sizes.few_outputs),
    Row("router", _GATE + "/weight", (), sizes.few_outputs_first, outside=_OF_ATTENTION + "|expert"),
    Row("router", _GATE + "/(kernel|w)", (), sizes.few_outputs, outside=_OF_ATTENTION + "|expert"),
    Row("router", r"experts?/gate/kernel", (), lambda shape: len(shape) == 2 and sizes.few_outputs(shape)),
    # a convolution with one input channel works within channels: depthwise, or the first on grey pictures
    Row("one channel", _CONV + "([^/]+/)?" + _KERNEL, (), sizes.one_input),
    Row("one channel", _CONV + "([^/]+/)?weight", (), sizes.one_input_second),
    Row("convolution", r"\w*conv\w*_transpose\w*/w", ("ioi", "iioi", "iiioi"), _many_axes, sizes.convolves),
    Row("convolution", _CONV + _KERNEL, ("iio", "iiio", "iiiio"), _many_axes, sizes.convolves),
    Row("convolution", _CONV + "weight", ("oii", "oiii", "oiiii"), _many_axes, sizes.convolves_last),
    Row(
        "convolution",
        _IN_CONV + _KERNEL,
        ("iio", "iiio", "iiiio"),
        _many_axes,
        sizes.maybe_convolves,
        outside=_OF_ATTENTION,
    ),
    Row(
        "convolution",
        _IN_CONV + "weight",
        ("oii", "oiii", "oiiii"),
        _many_axes,
        sizes.maybe_convolves_last,
        outside=_OF_ATTENTION,
    ),
    # MaxText's scanned layers, which the second axis counts
    Row("experts", r"moeblock_\d+/(.*/)?(wi\w*|wo)", ("bio", "bbio"), whole=True),
    Row(
        "attention",
        _MAXTEXT_ATTENTION + r"(query|key|value|wq|wq_b|wkv_b)/kernel",
        ("iboo",),
        sizes.layers_second,
        whole=True,
    ),
    Row("attention", _MAXTEXT_ATTENTION + "qkv_proj/kernel", ("ibboo",), sizes.layers_second, whole=True),
    Row("attention", _MAXTEXT_ATTENTION + "(wq_a|wkv_a)/kernel", ("ibo",), sizes.layers_second, whole=True),
    Row("attention", _MAXTEXT_ATTENTION + "out/kernel", ("ibio",), sizes.out_layers_second, whole=True),
    # Gemma's pairs of layers have names that are MaxText's alone
    Row(
        "attention",
        _MAXTEXT + "self_attention_(local|global)/out/kernel",
        ("ibio",),
        sizes.out_not_layers_first,
        whole=True,
    ),
    Row("attention", _MAXTEXT_ATTENTION + "out/kernel", (UNDECIDED,), sizes.out_not_layers_first),
    Row("dense", _MAXTEXT_DENSE, ("ibo",), sizes.layers_second, whole=True),
    Row("dense", _MAXTEXT_DENSE, (UNDECIDED,), sizes.not_layers_first),
    Row(
        "dense",
        _MAXTEXT + "[^/]+",
        (UNDECIDED,),
        sizes.not_layers_first,
        outside="experts?/|attention[^/]*/out/",
    ),
    # Levanter's, whose heads are axes and whose outputs come first
    Row(
        "attention",
        _LEVANTER + "c_attn/weight",
        ("booi",),
        lambda shape: sizes.three_before_heads(shape[:-1]),
    ),
    Row("attention", _LEVANTER + r"\w*attn/c_proj/weight", ("oi", "oii")),
    Row("attention", _LEVANTER + "q_proj/weight", ("oi", "ooi", "oooi")),
    Row("attention", _LEVANTER + "[kv]_proj/weight", ("oi", "ooi")),
    Row("attention", _LEVANTER + "o_proj/weight", ("oi", "oii")),
    Row("experts", _LEVANTER + r"experts/(\w+/)?weight", ("io",)),
    # of GPT-NeoX and BLOOM, head by head
    Row("attention", r"query_key_value(/(kernel|w))?", (UNDECIDED,), _triple),
    Row("attention", r"query_key_value/weight", (UNDECIDED,), _triple_first),
    Row("attention", _FUSED + r"(/weight|_weight)|in_proj_weight", ("(3o)i",), _triple_first),
    Row("attention", _FUSED + r"(/(kernel|w))?", ("i(3o)",), _triple),
    Row("attention", _FUSED + "/kernel", ("iboo",), sizes.three_before_heads, whole=True),
    Row("attention", _FUSED + "/kernel", ("iobo",), sizes.three_after_heads, whole=True),
    Row("attention", _FUSED + r"(/(kernel|w|weight))?|in_proj_weight", (UNDECIDED,)),
    Row(
        "attention",
        r"(query|key|value|[qkv]_proj|w?[qkv]|to_[qkv])/kernel",
        ("io", "ioo"),
        fits=sizes.has_heads,
    ),
    Row("attention", "(wq_b|wkv_b)/kernel", ("io", "ioo"), fits=sizes.has_heads_of_latents),
    Row(
        "attention",
        _IN_ATTENTION + "(out|o|proj|o_proj|out_proj|output|wo|c_proj)/kernel",
        ("io", "iio"),
        fits=sizes.has_heads_first,
    ),
    Row("gates", r"\w*lstm\w*/(.*/)?weight_[ih]h", ("(4o)i",)),
    Row("gates", r"\w*gru\w*/(.*/)?weight_[ih]h", ("(3o)i",)),
    Row("gates", "weight_hh", ("(4o)i",), _quadruple_first),
    Row("gates", "weight_hh", ("(3o)i",), _triple_first),
    Row("gates", "weight_[ih]h", (UNDECIDED,)),
    Row("gates", r"\w*lstm\w*/(.*/)?(dense_[ih]/kernel|linear/w)", ("i(4o)",)),
    Row("gates", r"\w*gru\w*/(.*/)?(dense_[ih]/kernel|w_[ih])", ("i(3o)",)),
    Row("gates", r"\w*cell\w*/dense_h/kernel", ("i(4o)",), _quadruple),
    Row("gates", r"\w*cell\w*/dense_h/kernel", ("i(3o)",), _triple),
    Row("gates", r"\w*cell\w*/dense_i/kernel", (UNDECIDED,)),
    Row("experts", r"\w*(expert|moe)\w*/([^/]+/)?weight", ("oi",), outside=_OF_ATTENTION),
    Row("experts", r"\w*(expert|moe)\w*(/[^/]+){0,2}", ("io",), outside=_OF_ATTENTION),
    Row("one channel", "kernel", (), lambda shape: len(shape) > 3 and sizes.one_input(shape)),
    Row("one channel", "weight", (), lambda shape: len(shape) > 3 and sizes.one_input_second(shape)),
    Row("dense", "weight", ("oi", "oiii", "oiiii"), fits=sizes.maybe_convolves_last),
    Row(
        "dense",
        "kernel",
        ("io", "iiio", "iiiio"),
        fits=sizes.maybe_convolves,
        outside=_OF_ATTENTION + r"|kv|einsum|mlp|(^|[/_])ffn?([/_]|$)",
    ),
    Row("dense", r"b\d*|g", (UNDECIDED,)),
    Row("dense", ".*", ("io",)),
)
"""What a path says, the first row first."""

_STACK = re.compile(r"(^|/)(scan(ned)?(_\w+)?|\w*Scan[A-Z]\w*|Vmap[A-Z]\w*|stacked|\w*layer_stack\w*)/")
_MAYBE_A_STACK = re.compile(
    r"(^|/)(\w+_)?(layers|blocks|stages)/(?!\d|(layer|block|stage)s?[_/]?\d)", re.IGNORECASE
)
_SURELY_A_MATRIX = re.compile(r"(^|/)(kernel|w)$")  # a stacked vector would not be called so


def by_name(path: str, shape: Shape) -> tuple[str, str | None]:
    """What a leaf is called, and its spec: None for no matrix, `UNDECIDED` for a question.

    Dots separate names as slashes do, and no row asks which number it is that a name has.
    """
    return _by_name(re.sub(r"\d+", "0", path.replace(".", "/")), shape)


@lru_cache(maxsize=1 << 16)
def _by_name(path: str, shape: Shape) -> tuple[str, str | None]:
    return next(said for row in ROWS if (said := _said(row, path, shape)) is not None)


def _said(row: Row, path: str, shape: Shape) -> tuple[str, str | None] | None:
    """What one row says of a leaf; None where it is not meant, as the last one always is."""
    pattern, outside = _compiled(row)
    lower = path.lower()
    if not pattern.search(lower) or outside.search(lower):
        return None
    if not row.specs and row.only(shape):
        return row.role, None
    if row.specs and sum(size > 1 for size in shape) < 2:
        return "vector", None
    found = _readings(row, path, shape)
    if (found or not row.whole) and row.only(shape):
        return row.role, found[0] if len(found) == 1 else UNDECIDED
    return None


@cache
def _compiled(row: Row) -> tuple[re.Pattern[str], re.Pattern[str]]:
    anchored = row.pattern if row.pattern.startswith("^") else f"(?:^|/)(?:{row.pattern})"
    return re.compile(f"{anchored}$", re.DOTALL), re.compile(row.outside)


def _readings(row: Row, path: str, shape: Shape) -> list[str]:
    """Every spec that path and sizes allow: the row's, behind as many batch axes as there may be."""
    ndim = len(shape)
    specs = {Axes(spec).ndim: spec for spec in row.specs if spec != UNDECIDED}
    if row.whole:
        return [specs[ndim]] if ndim in specs else []
    surely = bool(_STACK.search(path))
    stacked = surely or bool(_MAYBE_A_STACK.search(path))
    deepest = stacked + (row.role == "experts")
    found = {
        n: "b" * n + specs[ndim - n] for n in range(deepest + 1) if ndim - n in specs and row.fits(shape[n:])
    }
    matrix = ndim == 2 and _SURELY_A_MATRIX.search(path)
    unknown = list(found) == [0]  # a stack of what is not known
    if stacked and not matrix and (unknown or (surely and row.role != "convolution")):
        found.pop(0, None)
    return list(found.values())
