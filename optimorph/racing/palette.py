"""Colours that stay apart for all eyes, on white and on black, and a dash for whoever sees none."""

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


def styles(names: list[str]) -> dict[str, Style]:
    """A style a name: the last name has the strongest, and thirty-two pass before one returns."""
    return {
        name: Style(LIGHT[-1 - k % 8], DASHES[(k + k // 8) % 4]) for k, name in enumerate(reversed(names))
    }
