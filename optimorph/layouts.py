"""How the parameters of a framework or a port read as matrices, as rules for `axes`.

    optimorph.muon(0.02, axes=optimorph.layouts.maxtext(scan_axis=1))
    optimorph.muon(0.02, axes={"my_head/*": None} | optimorph.layouts.hf_flax_gpt2())

The default rules decide all other leaves: norms, biases, embeddings and heads.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from optimorph._core.numbers import is_trainable
from optimorph._core.paths import leaf_paths
from optimorph._core.types import PyTree, Shape
from optimorph._routing.name_rules import UNDECIDED
from optimorph._routing.names import by_name, with_layers
from optimorph._routing.resolve import by_siblings
from optimorph.linalg import Axes

__all__ = ["gpt_neox", "hf_flax_gpt2", "maxtext", "per_head", "t5x", "torch"]

Patterns = Mapping[str | re.Pattern[str], str]

_MAXTEXT = {
    r"(MoeBlock_\d+|moe_block|routed_experts|\w*Mlp)/(\w+/)?(wi\w*|wo)": "bio",
    r"(query|key|value|wq|wq_b|wkv_b)/kernel": "ioo",
    r"\w*attention\w*/out/kernel": "iio",
    r"qkv_proj/kernel": "iboo",
    r"(wi\w*|wo|wq_a|wkv_a|(layer_up|up|in|out)_proj\w*)/kernel": "io",
}
"""The last names of a leaf of MaxText → the spec of one layer."""


def maxtext(scan_axis: int | None = 1) -> Patterns:
    """MaxText's decoder layers.

    Args:
      scan_axis: the axis that counts the layers of a scan, `param_scan_axis` of MaxText's configuration; None
        for `scan_layers=False`.
    """
    return {
        re.compile(rf"(^|/)decoder/(.*/)?{names}$"): str(with_layers(spec, scan_axis))
        for names, spec in _MAXTEXT.items()
    }


def t5x(scan_axis: int | None = 1) -> Patterns:
    """T5X's layers, whose heads are one axis with their sizes.

    Args:
      scan_axis: the axis that counts the layers of a scan, `param_scan_axis` of the configuration; None for
        `scan_layers=False`.
    """
    names = r"(\w*attention/(query|key|value|out)|mlp/(wi(_\d+)?|wo))/kernel"
    return {re.compile(rf"(^|/)(en|de)coder/(.*/)?{names}$"): str(with_layers("io", scan_axis))}


def hf_flax_gpt2() -> Patterns:
    """GPT-2 of Hugging Face's Flax, whose outputs come first, unlike those of its other models."""
    return {
        "*crossattention/c_attn/kernel": "(2o)i",
        "*attn/c_attn/kernel": "(3o)i",
        "*attention/q_attn/kernel": "oi",
        "*/c_proj/kernel": "oi",
        "*/c_fc/kernel": "oi",
    }


def gpt_neox(heads: int) -> Patterns:
    """GPT-NeoX and BLOOM, which order query, key and value head by head.

    Args:
      heads: their number. The queries of all heads are one matrix, as are keys and values.
    """
    return {
        "*query_key_value/kernel": f"i({heads}~3 o)",
        "*query_key_value/weight": f"({heads}~3 o)i",
    }


def torch() -> Callable[[str, Shape], Any]:
    """PyTorch's order, outputs before inputs, for every leaf that the default rules take for a matrix."""

    def rule(path: str, shape: Shape) -> Any:
        _, spec = by_name(re.sub(r"(^|[./])(kernel|w)$", r"\1weight", path), shape)
        if spec is None or spec == UNDECIDED:
            return ...
        order = {"b": 0, "o": 1, "i": 2}
        return "".join(map(str, sorted(Axes(spec).parts, key=lambda axis: order[axis.letter])))

    return rule


def per_head(params: PyTree) -> dict[str, str]:
    """Attention's matrices head by head, where the parameters' shapes have an axis of heads.

        muon(0.02, axes=per_head(params))

    Args:
      params: arrays or their shapes.
    """
    pairs = zip(leaf_paths(params), jax.tree.leaves(params), strict=True)
    known = [(path, np.shape(x)) for path, x in pairs if is_trainable(x)]
    found = {}
    for (path, _), (axes, role, *_) in zip(known, by_siblings(*zip(*known, strict=True)), strict=True):
        letters = [] if axes is None or role != "attention" else [axis.letter for axis in axes.parts]
        side = next((letter for letter in "oi" if letters.count(letter) == 2), None)
        if side is not None:
            letters[letters.index(side)] = "b"
            found[path] = "".join(letters)
    return found
