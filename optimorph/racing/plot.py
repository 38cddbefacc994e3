"""The pictures of a race: losses, learning rates, spectra. Drawn in the palette's light colours."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optimorph.racing.palette import FAINT, INK, Style
from optimorph.racing.record import Curve, Record, Spectrum, Trial

PANELS = 24  # layers whose spectra are shown, spread over all
SETTINGS: Any = {
    "axes.edgecolor": FAINT[0],
    "axes.labelcolor": INK[0],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "grid.color": FAINT[0],
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "lines.linewidth": 2.0,
    "text.color": INK[0],
    "text.parse_math": False,  # names are the user's
    "xtick.color": INK[0],
    "ytick.color": INK[0],
}


def write_png(path: Path, record: Record, styles: dict[str, Style]) -> None:
    """The losses, with a title."""
    with mpl.rc_context(SETTINGS):
        figure = losses(record, styles)
        seeds = record.seeds
        note = f" (mean of {seeds} seeds, their range shaded)" if seeds > 1 else ""
        figure.suptitle(record.title + note, x=0.01, horizontalalignment="left")
        figure.savefig(path, dpi=130)


def losses(record: Record, styles: dict[str, Style]) -> Figure:
    """Over steps and over seconds: a line an optimizer, the mean over its seeds, their range shaded."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    over_steps, over_seconds = figure.subplots(1, 2, sharey=True)
    for row in record.rows:
        curves = [curve for curve in record.curves if curve.optimizer == row.name and len(curve.steps) > 1]
        if curves:
            _curves(over_steps, curves, "steps", styles[row.name])
            _curves(over_seconds, curves, "seconds", styles[row.name])
    over_steps.set(xlabel="steps", ylabel=record.measure)
    over_seconds.set(xlabel="seconds of training")
    for axes in (over_steps, over_seconds):
        axes.grid()
        axes.set_yscale("log" if record.log_loss else "linear")
    if not record.log_loss and record.curves:
        over_steps.set_ylim(*_window(record.curves))
    if len(over_steps.lines):
        figure.legend(*over_steps.get_legend_handles_labels(), loc="outside right upper", title="best first")
    return figure


def _curves(axes: Axes, curves: list[Curve], kind: str, style: Style) -> None:
    length = min(len(curve.steps) for curve in curves)
    found = np.array([curve.losses[:length] for curve in curves])
    found = np.where(np.isfinite(found), found, np.nan)
    along = np.mean([getattr(curve, kind)[:length] for curve in curves], axis=0)
    axes.plot(along, found.mean(axis=0), label=curves[0].optimizer, color=style.color, linestyle=style.dash)
    if len(curves) > 1:
        low, high = found.min(axis=0), found.max(axis=0)
        axes.fill_between(along, low, high, color=style.color, alpha=0.15, linewidth=0)


def _window(curves: Sequence[Curve]) -> tuple[float, float]:
    """From below the best to above the start: a loss that blew up must not flatten all others."""
    finite = [loss for curve in curves for loss in curve.losses if math.isfinite(loss)]
    first = max((curve.losses[0] for curve in curves if math.isfinite(curve.losses[0])), default=1.0)
    low = min(finite, default=0.0)
    margin = 0.05 * max(first - low, 1e-3)
    return low - margin, first + margin


def rates(record: Record, styles: dict[str, Style]) -> Figure:
    """The loss over the learning rate, at the best of the others' rates; a cross above: it blew up."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(trial.optimizer for trial in record.trials):
        best = envelope([trial for trial in record.trials if trial.optimizer == name])
        style, along = styles[name], list(best)
        found = np.array([best[rate] if math.isfinite(best[rate]) else np.nan for rate in along])
        axes.plot(along, found, label=name, color=style.color, linestyle=style.dash, marker="o", markersize=4)
        gone = [rate for rate in along if not math.isfinite(best[rate])]
        axes.plot(
            gone, np.full(len(gone), 0.98), "x", color=style.color, transform=axes.get_xaxis_transform()
        )
    axes.set(xscale="log", yscale="log" if record.log_loss else "linear")
    axes.set(xlabel="learning rate", ylabel="final loss")
    axes.grid()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


def envelope(trials: list[Trial]) -> dict[float, float]:
    """Learning rate → the lowest loss over the rates of the others, in order."""
    best: dict[float, float] = {}
    for trial in sorted(trials, key=lambda trial: trial.learning_rate):
        loss = trial.loss if math.isfinite(trial.loss) else math.inf
        best[trial.learning_rate] = min(loss, best.get(trial.learning_rate, math.inf))
    return best


def spectra(record: Record, styles: dict[str, Style]) -> Figure:
    """A panel a layer: the singular values over the largest, in order, to the last."""
    layers = shown(record.spectra)
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(10, 0.6 + 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, layer in zip(grid.flat, layers, strict=False):
        for spectrum in record.spectra:
            if (spectrum.path, spectrum.rows, spectrum.columns) == layer:
                style = styles[spectrum.optimizer]
                along = np.linspace(0, 1, len(spectrum.values))
                axes.plot(
                    along, spectrum.values, label=spectrum.optimizer, color=style.color, linestyle=style.dash
                )
        axes.set_title(f"{layer[0]}\n{layer[1]} x {layer[2]}", fontsize=8)
        axes.grid()
    for axes in list(grid.flat)[len(layers) :]:
        axes.remove()
    handles = {
        label: line
        for axes in figure.axes
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside right upper")
    figure.supxlabel("singular value, from the first (0) to the last (1)", fontsize=10)
    figure.supylabel("over the largest", fontsize=10)
    return figure


def shown(found: Sequence[Spectrum]) -> list[tuple[str, int, int]]:
    """The layers with a panel: at most `PANELS`, spread over all."""
    layers = list(dict.fromkeys((each.path, each.rows, each.columns) for each in found))
    at = np.unique(np.linspace(0, len(layers) - 1, min(PANELS, len(layers))).round().astype(int))
    return [layers[k] for k in at]
