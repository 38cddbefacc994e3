"""Colours that stay apart for all eyes, on white and on black, and a dash for whoever sees none."""

from collections.abc import Sequence
from typing import NamedTuple

# Found by a search for the largest least difference, in OKLab, of any two under normal sight, protanopia,
# deuteranopia and tritanopia (Machado, Oliveira & Fernandes 2009), at a contrast of 3 : 1 or more.
LIGHT = ("#7e3bb2", "#4f1f31", "#de62a8", "#9d8d0a", "#1e82fd", "#296562", "#1d2579", "#b80c05")
DARK = ("#8e76ab", "#c19393", "#f6a6fd", "#f8f832", "#affcfd", "#5add6d", "#6587f9", "#f14b09")
PAPER = ("#ffffff", "#15181c")
INK = ("#1c1e21", "#e6e8eb")
FAINT = ("#c9ccd1", "#454a51")
DASHES = ("-", "--", "-.", ":")


class Style(NamedTuple):
    """How an optimizer is drawn in all pictures."""

    color: str
    dash: str


_ALL = [Style(LIGHT[-1 - k % 8], DASHES[(k + k // 8) % 4]) for k in range(32)]

OPTIMIZERS: dict[str, Style] = dict(
    zip(("muon", "adamw", "adam", "rmsprop", "adagrad", "nesterov", "momentum", "sgd"), _ALL, strict=False)
)
"""Name → its style, the same in every picture of the project."""


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Name → style.

    Names in `OPTIMIZERS` keep theirs. The other names get the twenty-four remaining styles in turn, first
    those whose colour no name has yet.
    """
    found = {name: OPTIMIZERS[name] for name in names if name in OPTIMIZERS}
    taken = {style.color for style in found.values()}
    left = sorted(_ALL[8:], key=lambda style: style.color in taken)
    others = [name for name in names if name not in OPTIMIZERS]
    return found | {name: left[k % len(left)] for k, name in enumerate(others)}
