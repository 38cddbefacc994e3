"""A figure as part of a page: inline SVG whose colours are the page's own."""

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


def inline(figure: Figure, name: str, about: str) -> str:
    """The figure as an `<svg>` element with text as text.

    Args:
      figure: drawn in the palette's light colours, each of which becomes a variable of the page's style.
      name: a prefix of all ids, so that several fit on one page.
      about: what is to be seen, for those who do not see it.
    """
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    written = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    body = re.search(r"<svg.*</svg>", written.getvalue(), re.S)
    assert body is not None
    text = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", body[0], flags=re.S)
    text = re.sub(r"\bfont: (\S+) [^;\"]*", r"font-size: \1", text)  # the family is the page's
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    text = re.sub("|".join(VARIABLES), lambda found: VARIABLES[found[0]], text)
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label={quoteattr(about)}', 1)
