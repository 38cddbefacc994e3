"""Line styles of optimizers, in colours that colour-blind readers can distinguish, on white and on black."""

from collections.abc import Sequence
from typing import NamedTuple

# A search maximized the smallest difference of two colours in OKLab, under normal sight, protanopia,
# deuteranopia and tritanopia (Machado, Oliveira & Fernandes 2009), at a contrast of 3 : 1 or more.
LIGHT = ("#7e3bb2", "#4f1f31", "#de62a8", "#9d8d0a", "#1e82fd", "#296562", "#1d2579", "#b80c05")
DARK = ("#8e76ab", "#c19393", "#f6a6fd", "#f8f832", "#affcfd", "#5add6d", "#6587f9", "#f14b09")
PAPER = ("#ffffff", "#15181c")
INK = ("#1c1e21", "#e6e8eb")
FAINT = ("#c9ccd1", "#454a51")
DASHES = ("-", "--", "-.", ":")


class Style(NamedTuple):
    """How an optimizer is drawn in every plot."""

    color: str
    linestyle: str


_ALL = [Style(LIGHT[-1 - k % 8], DASHES[(k + k // 8) % 4]) for k in range(32)]

_NAMES = (
    *("muon", "adamw", "adam", "rmsprop", "adagrad", "nesterov", "momentum", "sgd"),
    *("scion", "ademamix", "muon2", "adamuon", "normuon", "muonh", "mars_adamw", "soap"),
    *("soap_muon", "adamh", "lion", "nadamw", "laprop", "nadam", "klsoap", "shampoo"),
)  # each row has every colour at most once, and so has the default race
OPTIMIZERS: dict[str, Style] = dict(zip(_NAMES, _ALL, strict=False))
"""Name → its style in every plot of the project."""


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Name → style.

    A name in `OPTIMIZERS` has the style given there. The other names get the remaining styles in turn;
    styles whose colour is not in use come first.
    """
    fixed = {name: OPTIMIZERS[name] for name in names if name in OPTIMIZERS}
    used = {style.color for style in fixed.values()}
    free = sorted(_ALL[len(OPTIMIZERS) :], key=lambda style: style.color in used)
    others = [name for name in names if name not in OPTIMIZERS]
    return fixed | {name: free[k % len(free)] for k, name in enumerate(others)}
