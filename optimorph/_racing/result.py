"""The result of a race: collected from those who ran, and shown."""

import io
import math
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from optimorph import __version__
from optimorph.core.types import AxesRules
from optimorph._racing.laps import Contestant
from optimorph._racing.page import write_html
from optimorph._racing.palette import Style, styles
from optimorph._racing.plot import write_png
from optimorph._racing.record import Curve, Record, Row, Spectrum, Trial
from optimorph._racing.spectra import spectra
from optimorph._racing.table import show
from optimorph._racing.task import Task


class Result(Record):
    """A record that prints as its table."""

    def __str__(self) -> str:
        """The table and its notes."""
        console = Console(file=io.StringIO(), width=100, record=True, markup=False, highlight=False)
        if self.rows:
            show(console, self)
        return console.export_text().strip("\n") or f"{len(self.trials)} learning rates tried, nobody raced."

    def plot(self, path: str | Path) -> None:
        """Draw the losses over steps and seconds, as PNG, SVG or PDF by the path's ending."""
        write_png(Path(path), self, self._styles())

    def report(self, path: str | Path) -> None:
        """Write the page: curves, table, learning rates and spectra, in one HTML file."""
        write_html(Path(path), self, self._styles())

    def write(self, folder: str | Path) -> list[Path]:
        """Write `race.json`, `race.png` and `race.html` into a folder, which is made."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"race.{kind}" for kind in ("json", "png", "html")]
        for path, write in zip(paths, (self.write_json, self.plot, self.report), strict=True):
            write(path)
        return paths

    def _styles(self) -> dict[str, Style]:
        """Name → style; names without a fixed style get theirs in the order of entry."""
        entered = [each.optimizer for each in (*self.curves, *self.trials)]
        return styles(list(dict.fromkeys(entered)))


def collect(
    task: Task,
    contestants: list[Contestant],
    steps: int,
    seeds: int,
    finished: bool,
    trials: Sequence[Trial] = (),
    axes: AxesRules | None = None,
) -> Result:
    """Everything that was measured.

    A race that was stopped has no spectra, because they take a while. Ctrl-C while they are computed keeps
    the race and counts as a stop.
    """
    found: list[Spectrum] = []
    if finished:
        try:
            found = [each for one in contestants for each in _spectra(one, axes)]
        except KeyboardInterrupt:
            finished = False
    rows = [each for one in contestants if (each := row(one)) is not None]
    runs = [(one.name, run) for one in contestants for run in one.runs]
    return Result(
        task=task.name,
        title=task.title,
        measure=task.measure,
        steps=steps,
        seeds=seeds,
        finished=finished,
        machine=machine(),
        rows=sorted(rows, key=lambda r: math.inf if r.diverged else r.loss),
        curves=[Curve(name, run.seed, run.steps, run.seconds, run.losses) for name, run in runs],
        trials=list(trials),
        spectra=found,
        log_loss=task.log_loss,
    )


def _spectra(one: Contestant, axes: AxesRules | None) -> Iterator[Spectrum]:
    for run in one.runs:
        if run.kept is not None:
            yield from spectra(one.name, run.kept, axes)


def row(one: Contestant) -> Row | None:
    """The figures of a contestant, None if it never took a step."""
    reached = max((run.step for run in one.runs), default=0)
    if not reached:
        return None
    runs = [run for run in one.runs if run.step == reached or run.diverged]
    losses = [run.losses[-1] for run in runs]
    return Row(
        name=one.name,
        seeds=len(runs),
        steps=reached,
        loss=statistics.fmean(losses),
        spread=statistics.stdev(losses) if len(losses) > 1 and all(map(math.isfinite, losses)) else 0.0,
        steps_per_second=1 / statistics.median(sum(pair) for run in runs for pair in run.step_seconds),
        optimizer_ms=1e3 * statistics.median(s for run in runs for s in run.update_seconds),
        state_bytes_per_parameter=runs[0].state_bytes_per_parameter,
        compile_seconds=runs[0].compile_seconds,
        learning_rate=None if one.rates is None else one.rates.learning_rate,
        others_learning_rate=None if one.rates is None else one.rates.others,
    )


def machine() -> dict[str, Any]:
    """Where and with what the figures were measured."""
    return {
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "optimorph": __version__,
        "versions": {name: found for name in ("jax", "jaxlib", "optax", "flax") if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
