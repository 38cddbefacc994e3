"""Plots of a race: losses, learning rates and spectra, in the light colours of the palette."""

import math
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optimorph._racing.palette import FAINT, INK
from optimorph._racing.race_data import Curve, Layer, RaceData, Trial
from optimorph._racing.ticks import PlainLog

MAX_LAYERS = 8  # layers whose spectra are plotted
MAX_WITH_SEEDS = 8  # optimizers beside which every seed has a line of its own
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
    "text.parse_math": False,  # names come from the user
    "xtick.color": INK[0],
    "ytick.color": INK[0],
}


def write_plot(path: Path, race: RaceData) -> None:
    with mpl.rc_context(SETTINGS):
        plot_losses(race).savefig(path, dpi=130)


def plot_losses(race: RaceData) -> Figure:
    seeds = ", each one a thin line" if len(race.names) <= MAX_WITH_SEEDS else ""
    note = f" (mean of {race.seeds} seeds{seeds})" if race.seeds > 1 else ""
    figure = Figure(layout="constrained")
    figure.suptitle(textwrap.fill(race.title + note, 90), x=0.01, horizontalalignment="left")
    over_steps, over_seconds = figure.subplots(1, 2, sharey=True)
    draw_losses(over_steps, race, "steps")
    draw_losses(over_seconds, race, "seconds")
    over_seconds.set(ylabel="")
    handles, names = over_steps.get_legend_handles_labels()
    names = [textwrap.fill(name, 24) for name in names]
    if names:
        figure.legend(handles, names, loc="outside right upper", title="best first")
    figure.set_size_inches(10, max(4.2, 1 + 0.22 * "\n".join(names).count("\n")))
    return figure


def draw_losses(axes: Axes, race: RaceData, along: str) -> None:
    """The loss over "steps" or "seconds": one line for each optimizer, the mean over its seeds."""
    for name in race.names:
        curves = [curve for curve in race.curves if curve.optimizer == name and len(curve.steps) > 1]
        if curves:
            style, (x, losses) = race.styles[name], _table(curves, along)
            axes.plot(x, losses.mean(axis=0), label=name, **style._asdict())
            if len(curves) > 1 and len(race.names) <= MAX_WITH_SEEDS:
                axes.plot(x, losses.T, color=style.color, alpha=0.5, linewidth=0.6)
    axes.set(xlabel={"steps": "steps", "seconds": "seconds of training"}[along])
    axes.set(ylabel=textwrap.fill(race.measure, 45))
    axes.grid()
    low, high = _loss_range(race.curves)
    if _is_log(race, low, high):
        axes.set(yscale=PlainLog(), ylim=_log_limits(race.curves))
    else:
        high = min(high, _highest_after_start(race))
        margin = 0.05 * max(high - low, 1e-3)
        axes.set(ylim=(low - margin, high + margin))


def _table(curves: list[Curve], along: str) -> tuple[np.ndarray, np.ndarray]:
    """The mean steps or seconds, and the losses of each seed there, NaN where they are not finite."""
    length = min(len(curve.steps) for curve in curves)
    losses = np.array([curve.losses[:length] for curve in curves])
    x = np.mean([getattr(curve, along)[:length] for curve in curves], axis=0)
    return x, np.where(np.isfinite(losses), losses, np.nan)


def _is_log(race: RaceData, low: float, high: float) -> bool:
    """Whether the loss axis is logarithmic: by default if losses span over a decade and none is negative."""
    return 0 <= low < high / 10 if race.log_loss is None else race.log_loss


def _loss_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """From the lowest loss to the highest first loss; a diverging loss must not flatten the others."""
    finite = [loss for curve in curves for loss in curve.losses if math.isfinite(loss)]
    firsts = [curve.losses[0] for curve in curves if math.isfinite(curve.losses[0])]
    return min(finite, default=0.0), max(firsts, default=1.0)


def _highest_after_start(race: RaceData) -> float:
    """The highest mean loss at 0.6 of the steps; the fall at the start would fill the axis otherwise."""
    losses: dict[str, list[float]] = {}
    for curve in race.curves:
        loss = np.interp(0.6 * curve.steps[-1], curve.steps, curve.losses)
        losses.setdefault(curve.optimizer, []).append(float(loss))
    return max(filter(math.isfinite, map(statistics.fmean, losses.values())), default=math.inf)


def _log_limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """The limits of a logarithmic axis. They include losses that rose and fell again."""
    first = _loss_range(curves)[1]
    fallen = [curve.losses for curve in curves if curve.losses[-1] <= first]
    positive = [loss for losses in fallen for loss in losses if 0 < loss < math.inf] or [first]
    return 0.8 * min(positive), 1.25 * max(positive)


def draw_rates(axes: Axes, race: RaceData) -> None:
    """The final loss over the learning rate, with a cross at the top where training diverged."""
    for name in race.names:
        best = best_losses([trial for trial in race.trials if trial.optimizer == name])
        style, rates = race.styles[name], list(best)
        losses = np.array([loss if math.isfinite(loss) else np.nan for loss in best.values()])
        if rates:
            axes.plot(rates, losses, label=name, marker="o", markersize=4, **style._asdict())
        diverged = [rate for rate, loss in best.items() if not math.isfinite(loss)]
        top = np.full(len(diverged), 0.98)
        axes.plot(diverged, top, "x", color=style.color, transform=axes.get_xaxis_transform())
    finite = [trial.loss for trial in race.trials if math.isfinite(trial.loss)]
    log = _is_log(race, min(finite, default=1.0), max(finite, default=1.0))
    axes.set(xscale=PlainLog(), yscale=PlainLog() if log else "linear")
    axes.set(xlabel="learning rate", ylabel="final loss")
    axes.grid()


def best_losses(trials: list[Trial]) -> dict[float, float]:
    """Learning rate → the lowest loss over all rates of the other leaves; the learning rates are sorted."""
    best: dict[float, float] = {}
    for trial in sorted(trials, key=lambda trial: trial.learning_rate):
        best[trial.learning_rate] = min(trial.finite_or_inf, best.get(trial.learning_rate, math.inf))
    return best


def draw_spectrum(axes: Axes, race: RaceData, layer: Layer) -> None:
    """A layer's singular values, divided by the largest, in order from the first (0) to the last (1)."""
    spectra = {spectrum.optimizer: spectrum for spectrum in race.spectra if spectrum.layer == layer}
    for name in filter(spectra.__contains__, race.names):
        values = spectra[name].values
        axes.plot(np.linspace(0, 1, len(values)), values, label=name, **race.styles[name]._asdict())
    path, rows, columns = layer
    axes.set_title("\n".join((*textwrap.wrap(path, 34), f"{rows} x {columns}")), fontsize=9)
    axes.set(xlim=(0, 1), ylim=(0, 1.05), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    axes.grid()


def plotted_layers(layers: Sequence[Layer]) -> list[Layer]:
    indices = np.unique(np.linspace(0, len(layers) - 1, min(MAX_LAYERS, len(layers))).round().astype(int))
    return [layers[k] for k in indices]
