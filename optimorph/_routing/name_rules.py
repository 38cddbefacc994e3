"""The default rules: the parameter names of Flax, Equinox, Haiku, MaxText and Levanter."""

from collections.abc import Callable

from optimorph._core.types import Shape
from optimorph._routing import name_patterns as p
from optimorph._routing import shape_conditions as shapes
from optimorph._routing.leaf_spec import axes_of
from optimorph._routing.name_rule import UNDECIDED, NameRule


def _convolution_rule(
    pattern: str, specs: tuple[str, ...], shape_ok: Callable[[Shape], bool], not_in: str = "(?!)"
) -> NameRule:
    return NameRule("convolution", pattern, specs, lambda shape: len(shape) > 2, shape_ok, not_in=not_in)


def _both(
    role: str,
    module: str,
    specs: tuple[str | None, ...] = (),
    when: Callable[[Shape], bool] = lambda shape: True,
    not_in: str = "(?!)",
) -> tuple[NameRule, NameRule]:
    """A rule for kernels, inputs before outputs, and the same for weights, outputs before inputs."""
    reverse = tuple(
        spec and "".join(map(str, axes_of(spec).parts[::-1])) for spec in specs if spec != UNDECIDED
    )
    reverse = (UNDECIDED, *reverse) if UNDECIDED in specs else reverse
    return (
        NameRule(role, f"{module}(kernel|w)", specs, when, not_in=not_in),
        NameRule(role, f"{module}weight", reverse, shapes.flipped(when), not_in=not_in),
    )


def _maxtext_rule(
    role: str, pattern: str, spec: str, when: Callable[[Shape], bool] = shapes.layers_second
) -> NameRule:
    """A rule for MaxText's scanned layers, which the second axis counts."""
    return NameRule(role, pattern, (spec,), when, batch_axes=True)


def _gpt2_rule(role: str, name: str, spec: str, when: Callable[[Shape], bool]) -> NameRule:
    """A rule for kernels of GPT-2 whose outputs come first."""
    return NameRule(role, f"h/0/{name}/kernel", (UNDECIDED, spec), when, layout="hf_flax_gpt2()")


_NEOX, _MAXTEXT = "gpt_neox(heads=HEADS)", "maxtext(scan_axis=1)"

RULES = (
    NameRule("low rank", r"(\w+_)?lora_?[ab](/kernel)?|\w*(lora|adapter)\w*/(.*/)?[ab]", ("io",)),
    NameRule("low rank", r"(\w+_)?lora_?[ab]/weight", ("oi",)),
    NameRule("bias", r"(\w+_)?bias(es)?(_\w+)?|offset|(\w+_)?beta|(\w+_)?sinks?|a_log"),
    NameRule("bias", r"\w*(expert|moe)\w*/([^/]+/)?b(\d+|_\w+)?"),
    NameRule("bias", p.IN_ATTENTION + "(query|key|value|gating|output)_b"),
    NameRule("bias", r"b\d*|g", when=lambda shape: len(shape) < 2),
    NameRule("bias", p.IN_STACK + r"(b(\d+|_\w+)?|g)", when=lambda shape: len(shape) < 3),
    NameRule("norm", r"(\w+_)?scale|gamma|\w*norms?(_weights?|\d*)|(\w+_)?(ln|rms|ls)(_\w+|\d*)"),
    NameRule("norm", p.NOT_A_LAYER + r"(\w*norm\w*|(\w+_)?(ln|bn|rms)(_\w+|\d*))/(weight|gain|w|mean|var)"),
    # the weight of an MLP behind a norm, or the stacked weights of norms before an MLP
    NameRule("norm", rf"\w*norm_{p.LAYER}/(weight|gain|w)", (UNDECIDED,), lambda s: len(s) == 2),
    NameRule("vector", rf"{p.WEIGHT}_(log_?)?(sigma|std|rho|var)|alpha\d*|time_[a-z]+(_\w+)?"),
    # frequencies, drawn once
    NameRule("vector", p.FREQUENCIES, not_in="emb"),
    NameRule("dense", r"\w*unembed\w*(/\w*)?", ("io",), lambda s: len(s) == 2 and s[0] == s[1]),
    NameRule("head", rf"\w*output_proj(ection)?\w*/(output|residual)_layer/{p.WEIGHT}"),
    NameRule(
        "head",
        r"((?!pre_?logit)\w*(unembed|logit|classifier|class_pred|lmhead)\w*|(\w+_)?heads?(_\d+)?|predictions/decoder|final_?layer(_0)?|"
        r"\w*seq_relationship)(/.*)?",
        not_in=p.ATTENTION
        + "|/w[qkvo]$|mixer|conv_?head|router|heads?/(\\w+_)?decoder/|layer_stack|pre_?net|quantiz",
    ),
    NameRule(
        "head",
        rf"(\w*readout(_?\d+)?|(\w+_)?output_proj(ection)?|score|final_(proj\w*|dense|linear|fc|out\w*|mapping))(/{p.WEIGHT})?|"
        rf"{p.ROOT}([^/]*[a-z_][^/]*/)?(w_?out|out|output|(\w+_)?out_(layer|dense)|output_(layer|dense)|(\w+_)?proj_out|fc_out)(/{p.WEIGHT})?|"
        r"\w*classification(/\w*kernel|/w(eight)?)?",
        not_in=p.BLOCK + "|tokenizer|pre_?net|quantiz",
    ),
    NameRule("head", rf"(hidden|outputs?)_?(0|to)_?(tags?|labels?|class\w*|vocab\w*)/{p.WEIGHT}"),
    NameRule("head", rf"seg(mentation)?_(layers?|outputs?)(/0)?/{p.WEIGHT}"),
    NameRule("head", rf"{p.ROOT}(out_(layer|proj)|qa_outputs|w_u|(fc|decoder)(?=/))(/{p.WEIGHT})?"),
    *_both("head", f"({p.GENERIC}|{p.OF_POLICY}/)", when=shapes.is_output, not_in=p.BLOCK),
    *_both("head", r"decoder/(\w+_)?proj(ection)?/", (UNDECIDED, None), shapes.is_narrow, p.BLOCK),
    # the outputs of a distribution, of a policy, of a value
    NameRule("distribution", rf"(\w*{p.MOMENT}|(\w+_)?mu)/{p.WEIGHT}", when=lambda s: len(s) == 2),
    NameRule("head", rf"({p.ROOT}(policy|advantage)|{p.OF_POLICY}_decoder)/{p.WEIGHT}"),
    NameRule("head", rf"(predict_\w+|(\w+_)?pred(ict(ion)?s?)?)/{p.WEIGHT}", not_in=p.BLOCK),
    NameRule(
        "head",
        rf"(actions?|state|value|reward|image|img|mask|depth|flow|noise|occlusion)_?out(_?proj\w*)?/{p.WEIGHT}",
    ),
    NameRule("head", p.TRANSPOSED, when=lambda s: len(s) == 4 and shapes.few_channels((*s[:2], s[3], s[2]))),
    *_both("head", "", when=shapes.few_channels, not_in="(^|[/_])se([/_]|$)|squeeze|dfl"),
    NameRule(
        "head",
        rf"({p.LAST_CONV})/([^/]+/)?{p.WEIGHT}",
        when=lambda s: len(s) > 2,
        not_in=p.BLOCK_OF_CONVOLUTIONS + "|attn|atten",
    ),
    NameRule("head", rf"({p.TO_IMAGE})/([^/]+/)?{p.WEIGHT}", not_in=p.BLOCK_OF_CONVOLUTIONS + "|attn|atten"),
    NameRule(
        "dense",
        p.NOT_A_LAYER + p.EMBEDDING + "/(kernel|w|weights)",
        (UNDECIDED, "io"),
        when=lambda s: len(s) == 2 and s[0] == s[1],
        not_in=p.IN_ATTENTION + r"[^/]+/(kernel|w)$",
    ),
    NameRule(
        "embedding",
        p.NOT_A_LAYER + p.EMBEDDING + r"(/[^/]+)?|\w*patch_?embed\w*/.*|cls",
        not_in=p.IN_ATTENTION + r"[^/]+/(kernel|w)$",  # a projection
    ),
    NameRule("embedding", p.TABLE + r"(/(weight|w))?|\w*(queries|codevectors)", not_in=p.ATTENTION),
    NameRule(
        "embedding",
        rf"({p.EMBEDDING}|{p.TABLE})/\w+/(weight|w|table)",
        not_in=p.ATTENTION + "|proj|mlp|dense|emb_layers|embedder(_\\d+)?/linear",
    ),
    NameRule("embedding", r"x_embedder/.*|w_e|w_pos|patch_?proj\w*/.*"),
    NameRule("embedding", r"\w*emb\w*/(kernel|w|weights)", when=shapes.flipped(shapes.is_vocabulary)),
    *_both("embedding", r"\w*emb\w*/(.*/)?", when=shapes.of_image),
    *_both("embedding", "", when=shapes.is_patches),
    # Equinox layers that share a weight, such as an embedding and a head
    NameRule("embedding", r"pytree/\d+/weight|^(model/)?shared/weight"),
    NameRule("router", r"\w*router\w*(/[^/]+){0,2}|switch/" + p.WEIGHT),
    NameRule("router", p.EXPERT_GATE, when=lambda shape: len(shape) != 3 or shapes.few_outputs(shape)),
    NameRule("router", p.EXPERT_GATE, (UNDECIDED,)),
    NameRule("router", r"\w*moe\w*/((\w+_)?gate_)?dense(_\d+)?/kernel", when=shapes.few_outputs),
    NameRule("router", p.GATE + "/weight", when=shapes.few_outputs_first, not_in=p.ATTENTION + "|expert"),
    NameRule("router", p.GATE + "(/(kernel|w))?", when=shapes.few_outputs, not_in=p.ATTENTION + "|expert"),
    NameRule("router", r"experts?/gate/kernel", when=lambda s: len(s) == 2 and shapes.few_outputs(s)),
    # (*window, 1, out): depthwise, or the first convolution of grey images
    NameRule("one channel", p.CONV + "([^/]+/)?" + p.KERNEL, when=lambda s: len(s) > 2 and s[-2] == 1),
    NameRule("one channel", r"(\w+_)?depthwise_kernel"),
    NameRule("one channel", p.CONV + "([^/]+/)?weight", when=lambda s: len(s) > 2 and s[1] == 1),
    *_both("attention", p.QKV + r"/(\w*conv\w*/)?", (UNDECIDED, "iii(3o)"), shapes.three_of_pixels),
    NameRule("convolution", "kernel", ("iiio",), lambda s: s[:-2] == (1, 1), batch_axes=True),
    # (window, channels), of a convolution of each channel by itself
    NameRule(
        "one channel",
        p.CONV + p.KERNEL,
        (UNDECIDED, None),
        lambda s: len(s) == 2 and 16 * s[0] <= s[1],
    ),
    # transposed convolutions of Flax; those of Haiku and Keras have the outputs before the inputs
    NameRule("convolution", p.UP + "kernel", (UNDECIDED, "iio"), when=lambda s: len(s) == 3),
    NameRule("convolution", p.UP + "w", (UNDECIDED, "ioi", "iioi"), when=lambda s: len(s) > 2),
    _convolution_rule(
        p.TRANSPOSED,
        ("ioi", "iioi", "iiioi"),
        shapes.convolution,
    ),
    NameRule("convolution", p.IN_TRANSPOSED, (UNDECIDED, "ioi", "iioi", "iiioi"), lambda s: len(s) > 2),
    _convolution_rule(p.CONV + p.KERNEL, ("iio", "iiio", "iiiio"), shapes.convolution),
    # transposed convolutions: PyTorch has inputs first, Equinox outputs
    NameRule("convolution", p.TRANSPOSED_WEIGHT, (UNDECIDED, "ioi", "ioii", "ioiii"), lambda s: len(s) > 2),
    NameRule("convolution", p.UPWARD, (UNDECIDED, "ioi", "ioii", "ioiii"), shapes.even_window),
    _convolution_rule(p.CONV + "weight", ("oii", "oiii", "oiiii"), shapes.flipped(shapes.convolution)),
    _convolution_rule(
        p.IN_CONV + p.KERNEL,
        ("iio", "iiio", "iiiio"),
        shapes.maybe_convolution,
        p.ATTENTION,
    ),
    _convolution_rule(
        p.IN_CONV + "weight",
        ("oii", "oiii", "oiiii"),
        shapes.flipped(shapes.maybe_convolution),
        p.ATTENTION,
    ),
    NameRule("experts", r"moeblock_\d+/(.*/)?(wi\w*|wo)", ("bio", "bbio"), batch_axes=True),
    _maxtext_rule("attention", p.SCANNED_ATTENTION + r"(query|key|value|wq|wq_b|wkv_b)/kernel", "iboo"),
    _maxtext_rule("attention", p.SCANNED_ATTENTION + "qkv_proj/kernel", "ibboo"),
    _maxtext_rule("attention", p.SCANNED_ATTENTION + "(wq_a|wkv_a)/kernel", "ibo"),
    _maxtext_rule("attention", p.SCANNED_ATTENTION + "out/kernel", "ibio", lambda s: s[0] * s[2] == s[3]),
    # Gemma's pairs of layers: only MaxText uses these names
    _maxtext_rule(
        "attention",
        p.SCANNED + "self_attention_(local|global)/out/kernel",
        "ibio",
        shapes.out_not_layers_first,
    ),
    NameRule(
        "attention",
        p.SCANNED_ATTENTION + "out/kernel",
        (UNDECIDED, "ibio"),
        shapes.out_not_layers_first,
        layout=_MAXTEXT,
    ),
    NameRule("router", p.SCANNED + r"\w*experts?/gate/kernel", (UNDECIDED, None), lambda s: len(s) == 3),
    _maxtext_rule("dense", p.SCANNED_DENSE, "ibo"),
    NameRule("dense", p.SCANNED_DENSE, (UNDECIDED, "ibo"), shapes.maybe_not_layers_first, layout=_MAXTEXT),
    NameRule(
        "experts",
        p.SCANNED + r"(wi\w*|wo)",
        (UNDECIDED, "bbio"),
        shapes.maybe_not_layers_first,
        layout=_MAXTEXT,
    ),
    NameRule(
        "dense",
        p.SCANNED + "[^/]+",
        (UNDECIDED, "ibo", "iboo"),
        shapes.maybe_not_layers_first,
        not_in="experts?/|attention[^/]*/out/",
        layout=_MAXTEXT,
    ),
    NameRule("dense", p.T5X, (UNDECIDED, "ibo"), shapes.no_heads, layout="t5x(scan_axis=1)"),
    # Levanter: heads are axes, and outputs come first
    NameRule(
        "attention",
        p.LEVANTER + "c_attn/weight",
        ("booi",),
        lambda s: shapes.three_before_heads(s[:-1]),
    ),
    NameRule("attention", p.LEVANTER + "c_attn/weight", ("iboo",), shapes.three_before_heads),
    NameRule("attention", p.LEVANTER + r"\w*attn/c_proj/weight", ("oi", "oii")),
    NameRule("attention", p.LEVANTER + "q_proj/weight", ("oi", "ooi", "oooi")),
    NameRule("attention", p.LEVANTER + "[kv]_proj/weight", ("oi", "ooi")),
    NameRule("attention", p.LEVANTER + "o_proj/weight", ("oi", "oii")),
    NameRule("experts", p.LEVANTER + r"experts/(\w+/)?weight", ("io",)),
    # GPT-2 of Hugging Face's Flax: outputs come first
    _gpt2_rule("attention", "(attn|crossattention)/(c_proj|q_attn)", "oi", lambda s: len(s) == 2),
    _gpt2_rule("attention", "crossattention/c_attn", "(2o)i", shapes.flipped(shapes.fused(2))),
    _gpt2_rule("dense", "mlp/c_fc", "oi", lambda s: len(s) == 2 and s[0] > s[1]),
    _gpt2_rule("dense", "mlp/c_proj", "oi", lambda s: len(s) == 2 and s[0] < s[1]),
    # GPT-2 of Hugging Face's PyTorch: inputs come first
    NameRule("attention", "h/0/attn/c_attn/weight", ("i(3o)",), shapes.fused(3)),
    NameRule("attention", "h/0/crossattention/c_attn/weight", ("i(2o)",), shapes.fused(2)),
    NameRule("dense", "h/0/mlp/c_fc/weight", ("io",), lambda s: s[0] < s[1]),
    NameRule("dense", "h/0/mlp/c_proj/weight", ("io",), lambda s: s[0] > s[1]),
    # Gemma: heads are the first axis, and gate and input, of which the inner width is the larger
    NameRule("attention", "q_einsum/(w|kernel)", ("oio",)),
    NameRule("attention", "(kv|qkv)_einsum/(w|kernel)", ("boio",)),
    NameRule("attention", "attn_vec_einsum/(w|kernel)", ("iio",)),
    NameRule("dense", "gating_einsum(/w)?", ("bio",), lambda s: len(s) > 2 and s[-2] < s[-1]),
    NameRule("dense", "gating_einsum(/w)?", ("boi",), lambda s: len(s) > 2 and s[-2] > s[-1]),
    # GEGLU: a gate and its input side by side
    NameRule("dense", r"net_0/proj/kernel", ("i(2o)",), lambda s: s[-1] == 8 * s[-2]),
    # shift, scale and gate of a normalization
    *(
        rule
        for n in (2, 3, 4, 6, 9, 12)
        for rule in _both("dense", p.MODULATION, (UNDECIDED, f"i({n}o)", None), shapes.fused(n), "batch")
    ),
    *_both("dense", p.ADAPTIVE, (UNDECIDED, None)),
    # GPT-NeoX and BLOOM order query, key and value head by head
    NameRule("attention", p.NEOX_QKV, (UNDECIDED, "i(HEADS~3 o)"), shapes.fused(3), layout=_NEOX),
    NameRule("attention", p.NEOX_QKV, (UNDECIDED, "(HEADS~3 o)i"), shapes.fused(3, -2), layout=_NEOX),
    NameRule("attention", p.QKV + r"(/weight|_weight)|in_proj_weight", ("(3o)i",), shapes.fused(3, -2)),
    NameRule("attention", p.QKV + r"(/(kernel|w))?", ("i(3o)",), shapes.fused(3)),
    NameRule("attention", p.QKV + "/kernel", ("ibo",), lambda s: s[1:2] == (3,), batch_axes=True),
    NameRule("attention", p.QKV + "/kernel", ("iboo",), shapes.three_before_heads, batch_axes=True),
    NameRule("attention", p.QKV + "/w", ("bioo",), lambda s: s[0] == 3 and s[2:3] < s[1:2], batch_axes=True),
    *_both("attention", "(to_)?kv/", ("i(2o)",), shapes.has_gates(2)),
    *_both("attention", "(to_)?(kv_proj|qk(_proj)?)/", ("i(2o)",), shapes.fused(2)),
    *_both("attention", "(to_)?kv_proj/", (UNDECIDED, "i(2o)"), shapes.has_two_axes, "compress"),
    NameRule("attention", "_?uvqk", ("i(4o)",), shapes.fused(4)),
    # (model, heads, 3, size)
    NameRule(
        "attention",
        p.QKV + "/kernel",
        ("iobo",),
        lambda s: s[-2:-1] == (3,) != s[-3:-2],
        batch_axes=True,
    ),
    _gpt2_rule("attention", "attn/c_attn", "(3o)i", shapes.fused(3, -2)),
    NameRule("attention", p.QKV + r"(/(kernel|w|weight))?|in_proj_weight", (UNDECIDED,)),
    # Penzai: groups of heads are an axis of their own
    NameRule("attention", "attention/(query|key|value)/weights", ("ioo", "iooo"), shape_ok=shapes.heads),
    NameRule("attention", "attention/output/weights", ("iio", "iiio")),
    NameRule("attention", p.QUERY, (UNDECIDED, "ioo"), shapes.many_heads),
    NameRule("attention", p.QUERY, (UNDECIDED, "ooi"), shapes.only_heads_first),
    NameRule("attention", p.QUERY, ("io", "ioo"), shape_ok=shapes.heads),
    NameRule(
        "attention",
        p.IN_ATTENTION + r"((query|key|value|gating)(_w)?|w?[qkv])",
        ("io", "ioo"),
        shape_ok=shapes.heads,
    ),
    NameRule(
        "attention", "w?(q|k|v|kv)_b(_proj)?(/(kernel|w))?", ("io", "ioo"), shape_ok=shapes.heads_of_latents
    ),
    # (model, heads, size), where outputs come first
    NameRule(
        "attention",
        p.IN_ATTENTION + p.POST,
        (UNDECIDED, "oii"),
        shapes.heads_last,
    ),
    NameRule(
        "attention",
        p.IN_ATTENTION
        + r"((out|proj|\w*o(ut)?_proj|(\w+_)?output(_dense|_proj)?|w?o|c_proj|post)/(kernel|w)|w?o|output_w)",
        ("io", "iio"),
        shape_ok=shapes.heads_first,
    ),
    NameRule("attention", p.IN_ATTENTION + "[^/]+(/(kernel|w))?", (UNDECIDED, "ioo"), shapes.heads_last),
    *(
        rule
        for n, name in ((4, "lstm"), (3, "gru"))
        for rule in (
            NameRule("gates", rf"\w*{name}\w*/(.*/)?weight_[ih]h{p.OF_TORCH}", (f"({n}o)i",)),
            NameRule("gates", rf"\w*{name}\w*/(.*/)?dense_[ih]/kernel", (f"i({n}o)",)),
            NameRule(
                "gates", rf"weight_hh{p.OF_TORCH}|h0h/weight|w_?h?h", (f"({n}o)i",), shapes.fused(n, -2)
            ),
            NameRule("gates", p.RECURRENT, (f"i({n}o)",), shapes.fused(n)),
        )
    ),
    NameRule("gates", r"\w*lstm\w*/(.*/)?linear/w", ("i(4o)",)),
    NameRule("gates", r"\w*gru\w*/(.*/)?w_[ih]", ("i(3o)",)),
    NameRule("gates", rf"\w*cell\w*/dense_i/kernel|weight_[ih]h{p.OF_TORCH}|[xi]0h/{p.WEIGHT}", (UNDECIDED,)),
    NameRule("gates", r"\w*cell\w*/w\w*", (UNDECIDED, "i(4o)"), lambda s: len(s) == 2 and s[0] < s[1]),
    *_both("gates", rf"(\w+_)?gru{p.GATED}/", (UNDECIDED, "i(3o)"), shapes.has_gates(3)),
    *_both("gates", rf"(\w+_)?lstm{p.GATED}/", (UNDECIDED, "i(4o)"), shapes.has_gates(4)),
    # the gates of several GRUs side by side
    NameRule(
        "gates", r"\w*gru\w*/kernel", (UNDECIDED, "bi(3o)"), lambda s: len(s) == 3 and shapes.fused(3)(s)
    ),
    # gate and input in one matrix: side by side, or alternating
    NameRule("dense", p.GATE_AND_UP + "(/kernel)?", (UNDECIDED, "i(2o)", "i(~2 o)", "bi(2o)", "bi(~2 o)")),
    NameRule("dense", p.GATE_AND_UP + "/weight", (UNDECIDED, "(2o)i", "(~2 o)i")),
    # query, key, value and the input of an MLP side by side
    NameRule("dense", p.SEVEN + "/(kernel|w)", (UNDECIDED, "i(1+1+1+4 o)"), shapes.fused(7)),
    NameRule("dense", p.SEVEN + "/weight", (UNDECIDED, "(1+1+1+4 o)i"), shapes.fused(7, -2)),
    NameRule("experts", r"\w*(expert|moe)\w*/([^/]+/)?weight", ("oi",), not_in=p.ATTENTION),
    NameRule("experts", r"\w*(expert|moe)\w*(/[^/]+){0,2}", ("io",), not_in=p.ATTENTION),
    NameRule("one channel", "kernel", when=lambda s: len(s) > 3 and s[-2] == 1),
    NameRule("one channel", "weight", when=lambda s: len(s) > 3 and s[1] == 1),
    NameRule("one channel", "kernel|w", (UNDECIDED, None), shapes.one_channel),
    NameRule("one channel", "weight", (UNDECIDED, None), shapes.flipped(shapes.one_channel)),
    # one row for each of many tokens: an output layer, or a table
    NameRule("embedding", "weight", when=shapes.flipped(shapes.is_vocabulary), not_in=p.BLOCK),
    NameRule("dense", "weight", ("oi", "oiii", "oiiii"), shape_ok=shapes.flipped(shapes.maybe_convolution)),
    NameRule(
        "dense",
        "kernel",
        ("io", "iiio", "iiiio"),
        shape_ok=shapes.maybe_convolution,
        not_in=p.ATTENTION + r"|kv|einsum|mlp|(^|[/_])ffn?([/_]|$)",
    ),
    NameRule("dense", r"b\d*|g", (UNDECIDED, None)),
    NameRule("dense", "output_w", (UNDECIDED, "iio")),
    NameRule("dense", "weight_[vg]", (UNDECIDED, None)),  # of a weight norm
    NameRule("dense", r"\w+_weight", (UNDECIDED, "oi")),
    NameRule("dense", "weight_(mu|mean)", ("oi",)),
    NameRule("dense", p.MATRIX_NAME, ("io",)),
    NameRule("dense", p.LINEAR + "/weights", ("io",)),
    NameRule("dense", "", ("io",)),  # no name at all: a bare array
    NameRule("dense", r"\d+", (UNDECIDED, "io"), shapes.has_two_axes),  # in a list
    NameRule("dense", r"\d+", ("io",)),
    NameRule("dense", p.IN_LAYER + "[^/]+", ("io",), lambda s: len(s) == 2 and min(s) >= 64),
    NameRule("dense", "(pre|post|res)_alpha", ("io",)),  # of hyper-connections
    NameRule("dense", r"w[a-z]{1,3}(_\w+)?", (UNDECIDED, "io")),
    NameRule("dense", "weights", (UNDECIDED, "io"), lambda s: len(s) == 2 and s[0] <= 8 * s[1]),
    NameRule("dense", "weights", (UNDECIDED, "bio"), lambda s: len(s) == 3 and min(s) > 1),
    NameRule("unknown", ".*", (UNDECIDED, None)),
)
"""The rules in order. The first that matches decides."""
