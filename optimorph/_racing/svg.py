"""A figure as inline SVG, which takes its colours from the page around it."""

import io
import re
from xml.sax.saxutils import quoteattr

import matplotlib as mpl
from matplotlib.figure import Figure

from optimorph._racing.palette import FAINT, INK, LIGHT

VARIABLES = {
    INK[0]: "var(--ink)",
    FAINT[0]: "var(--faint)",
    **{color: f"var(--c{k})" for k, color in enumerate(LIGHT)},
}
"""Colour of the light palette → CSS variable."""


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element, with text as text.

    Args:
      figure: a figure in the light colours of the palette; each becomes a CSS variable.
      name: a prefix of all ids, so that several figures fit on one page.
      description: what the figure shows, for readers who do not see it.
    """
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", svg, flags=re.S)
    svg = re.sub(r"\bfont: (\S+) [^;\"]*", r"font-size: \1", svg)  # the page sets the font family
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = re.sub("|".join(VARIABLES), lambda match: VARIABLES[match[0]], svg)
    for attribute in ("width", "height"):
        svg = re.sub(rf'(<svg\b[^>]*?) {attribute}="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label={quoteattr(description)}', 1)
