"""The pictures of a race: losses, learning rates, spectra. Drawn in the palette's light colours."""

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optimorph._racing.palette import FAINT, INK, Style
from optimorph._racing.record import Curve, Record, Spectrum, Trial
from optimorph._racing.ticks import PlainLog

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
        losses(record, styles).savefig(path, dpi=130)


def losses(record: Record, styles: dict[str, Style]) -> Figure:
    """The loss over steps and over seconds, with a title, and a legend at the right."""
    note = f" (mean of {record.seeds} seeds, their range shaded)" if record.seeds > 1 else ""
    figure = Figure(layout="constrained")
    figure.suptitle(textwrap.fill(record.title + note, 90), x=0.01, horizontalalignment="left")
    over_steps, over_seconds = figure.subplots(1, 2, sharey=True)
    loss(over_steps, record, styles, "steps")
    loss(over_seconds, record, styles, "seconds")
    over_seconds.set(ylabel="")
    handles, names = over_steps.get_legend_handles_labels()
    names = [textwrap.fill(name, 24) for name in names]
    if names:
        figure.legend(handles, names, loc="outside right upper", title="best first")
    figure.set_size_inches(10, max(4.2, 1 + 0.22 * "\n".join(names).count("\n")))
    return figure


def panel(draw: Callable[..., None], size: tuple[float, float], *given: Any) -> Figure:
    """A figure with one of the pictures below: `draw(axes, *given)`."""
    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots(), *given)
    return figure


def loss(axes: Axes, record: Record, styles: dict[str, Style], along: str) -> None:
    """The loss along "steps" or "seconds": one line per optimizer, the mean over its seeds."""
    for name in record.names:
        curves = [curve for curve in record.curves if curve.optimizer == name and len(curve.steps) > 1]
        if curves:
            _curves(axes, curves, along, styles[name])
    axes.set(xlabel={"steps": "steps", "seconds": "seconds of training"}[along])
    axes.set(ylabel=textwrap.fill(record.measure, 45))
    axes.grid()
    low, high = _range(record.curves)
    if is_log(record, low, high):
        axes.set(yscale=PlainLog(), ylim=_beyond(record.curves))
    else:
        margin = 0.05 * max(high - low, 1e-3)
        axes.set(ylim=(low - margin, high + margin))


def _curves(axes: Axes, curves: list[Curve], kind: str, style: Style) -> None:
    length = min(len(curve.steps) for curve in curves)
    found = np.array([curve.losses[:length] for curve in curves])
    found = np.where(np.isfinite(found), found, np.nan)
    along = np.mean([getattr(curve, kind)[:length] for curve in curves], axis=0)
    axes.plot(along, found.mean(axis=0), label=curves[0].optimizer, color=style.color, linestyle=style.dash)
    if len(curves) > 1:
        low, high = found.min(axis=0), found.max(axis=0)
        axes.fill_between(along, low, high, color=style.color, alpha=0.15, linewidth=0)


def is_log(record: Record, low: float, high: float) -> bool:
    """Whether the loss axis is logarithmic: by default if losses span over a decade and none is negative."""
    return 0 <= low < high / 10 if record.log_loss is None else record.log_loss


def _range(curves: Sequence[Curve]) -> tuple[float, float]:
    """From the lowest loss to the highest start, so that a loss that diverges does not flatten the others."""
    finite = [loss for curve in curves for loss in curve.losses if math.isfinite(loss)]
    starts = [curve.losses[0] for curve in curves if math.isfinite(curve.losses[0])]
    return min(finite, default=0.0), max(starts, default=1.0)


def _beyond(curves: Sequence[Curve]) -> tuple[float, float]:
    """The limits of a logarithmic axis, which include losses that rose and came down again."""
    start = _range(curves)[1]
    down = [curve.losses for curve in curves if curve.losses[-1] <= start]
    positive = [loss for losses in down for loss in losses if 0 < loss < math.inf] or [start]
    return min(positive) / 2, 2 * max(positive)


def rates(axes: Axes, record: Record, styles: dict[str, Style]) -> None:
    """The final loss over the learning rate, with a cross at the top where training diverged."""
    for name in record.names:
        best = envelope([trial for trial in record.trials if trial.optimizer == name])
        style, along = styles[name], list(best)
        found = np.array([best[rate] if math.isfinite(best[rate]) else np.nan for rate in along])
        if along:
            axes.plot(
                along, found, label=name, color=style.color, linestyle=style.dash, marker="o", markersize=4
            )
        gone = [rate for rate in along if not math.isfinite(best[rate])]
        axes.plot(
            gone, np.full(len(gone), 0.98), "x", color=style.color, transform=axes.get_xaxis_transform()
        )
    finite = [trial.loss for trial in record.trials if math.isfinite(trial.loss)]
    log = is_log(record, min(finite, default=1.0), max(finite, default=1.0))
    axes.set(xscale=PlainLog(), yscale=PlainLog() if log else "linear")
    axes.set(xlabel="learning rate", ylabel="final loss")
    axes.grid()


def envelope(trials: list[Trial]) -> dict[float, float]:
    """Learning rate → the lowest loss over the rates of the others, in order."""
    best: dict[float, float] = {}
    for trial in sorted(trials, key=lambda trial: trial.learning_rate):
        loss = trial.loss if math.isfinite(trial.loss) else math.inf
        best[trial.learning_rate] = min(loss, best.get(trial.learning_rate, math.inf))
    return best


Layer = tuple[str, int, int]
"""The path of a weight, its rows and its columns."""


def spectrum(axes: Axes, record: Record, styles: dict[str, Style], layer: Layer) -> None:
    """A layer's singular values, divided by the largest, in order from the first (0) to the last (1)."""
    found = {each.optimizer: each for each in record.spectra if layer_of(each) == layer}
    for name in filter(found.__contains__, record.names):
        values, style = found[name].values, styles[name]
        along = np.linspace(0, 1, len(values))
        axes.plot(along, values, label=name, color=style.color, linestyle=style.dash)
    path, rows, columns = layer
    axes.set_title("\n".join((*textwrap.wrap(path, 34), f"{rows} x {columns}")), fontsize=9)
    axes.set(xlim=(0, 1), ylim=(0, 1.05), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    axes.grid()


def layer_of(each: Spectrum) -> Layer:
    """The layer that a spectrum belongs to."""
    return each.path, each.rows, each.columns


def shown(found: Sequence[Spectrum]) -> list[Layer]:
    """The layers with a panel: at most `PANELS`, spread over all."""
    layers = list(dict.fromkeys(map(layer_of, found)))
    at = np.unique(np.linspace(0, len(layers) - 1, min(PANELS, len(layers))).round().astype(int))
    return [layers[k] for k in at]
