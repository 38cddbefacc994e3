"""The report of a race: curves, tables, learning rates and spectra, in one HTML file that loads no other."""

import importlib.resources
import io
import math
import re
import statistics
import string
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import matplotlib as mpl
from matplotlib.figure import Figure

from optimorph._racing import plot
from optimorph._racing.comparisons import leaders, verdict
from optimorph._racing.palette import DARK, FAINT, INK, LIGHT, PAPER, Style
from optimorph._racing.race_data import RaceData, Trial
from optimorph._racing.table import notes, table_rows

WIDE, SMALL = (5.0, 3.8), (2.4, 2.0)  # plot sizes in inches
DASH_ARRAYS = {"-": "none", "--": "7 3", "-.": "8 3 2 3", ":": "2 3"}
VARIABLES = {
    INK[0]: "var(--ink)",
    FAINT[0]: "var(--faint)",
    **{color: f"var(--c{k})" for k, color in enumerate(LIGHT)},
}
"""Colour of the light palette → CSS variable."""


def write_html(path: Path, race: RaceData) -> None:
    """Write the report. It follows the reader's light or dark scheme, and fits narrow screens."""
    template = importlib.resources.files("optimorph._racing").joinpath("html_report.html").read_text()
    with mpl.rc_context(plot.SETTINGS):
        parts = ((race.rows, _losses), (race.trials, _rates), (race.spectra, _spectra))
        sections = [section(race) for data, section in parts if data]
    text = string.Template(template).substitute(
        title=escape(race.title),
        lead=re.sub(r"\d[\d.]*e-\d+", r"<span>\g<0></span>", escape(verdict(race))),
        light=_css_variables(0, LIGHT),
        dark=_css_variables(1, DARK),
        sections="\n".join(sections),
        footer=f"<p>{escape(notes(race)[-1])}</p>" if race.rows else "",
    )
    path.write_text(text, encoding="utf-8")


def _losses(race: RaceData) -> str:
    heads, *rows = table_rows(race)
    seeds = " Means over the seeds; each seed is a thin line." if race.seeds > 1 else ""
    about = "A line chart of {} over {}; the table below has the final values."
    plots = [
        _svg(f"loss-{along}", about.format(race.measure, along), plot.draw_losses, WIDE, race, along)
        for along in ("steps", "seconds")
    ]
    names = [row.name for row in race.rows]
    return _section(
        "curves",
        "The loss",
        _figure(race, names, plots, f"{race.measure}, best first.{seeds}"),
        _table(race, heads, rows, " ".join(notes(race)[:-1]), bold=len(leaders(race.rows))),
    )


def _rates(race: RaceData) -> str:
    tried = {trial.optimizer for trial in race.trials}
    names = [name for name in race.names if name in tried]
    rows = [(name, *_best([t for t in race.trials if t.optimizer == name])) for name in names]
    note = "A cross at the top marks a learning rate with which training diverged."
    if any(trial.others is not None for trial in race.trials):
        note = f"Each point is the best over the rates tried for embeddings, head and norms. {note}"
    svg = _svg("rates", "A line chart of final loss over learning rate.", plot.draw_rates, WIDE, race)
    heads = ("optimizer", "best rate", "its loss", "rates within 5 %")
    return _section(
        "rates",
        "How much the learning rate matters",
        _figure(race, names, [svg], note),
        _table(race, heads, rows, "Learning rates tried."),
    )


def _best(trials: list[Trial]) -> tuple[str, str, str]:
    """The best learning rate, its loss, and how many learning rates have a loss within 5 % of it."""
    losses = plot.best_losses(trials)
    rate = min(losses, key=losses.__getitem__)
    lowest = losses[rate]
    if not math.isfinite(lowest):
        return "none", "diverged", f"0 of {len(losses)}"
    near = sum(loss <= lowest + 0.05 * abs(lowest) for loss in losses.values())
    return f"{rate:.3g}", f"{lowest:.4g}", f"{near} of {len(losses)}"


def _spectra(race: RaceData) -> str:
    layers = list(dict.fromkeys(spectrum.layer for spectrum in race.spectra))
    plotted = plot.plotted_layers(layers)
    shares: dict[str, list[float]] = {name: [] for name in race.names}
    for spectrum in race.spectra:
        full_rank = min(spectrum.rows, spectrum.columns)
        shares[spectrum.optimizer].append(spectrum.effective_rank / full_rank)
    shares = {name: values for name, values in shares.items() if values}
    rows = [
        (name, *(f"{100 * x:.0f} %" for x in (statistics.median(values), min(values), max(values))))
        for name, values in shares.items()
    ]
    note = (
        "Singular values of the last update of the first seed, divided by the largest, in order from the "
        "first (0) to the last (1). An update with a flat line moves the weights in all directions alike; "
        "one with a steep line moves them in few directions."
    )
    if len(plotted) < len(layers):
        note += f" The plots show {len(plotted)} of {len(layers)} layers."
    about = "A line chart of the singular values of each optimizer's update of"
    plots = [
        _svg(f"spectrum-{k}", f"{about} {layer[0]}.", plot.draw_spectrum, SMALL, race, layer)
        for k, layer in enumerate(plotted)
    ]
    caption = (
        "Effective rank (the exponential of the spectrum's entropy) as a share of full rank, over all layers."
    )
    return _section(
        "spectra",
        "How many directions an update has",
        _figure(race, list(shares), plots, note, "small"),
        _table(race, ("optimizer", "median", "lowest", "highest"), rows, caption),
    )


def _svg(
    name: str, description: str, draw: Callable[..., None], size: tuple[float, float], *args: Any
) -> str:
    """A plot as an `<svg>` element, with text as text, and CSS variables for the colours of the palette.

    All ids begin with `name`, so that several plots fit on one page. The description is for readers who do
    not see the plot.
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    draw(axes, *args)
    for drawn in (figure, axes):
        drawn.patch.set_visible(False)
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


def _section(name: str, title: str, *parts: str) -> str:
    body = "\n".join(parts)
    return f'<section aria-labelledby="{name}-title">\n<h2 id="{name}-title">{title}</h2>\n{body}\n</section>'


def _figure(
    race: RaceData, names: Sequence[str], plots: Sequence[str], caption: str, size: str = "wide"
) -> str:
    legend = "".join(f"<li>{_legend(name, race.styles[name])}</li>" for name in names)
    return (
        f'<figure>\n<ul class="legend">{legend}</ul>\n<div class="{size} plots">\n'
        + "\n".join(plots)
        + f"\n</div>\n<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )


def _table(
    race: RaceData, heads: Sequence[str], rows: Iterable[Sequence[str]], caption: str, bold: int = 0
) -> str:
    """A table. The first cell of each row names an optimizer, and the first `bold` rows are bold.

    On a narrow screen the column heads are hidden, and each cell shows its own.
    """
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    labels = [quoteattr(" ".join(head.split())) for head in heads[1:]]
    lines = (
        f'<tr{" class=first" if k < bold else ""}><th scope="row">{_legend(name, race.styles[name])}</th>'
        + "".join(f"<td data-head={h}>{escape(c)}</td>" for h, c in zip(labels, cells, strict=True))
        + "</tr>"
        for k, (name, *cells) in enumerate(rows)
    )
    return (
        f"<table>\n<caption>{escape(caption)}</caption>\n"
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>"
    )


def _legend(name: str, style: Style) -> str:
    """A name, and before it a sample of its line."""
    line = (
        f'<line x1="0" y1="6" x2="36" y2="6" stroke="{VARIABLES[style.color]}" stroke-width="3" '
        f'stroke-dasharray="{DASH_ARRAYS[style.linestyle]}"/>'
    )
    return f'<svg viewBox="0 0 36 12" aria-hidden="true">{line}</svg>{escape(name)}'


def _css_variables(scheme: int, colors: Sequence[str]) -> str:
    named = {"paper": PAPER[scheme], "ink": INK[scheme], "faint": FAINT[scheme]}
    named |= {f"c{k}": color for k, color in enumerate(colors)}
    return " ".join(f"--{name}: {color};" for name, color in named.items())
