"""The race as one page: curves, table, learning rates and spectra, in a file that needs no other."""

import importlib.resources
import math
import statistics
import string
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from optimorph.racing import plot
from optimorph.racing.palette import DARK, FAINT, INK, LIGHT, PAPER, Style
from optimorph.racing.record import Record, Trial
from optimorph.racing.svg import VARIABLES, inline
from optimorph.racing.table import cells, notes

DASH_ARRAYS = {"-": "none", "--": "7 3", "-.": "8 3 2 3", ":": "2 3"}


def write_html(path: Path, record: Record, styles: dict[str, Style]) -> None:
    """Light where the reader's screen is light, dark where it is dark."""
    page = string.Template(importlib.resources.files("optimorph.racing").joinpath("page.html").read_text())
    with mpl.rc_context(plot.SETTINGS):
        sections = [_losses(record, styles), _rates(record, styles), _spectra(record, styles)]
    text = page.substitute(
        title=escape(record.title),
        lead=escape(lead(record)),
        light=_variables(0, LIGHT),
        dark=_variables(1, DARK),
        sections="\n".join(filter(None, sections)),
        footer="\n".join(f"<p>{escape(note)}</p>" for note in (notes(record)[-1:] if record.rows else [])),
    )
    path.write_text(text, encoding="utf-8")


def lead(record: Record) -> str:
    """Who won, in a sentence."""
    stopped = "" if record.finished else "Stopped early. "
    standing = [row for row in record.rows if not row.diverged]
    if not standing:
        tried = len(record.trials)
        return stopped + ("Every training blew up." if record.rows else f"{tried} learning rates were tried.")
    first, *others = standing
    second = f", before {others[0].name} at {others[0].loss:.4g}" if others else ""
    where = f"{record.measure}, {first.steps} steps"
    return f"{stopped}{first.name} ends lowest, at {first.loss:.4g}{second}; {where}."


def _losses(record: Record, styles: dict[str, Style]) -> str:
    if not record.rows:
        return ""
    about = f"Two line charts of {record.measure}, over steps and over seconds; the table below has the ends."
    heads, *lines = cells(record)
    caption = " ".join(notes(record)[:-1])
    rows = [(_named(name, styles), *map(escape, rest)) for name, *rest in lines]
    shaded = " Means over the seeds, their range shaded." if record.seeds > 1 else ""
    return _section(
        "curves",
        "The loss",
        _figure("curves", plot.losses(record, styles), about, f"{record.measure}, best first.{shaded}"),
        _table(heads, rows, caption, ranked=True),
    )


def _rates(record: Record, styles: dict[str, Style]) -> str:
    if not record.trials:
        return ""
    found: dict[str, list[Trial]] = {}
    for trial in record.trials:
        found.setdefault(trial.optimizer, []).append(trial)
    rows = [(_named(name, styles), *map(escape, _best(trials))) for name, trials in found.items()]
    several = any(trial.others is not None for trial in record.trials)
    note = "Of several rates for embeddings, head and norms, the best. " if several else ""
    note += "A cross above: the loss is no longer a number."
    return _section(
        "rates",
        "How much the learning rate matters",
        _figure("rates", plot.rates(record, styles), "A line chart of final loss over learning rate.", note),
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
    all_, some = {(each.path, each.rows, each.columns) for each in record.spectra}, plot.shown(record.spectra)
    shares: dict[str, list[float]] = {}
    for each in record.spectra:
        shares.setdefault(each.optimizer, []).append(each.effective_rank / min(each.rows, each.columns))
    ordered = sorted(shares.items(), key=lambda pair: -statistics.median(pair[1]))
    rows = [
        (_named(name, styles), *(f"{100 * x:.0f} %" for x in (statistics.median(each), min(each), max(each))))
        for name, each in ordered
    ]
    which = "The last update" if record.finished else "An update"
    note = f"A flat line moves every direction alike, a steep one few. {which} of the first seed"
    note += f", {len(some)} of {len(all_)} layers." if len(some) < len(all_) else "."
    about = "Line charts, one a layer, of the singular values of each optimizer's update over the largest."
    caption = "Effective rank (the exponential of the spectrum's entropy) over full rank, across layers."
    return _section(
        "spectra",
        "How many directions an update has",
        _figure("spectra", plot.spectra(record, styles), about, note),
        _table(("optimizer", "median", "lowest", "highest"), rows, caption),
    )


def _section(name: str, title: str, *parts: str) -> str:
    body = "\n".join(parts)
    return f'<section aria-labelledby="{name}-title">\n<h2 id="{name}-title">{title}</h2>\n{body}\n</section>'


def _figure(name: str, figure: Figure, about: str, caption: str) -> str:
    return f"<figure>\n{inline(figure, name, about)}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]], caption: str, ranked: bool = False) -> str:
    """`rows` are HTML already; the first of each names it."""
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    lines = (
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    kind = "table ranked" if ranked else "table"
    return (
        f'<div class="{kind}">\n<table>\n<caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>\n</div>"
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
