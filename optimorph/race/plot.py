"""The picture of a race: held-out loss over steps and over seconds."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optimorph.race.contestants import MAKERS
from optimorph.race.race import Contestant
from optimorph.race.task import Task

_COLORS = ("#7f7f7f", "#8c564b", "#e377c2", "#bcbd22", "#17becf", "#2ca02c", "#1f77b4", "#d62728")
COLORS = dict(zip(MAKERS, _COLORS, strict=True))


def write_png(path: Path, task: Task, contestants: list[Contestant]) -> None:
    """A line an optimizer, the mean over its seeds, with the range of the seeds shaded."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    over_steps, over_seconds = figure.subplots(1, 2, sharey=True)
    trained = [one for one in contestants if any(len(run.steps) > 1 for run in one.runs)]
    for one in sorted(trained, key=lambda one: np.nan_to_num(one.loss, nan=np.inf)):
        _curves(over_steps, one, "steps")
        _curves(over_seconds, one, "seconds")
    seeds = max((len(one.runs) for one in trained), default=1)
    note = f" (mean of {seeds} seeds, their range shaded)" if seeds > 1 else ""
    over_steps.set(xlabel="steps", ylabel=task.measure)
    over_seconds.set(xlabel="seconds of training")
    for axes in (over_steps, over_seconds):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yscale("log" if task.log_loss else "linear")
    if not task.log_loss and trained:
        over_steps.set_ylim(*_window(trained))
    over_seconds.legend(frameon=False, title="best first")
    figure.suptitle(task.title + note)
    figure.savefig(path, dpi=130)


def _curves(axes: Axes, one: Contestant, kind: str) -> None:
    runs = [run for run in one.runs if len(run.steps) > 1]
    length = min(len(run.steps) for run in runs)
    losses = np.array([run.losses[:length] for run in runs])
    along = np.mean([getattr(run, kind)[:length] for run in runs], axis=0)
    axes.plot(along, losses.mean(axis=0), label=one.name, color=COLORS[one.name], linewidth=1.8)
    if len(runs) > 1:
        axes.fill_between(
            along, losses.min(axis=0), losses.max(axis=0), color=COLORS[one.name], alpha=0.15, linewidth=0
        )


def _window(contestants: list[Contestant]) -> tuple[float, float]:
    """From below the best to above the start: a loss that blew up must not flatten all others."""
    losses = [loss for one in contestants for run in one.runs for loss in run.losses if np.isfinite(loss)]
    first = max(run.losses[0] for one in contestants for run in one.runs)
    low = min(losses)
    margin = 0.05 * max(first - low, 1e-3)
    return low - margin, first + margin
