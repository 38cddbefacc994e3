"""Equations as MathML, which browsers show without a script: those of docstrings, and LaTeX in notebooks."""

import html
import re

from latex2mathml.converter import convert

_BLOCK = re.compile(r'<div class="highlight"><pre>(?:<span></span>)?<code>(.*?)</code></pre></div>', re.S)
_LINE = re.compile(r"(?P<equation>\S.*?)(?:\s{2,}(?P<number>\(\d+\))(?:\s{2,}(?P<note>.*))?)?")
_LATEX = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.S)
_NO_LATEX = re.compile(r"(<(?:pre|code|script|style)\b.*?</(?:pre|code|script|style)>)", re.S)
_MATHJAX = re.compile(r"<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->", re.S)

_SUPERSCRIPTS, _PLAIN_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ᵏᵗᴴ", "0123456789+−ktH"
_SUBSCRIPTS, _PLAIN_SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉₊₋ₖⱼₛ", "0123456789+−kjs"
_ACCENTS = {"\N{COMBINING CIRCUMFLEX ACCENT}": "^", "\N{COMBINING MACRON}": "¯"}
_TOKEN = re.compile(
    rf"""(?P<space>\s+)|(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)|(?P<word>[a-z]\d[a-z]\d|[a-zA-Z]{{2,}})
    |(?P<letter>[a-zA-Zα-ωΑ-ΩḡÔ])|(?P<above>[{_SUPERSCRIPTS}]+)|(?P<below>[{_SUBSCRIPTS}]+)
    |(?P<accent>[{"".join(_ACCENTS)}])|(?P<mark>.)""",
    re.X,
)
_FENCES = "‖|()[]⟨⟩⌈⌉"


def on_post_page(output, page, config):
    """Replace numbered equations of docstrings, and LaTeX of notebooks."""
    if not page.file.src_uri.startswith("notebooks/"):
        return _BLOCK.sub(_numbered, output)
    parts = _NO_LATEX.split(_MATHJAX.sub("", output))
    return "".join(part if k % 2 else _LATEX.sub(_of_latex, part) for k, part in enumerate(parts))


def _of_latex(match):
    shown, inline = match.groups()
    return convert(html.unescape(shown or inline).strip(), display="block" if shown else "inline")


def _numbered(block):
    """A block in which each paragraph with a numbered equation is a table; a block without any is code."""
    paragraphs = re.split(r"\n\s*\n", block[1].strip("\n"))
    tables = [_table(html.unescape(text)) for text in paragraphs]
    if not any(tables):
        return block[0]
    code = (block[0].replace(block[1], text + "\n") for text in paragraphs)
    return "".join(table or rest for table, rest in zip(tables, code, strict=True))


def _table(text):
    """A row for each equation: the equation, its number, when it holds; None if there are no numbers."""
    lines = [_LINE.fullmatch(line.strip()) for line in text.split("\n")]
    if not any(line["number"] for line in lines):
        return None
    rows = [
        f"<tr><td>{equation(line['equation'])}</td><td>{line['number'] or ''}</td>"
        f"<td>{html.escape(line['note'] or '', quote=False)}</td></tr>"
        for line in lines
    ]
    return f'<table class="equations"><tbody>{"".join(rows)}</tbody></table>'


def equation(text):
    """Mathematics as docstrings write it, such as `v ← β v + (1 - β) g²`, as MathML."""
    tokens = [(match.lastgroup, match[0]) for match in _TOKEN.finditer(text)]
    markup, _ = _row(tokens, 0, "")
    return f"<math>{markup}</math>"


def _row(tokens, k, end):
    """The markup of tokens up to the mark `end`, and the place after it."""
    parts = []
    while k < len(tokens) and tokens[k][1] != end:
        if tokens[k][0] == "space":
            parts.append(_space(tokens, k))
            k += 1
        else:
            markup, k = _with_scripts(tokens, k)
            parts.append(markup)
    return f"<mrow>{''.join(parts)}</mrow>", k + 1


def _space(tokens, k):
    """A space that is seen: beside words, unless an operator has its own, and between two equations."""
    if len(tokens[k][1]) > 1:
        return '<mspace width="1.5em"/>'
    kinds, texts = zip(tokens[k - 1], tokens[k + 1], strict=True)
    operator = any(
        kind == "mark" and text not in _FENCES + "√" for kind, text in zip(kinds, texts, strict=True)
    )
    return '<mspace width="0.3em"/>' if "word" in kinds and not operator else ""


def _with_scripts(tokens, k):
    markup, after = _atom(tokens, k)
    simple = tokens[k][0] == "letter"
    while after < len(tokens):
        kind, text = tokens[after]
        if tokens[k][1] + text == "‖F":
            markup, after = f"<msub>{markup}<mi>F</mi></msub>", after + 1
        elif kind == "above" or text == "'":
            plain = text.translate(str.maketrans(_SUPERSCRIPTS + "'", _PLAIN_SUPERSCRIPTS + "′"))
            markup, after = f"<msup>{markup}<mi>{plain}</mi></msup>", after + 1
        elif kind == "below" or (kind == "number" and simple):
            plain = text.translate(str.maketrans(_SUBSCRIPTS, _PLAIN_SUBSCRIPTS))
            markup, after = f"<msub>{markup}<mi>{plain}</mi></msub>", after + 1
        elif kind == "accent":
            markup, after = f'<mover accent="true">{markup}<mo>{_ACCENTS[text]}</mo></mover>', after + 1
        elif text in ("_", "^"):
            bare = _atom if tokens[after + 1][0] == "letter" else _without_parentheses
            script, after = bare(tokens, after + 1)
            tag = "msub" if text == "_" else "msup"
            markup = f"<{tag}>{markup}{script}</{tag}>"
        else:
            break
        simple = False
    return markup, after


def _atom(tokens, k):
    kind, text = tokens[k]
    if text == "(":
        inner, after = _row(tokens, k + 1, ")")
        return f'<mrow><mo stretchy="false">(</mo>{inner}<mo stretchy="false">)</mo></mrow>', after
    if text == "√":
        inner, after = _without_parentheses(tokens, k + 1)
        return f"<msqrt>{inner}</msqrt>", after
    if kind in ("letter", "word"):
        return f"<mi>{text}</mi>", k + 1
    if kind == "number":
        return f"<mn>{text}</mn>", k + 1
    fence = ' stretchy="false" lspace="0" rspace="0"' if text in _FENCES else ""
    return f"<mo{fence}>{html.escape(text.replace('-', '−'))}</mo>", k + 1


def _without_parentheses(tokens, k):
    if tokens[k][1] == "(":
        return _row(tokens, k + 1, ")")
    return _with_scripts(tokens, k) if tokens[k][1] != "-" else _atom(tokens, k)
