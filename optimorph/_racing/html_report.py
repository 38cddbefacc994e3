"""The race as one page: curves, table, learning rates and spectra, in a file that needs no other."""

import importlib.resources
import math
import re
import statistics
import string
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from xml.sax.saxutils import quoteattr

import matplotlib as mpl

from optimorph._racing import plot
from optimorph._racing.palette import DARK, FAINT, INK, LIGHT, PAPER, Style
from optimorph._racing.record import Record, Trial
from optimorph._racing.svg import VARIABLES, inline
from optimorph._racing.table import cells, notes
from optimorph._racing.verdict import leaders, verdict

WIDE, SMALL = (5.0, 3.8), (2.4, 2.0)  # inches of a picture
DASH_ARRAYS = {"-": "none", "--": "7 3", "-.": "8 3 2 3", ":": "2 3"}


def write_html(path: Path, record: Record, styles: dict[str, Style]) -> None:
    """Write the page. It follows the reader's light or dark scheme, and narrow screens get one column."""
    page = string.Template(importlib.resources.files("optimorph._racing").joinpath("page.html").read_text())
    with mpl.rc_context(plot.SETTINGS):
        sections = [_losses(record, styles), _rates(record, styles), _spectra(record, styles)]
    text = page.substitute(
        title=escape(record.title),
        lead=re.sub(r"\d[\d.]*e-\d+", r"<span>\g<0></span>", escape(verdict(record))),
        light=_variables(0, LIGHT),
        dark=_variables(1, DARK),
        sections="\n".join(filter(None, sections)),
        footer="\n".join(f"<p>{escape(note)}</p>" for note in (notes(record)[-1:] if record.rows else [])),
    )
    path.write_text(text, encoding="utf-8")


def _losses(record: Record, styles: dict[str, Style]) -> str:
    if not record.rows:
        return ""
    heads, *lines = cells(record)
    rows = [(_named(name, styles), *map(escape, rest)) for name, *rest in lines]
    shaded = " Means over the seeds, their range shaded." if record.seeds > 1 else ""
    pictures = [
        inline(
            plot.panel(plot.loss, WIDE, record, styles, along),
            f"loss-{along}",
            f"A line chart of {record.measure} over {along}; the table below has the final values.",
        )
        for along in ("steps", "seconds")
    ]
    return _section(
        "curves",
        "The loss",
        _figure(
            pictures, [row.name for row in record.rows], styles, f"{record.measure}, best first.{shaded}"
        ),
        _table(heads, rows, " ".join(notes(record)[:-1]), bold=len(leaders(record.rows))),
    )


def _rates(record: Record, styles: dict[str, Style]) -> str:
    if not record.trials:
        return ""
    found = {name: [each for each in record.trials if each.optimizer == name] for name in record.names}
    found = {name: tried for name, tried in found.items() if tried}
    rows = [(_named(name, styles), *map(escape, _best(tried))) for name, tried in found.items()]
    several = any(trial.others is not None for trial in record.trials)
    note = "Each point is the best over the rates tried for embeddings, head and norms. " if several else ""
    note += "A cross at the top marks a learning rate with which training diverged."
    picture = inline(
        plot.panel(plot.rates, WIDE, record, styles),
        "rates",
        "A line chart of final loss over learning rate.",
    )
    return _section(
        "rates",
        "How much the learning rate matters",
        _figure([picture], list(found), styles, note),
        _table(("optimizer", "best rate", "its loss", "rates within 5 %"), rows, "Learning rates tried."),
    )


def _best(trials: Sequence[Trial]) -> tuple[str, str, str]:
    """The best rate, its loss, and how many of the rates came near it."""
    tried = plot.envelope(list(trials))
    rate = min(tried, key=tried.__getitem__)
    near = sum(loss <= tried[rate] + 0.05 * abs(tried[rate]) for loss in tried.values())
    if not math.isfinite(tried[rate]):
        return "none", "diverged", f"0 of {len(tried)}"
    return f"{rate:.3g}", f"{tried[rate]:.4g}", f"{near} of {len(tried)}"


def _spectra(record: Record, styles: dict[str, Style]) -> str:
    if not record.spectra:
        return ""
    all_, some = set(map(plot.layer_of, record.spectra)), plot.shown(record.spectra)
    shares = {
        name: [x.effective_rank / min(x.rows, x.columns) for x in record.spectra if x.optimizer == name]
        for name in record.names
    }
    shares = {name: some for name, some in shares.items() if some}
    rows = [
        (_named(name, styles), *(f"{100 * x:.0f} %" for x in (statistics.median(each), min(each), max(each))))
        for name, each in shares.items()
    ]
    note = "Singular values of the last update of the first seed, divided by the largest, in order from the "
    note += (
        "first (0) to the last (1). An update with a flat line moves the weights in all directions alike; "
    )
    note += "one with a steep line moves them in few."
    note += f" The pictures show {len(some)} of {len(all_)} layers." if len(some) < len(all_) else ""
    pictures = [
        inline(
            plot.panel(plot.spectrum, SMALL, record, styles, layer),
            f"spectrum-{k}",
            f"A line chart of the singular values of each optimizer's update of {layer[0]}.",
        )
        for k, layer in enumerate(some)
    ]
    caption = (
        "Effective rank (the exponential of the spectrum's entropy) as a share of full rank, over all layers."
    )
    return _section(
        "spectra",
        "How many directions an update has",
        _figure(pictures, list(shares), styles, note, "small"),
        _table(("optimizer", "median", "lowest", "highest"), rows, caption),
    )


def _section(name: str, title: str, *parts: str) -> str:
    body = "\n".join(parts)
    return f'<section aria-labelledby="{name}-title">\n<h2 id="{name}-title">{title}</h2>\n{body}\n</section>'


def _figure(
    pictures: Sequence[str], names: Sequence[str], styles: dict[str, Style], caption: str, kind: str = "wide"
) -> str:
    legend = "".join(f"<li>{_named(name, styles)}</li>" for name in names)
    return (
        f'<figure>\n<ul class="legend">{legend}</ul>\n<div class="{kind} pictures">\n'
        + "\n".join(pictures)
        + f"\n</div>\n<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str, bold: int = 0) -> str:
    """A table of rows that are HTML already; the first `bold` of them are bold.

    The first cell of a row is its heading. On a narrow screen the column heads are hidden, and each cell
    shows its own.
    """
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    lines = (
        f'<tr{" class=first" if k < bold else ""}><th scope="row">{first}</th>'
        + "".join(
            f"<td data-head={quoteattr(' '.join(head.split()))}>{cell}</td>"
            for head, cell in zip(heads[1:], rest, strict=True)
        )
        + "</tr>"
        for k, (first, *rest) in enumerate(rows)
    )
    return (
        f"<table>\n<caption>{escape(caption)}</caption>\n"
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>"
    )


def _named(name: str, styles: dict[str, Style]) -> str:
    """A name beside a piece of its line."""
    style = styles[name]
    line = (
        f'<line x1="0" y1="6" x2="36" y2="6" stroke="{VARIABLES[style.color]}" stroke-width="3" '
        f'stroke-dasharray="{DASH_ARRAYS[style.dash]}"/>'
    )
    return f'<svg viewBox="0 0 36 12" aria-hidden="true">{line}</svg>{escape(name)}'


def _variables(k: int, colors: Sequence[str]) -> str:
    named = {"paper": PAPER[k], "ink": INK[k], "faint": FAINT[k]}
    named |= {f"c{i}": color for i, color in enumerate(colors)}
    return " ".join(f"--{name}: {color};" for name, color in named.items())
