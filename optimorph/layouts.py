"""Rules for the argument `axes`: how the parameters of a framework or a ported model read as matrices.

    optimorph.muon(0.02, axes=optimorph.layouts.maxtext(scan_axis=1))
    optimorph.muon(0.02, axes={"my_head/*": None} | optimorph.layouts.hf_flax_gpt2())

The default rules decide all other leaves: norms, biases, embeddings and heads.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from optimorph._core.checks import abbreviated, is_integer
from optimorph._core.numbers import is_array, is_trainable
from optimorph._core.paths import leaf_paths
from optimorph._core.shown import shown
from optimorph._core.types import AxesRules, PyTree, Shape
from optimorph._core.warn import warn
from optimorph._routing.grouping import glob_of, group_by, without_numbers
from optimorph._routing.leaf_spec import HEAD
from optimorph._routing.name_patterns import WEIGHT
from optimorph._routing.name_rule import UNDECIDED
from optimorph._routing.names import by_name, with_layers
from optimorph._routing.resolve import resolve_leaves
from optimorph.linalg import Axes

__all__ = ["gpt_neox", "hf_flax_gpt2", "maxtext", "per_head", "t5x", "torch"]
__dir__ = __all__.copy  # dir() shows the public names alone

Patterns = Mapping[str | re.Pattern[str], str]

_MAXTEXT = {
    r"(MoeBlock_\d+|moe_block|routed_experts|\w*Mlp)/(\w+/)?(wi(_\d+)?|wo)": "bio",
    r"(query|key|value|wq|wq_b|wkv_b)/kernel": "ioo",
    r"\w*attention\w*/out/kernel": "iio",
    r"qkv_proj/kernel": "iboo",
    r"(wi\w*|wo|wq_a|wkv_a|(layer_up|up|in|out)_proj\w*)/kernel": "io",
}
"""The last names of a leaf of MaxText → the spec of one layer."""


def _check_axis(who: str, scan_axis: int | None) -> None:
    if scan_axis is not None and (not is_integer(scan_axis, 0) or scan_axis > 2):
        raise ValueError(
            f"{who}: scan_axis is {shown(scan_axis)}, but of stacked matrices it is 0, 1 or 2. "
            "Type scan_axis=1, or None."
        )


def maxtext(scan_axis: int | None = 1) -> Patterns:
    """Rules for the decoder layers of MaxText.

    Args:
      scan_axis: the axis that counts the layers of a scan, `param_scan_axis` of MaxText's configuration; None
        for `scan_layers=False`.
    """
    _check_axis("maxtext", scan_axis)
    return {
        re.compile(rf"(^|/)decoder/(.*/)?{names}$"): str(with_layers(spec, scan_axis))
        for names, spec in _MAXTEXT.items()
    }


def t5x(scan_axis: int | None = 1) -> Patterns:
    """Rules for the layers of T5X, in which heads and their sizes are one axis.

    Args:
      scan_axis: the axis that counts the layers of a scan, `param_scan_axis` of the configuration; None for
        `scan_layers=False`.
    """
    _check_axis("t5x", scan_axis)
    names = r"(\w*attention/(query|key|value|out)|mlp/(wi(_\d+)?|wo))/kernel"
    return {re.compile(rf"(^|/)(en|de)coder/(.*/)?{names}$"): str(with_layers("io", scan_axis))}


def hf_flax_gpt2() -> Patterns:
    """Rules for the Flax GPT-2 of Hugging Face, whose kernels are (outputs, inputs), unlike other models'."""
    return {
        "*crossattention/c_attn/kernel": "(2o)i",
        "*attn/c_attn/kernel": "(3o)i",
        "*attention/q_attn/kernel": "oi",
        "*/c_proj/kernel": "oi",
        "*/c_fc/kernel": "oi",
    }


def gpt_neox(heads: int) -> Patterns:
    """Rules for GPT-NeoX and BLOOM, which order query, key and value head by head.

    Args:
      heads: the number of heads. The queries of all heads are one matrix, and so are the keys and the values.
    """
    if not is_integer(heads, 1):
        raise ValueError(f"gpt_neox: heads must be an integer above 0, but is {shown(heads)}. Type heads=12.")
    return {
        "*query_key_value/kernel": f"i({heads}~3 o)",
        "*query_key_value/weight": f"({heads}~3 o)i",
    }


def torch() -> Callable[[str, Shape], Any]:
    """A rule for PyTorch's order: every `kernel`, `w`, `wq`, ... is (outputs, inputs).

    The default rules read a `weight` so, and also decide parameters of other names, such as stacked experts.
    """

    def rule(path: str, shape: Shape) -> Any:
        as_weight = re.sub(r"(?<![^./])(kernel|w\w?)$", "weight", path)
        _, spec = by_name(as_weight, shape)
        if as_weight == path or spec is None or spec == UNDECIDED:
            return ...
        order = {"b": 0, "o": 1, "i": 2}
        return "".join(map(str, sorted(Axes(spec).parts, key=lambda axis: order[axis.letter])))

    return rule


def per_head(params: PyTree, axes: AxesRules | None = None) -> dict[str, Any]:
    """Make each head of attention a matrix of its own, if the parameters have an axis of heads.

        muon(0.02, axes=per_head(params))
        muon(0.02, axes=per_head(params, {"*/wq": "ioo", "*/wo": "iio"}))

    In latent attention each head of `kv_b` (rank, heads, size) holds a key and a value. They become two
    matrices if their sizes follow from the output projection (heads, size of a value, width). If heads and
    their sizes share one axis, `per_head` warns: type the spec with blocks, such as `i(12o)`.

    Args:
      params: the parameters or their shapes.
      axes: rules as in `muon`, which are kept except for the heads. The default rules decide other leaves.
    """
    pairs = [*zip(leaf_paths(params), jax.tree.leaves(params), strict=True)]
    known = {path: np.shape(x) for path, x in pairs if is_trainable(x)}
    if pairs and not any(is_array(x) for _, x in pairs):
        raise ValueError(f"per_head: params has no arrays, but is {shown(params)}. Type the parameters.")
    resolved = resolve_leaves("per_head", axes)([*known], [*known.values()])
    specs = {path: spec for path, spec in zip(known, resolved, strict=True) if spec.unresolved is None}
    of_output = [path for path, spec in specs.items() if _letters(spec.axes).replace("b", "") == "iio"]
    outputs = {_module(path): known[path][-2] for path in of_output}
    ruled = {path: spec for path, spec in specs.items() if spec.role == HEAD or spec.role.startswith("rule")}
    found = {
        path: HEAD if spec.role == HEAD else spec.axes for path, spec in ruled.items() if axes is not None
    }
    whole = []
    for path, spec in specs.items():
        if spec.axes is not None and (by_name(path, known[path])[0] == "attention" or _OF_HEADS.search(path)):
            letters = _letters(spec.axes)
            heads = [k for k, x in enumerate(letters) if x in "io" and x in letters[k + 1 :]]
            parts = ["b" if k in heads else str(axis) for k, axis in enumerate(spec.axes.parts)]
            if _KEY_AND_VALUE.search(path) and parts[-1] == "o" and heads and _module(path) in outputs:
                size, value = known[path][-1], outputs[_module(path)]
                parts[-1] = f"({size - value}+{value} o)" if value < size else "o"
            found |= {path: "".join(parts)} if heads else {}
            whole += [] if heads or path in ruled or _LATENT.search(path) else [path]
    if whole:
        kinds = [repr(glob_of(group)) for group in group_by(whole, without_numbers)]
        warn(
            f"per_head: heads and their sizes share an axis of {abbreviated(kinds, ', ')}. These stay whole. "
            f"Type the number of heads, such as axes={{{kinds[0]}: 'i(12o)'}} for 12 heads of outputs, or "
            "'(12i)o' of inputs.",
            stacklevel=2,
        )
    return found


_LATENT = re.compile(r"(q|kv)_a(_|/|$)")
_KEY_AND_VALUE_B = r"(^|/)w?kv_b(_proj)?(/(kernel|weight))?$"
_OF_HEADS = re.compile(r"attn/[qkv]_(b_)?proj/(kernel|weight|w)$|" + _KEY_AND_VALUE_B)
_KEY_AND_VALUE = re.compile(_KEY_AND_VALUE_B)


def _letters(axes: Axes | None) -> str:
    return "".join(axis.letter for axis in axes.parts) if axes is not None else ""


def _module(path: str) -> str:
    """The module of attention, of a leaf that is the kernel of one of its layers."""
    return re.sub(rf"/[^/]+(/{WEIGHT})?$", "", path)
