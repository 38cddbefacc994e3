"""The result of a race: its measurements are collected, printed and written to files."""

import io
import math
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from optimorph import __version__
from optimorph._core.types import AxesRules
from optimorph._racing.html_report import write_html
from optimorph._racing.plot import write_plot
from optimorph._racing.race_data import Curve, RaceData, Row, Spectrum, Trial
from optimorph._racing.spectra import spectra
from optimorph._racing.table import print_table
from optimorph._racing.task import Task
from optimorph._racing.training import Entry


class RaceResult(RaceData):
    """The measurements of a race, which print as a table and can be drawn."""

    def __str__(self) -> str:
        if not self.rows:
            count = len(self.trials)
            return f"{count} learning rate{'s' * (count != 1)} tried; no race was run."
        console = Console(file=io.StringIO(), width=100, record=True, markup=False, highlight=False)
        print_table(console, self)
        return console.export_text().strip("\n")

    def plot(self, path: str | Path) -> None:
        """Plot the losses over steps and over seconds, as PNG, SVG or PDF by the path's suffix."""
        write_plot(Path(path), self)

    def report(self, path: str | Path) -> None:
        """Write the report, one HTML file with curves, table, learning rates and spectra."""
        write_html(Path(path), self)

    def write(self, folder: str | Path) -> list[Path]:
        """Write `race.json`, `race.png` and `race.html` into a folder, which is created if necessary."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        writers = {"race.json": self.write_json, "race.png": self.plot, "race.html": self.report}
        for name, write in writers.items():
            write(folder / name)
        return [folder / name for name in writers]


def collect(
    task: Task,
    entries: list[Entry],
    steps: int,
    seeds: int,
    finished: bool,
    trials: Sequence[Trial] = (),
    axes: AxesRules | None = None,
) -> RaceResult:
    """Collect everything that was measured.

    Spectra take a while to compute, so a stopped race has none. Ctrl-C while they are computed keeps all
    other measurements, and the race counts as stopped.
    """
    computed: list[Spectrum] = []
    if finished:
        try:
            for entry in entries:
                for run in filter(lambda run: run.kept_update is not None, entry.runs):
                    computed += spectra(entry.name, run.kept_update, axes)
        except KeyboardInterrupt:
            finished = False
    rows = [row for row in map(make_row, entries) if row is not None]
    return RaceResult(
        task=task.name,
        title=task.title,
        measure=task.measure,
        steps=steps,
        seeds=seeds,
        finished=finished,
        machine=_machine(),
        rows=sorted(rows, key=lambda row: math.inf if row.diverged else row.loss),
        curves=[
            Curve(e.name, run.seed, run.steps, run.seconds, run.losses) for e in entries for run in e.runs
        ],
        trials=list(trials),
        spectra=computed,
        log_loss=task.log_loss,
    )


def make_row(entry: Entry) -> Row | None:
    """An entry's row of the table; None if it has not taken a step."""
    steps = max((run.step for run in entry.runs), default=0)
    if not steps:
        return None
    runs = [run for run in entry.runs if run.step == steps or run.diverged]
    losses = [run.losses[-1] for run in runs]
    return Row(
        name=entry.name,
        seeds=len(runs),
        steps=steps,
        loss=statistics.fmean(losses),
        spread=statistics.stdev(losses) if len(losses) > 1 and all(map(math.isfinite, losses)) else 0.0,
        steps_per_second=1 / statistics.median(s for run in runs for s in run.step_seconds),
        optimizer_ms=1e3 * statistics.median(s for run in runs for s in run.update_seconds),
        state_bytes_per_parameter=runs[0].state_bytes_per_parameter,
        compile_seconds=runs[0].compile_seconds,
        learning_rate=entry.rates and entry.rates.learning_rate,
        others_learning_rate=entry.rates and entry.rates.others,
    )


def _machine() -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "optimorph": __version__,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "optax", "flax") if find_spec(name)},
    }
