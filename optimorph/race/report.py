"""What a race leaves: a table, `race.json` and the figures for `race.png`."""

import dataclasses
import datetime
import json
import math
import os
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from optimorph import __version__
from optimorph.race.race import Contestant
from optimorph.race.task import Task


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: means over the seeds, in a stopped race over those that came furthest."""

    name: str
    seeds: int
    steps: int
    loss: float
    spread: float
    steps_per_second: float
    optimizer_ms: float
    state_bytes_per_parameter: float
    compile_seconds: float
    learning_rate: float
    others_learning_rate: float | None

    @property
    def diverged(self) -> bool:
        """Whether any seed ended with a loss that is no number."""
        return not math.isfinite(self.loss)


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
        steps_per_second=one.step / one.seconds,
        optimizer_ms=1e3 * statistics.median(s for run in runs for s in run.update_seconds),
        state_bytes_per_parameter=runs[0].state_bytes_per_parameter,
        compile_seconds=runs[0].compile_seconds,
        learning_rate=one.rates.learning_rate,
        others_learning_rate=one.rates.others,
    )


def rank(contestants: list[Contestant]) -> list[Row]:
    """The rows, the lowest loss first and the diverged last."""
    rows = [found for one in contestants if (found := row(one)) is not None]
    return sorted(rows, key=lambda r: math.inf if r.diverged else r.loss)


def table(task: Task, rows: list[Row], between: str = " ± ") -> Table:
    """The rows as a table for people, at most 80 characters wide."""
    out = Table(
        title=f"{task.title}: {task.measure}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    heads = (
        "optimizer",
        "final loss",
        "steps",
        "steps/s",
        "update\nms",
        "state\nB/param",
        "learning\nrate",
        "others",
    )
    for head in heads:
        out.add_column(head, justify="left" if head == "optimizer" else "right", no_wrap=True)
    for r in rows:
        out.add_row(
            r.name,
            "diverged"
            if r.diverged
            else f"{r.loss:.4g}" + (f"{between}{r.spread:.2g}" if r.seeds > 1 else ""),
            str(r.steps),
            f"{r.steps_per_second:.1f}",
            f"{r.optimizer_ms:.2f}",
            f"{r.state_bytes_per_parameter:.2f}",
            f"{r.learning_rate:.3g}",
            "" if r.others_learning_rate is None else f"{r.others_learning_rate:.3g}",
        )
    return out


def machine() -> dict[str, Any]:
    """Where and with what the figures were measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "optimorph": __version__,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "optax", "flax")},
    }


def write_json(
    path: Path, task: Task, contestants: list[Contestant], settings: dict[str, Any], finished: bool
) -> None:
    """Everything that was measured, curves included; a loss that is no number is null."""
    curves = [
        {
            "optimizer": one.name,
            "seed": run.seed,
            "steps": run.steps,
            "seconds": run.seconds,
            "losses": [_json_number(loss) for loss in run.losses],
        }
        for one in contestants
        for run in one.runs
    ]
    rows = [
        {key: _json_number(value) for key, value in dataclasses.asdict(found).items()}
        for found in rank(contestants)
    ]
    content = {
        "task": task.name,
        "title": task.title,
        "measure": task.measure,
        "finished": finished,
        **settings,
        **machine(),
        "rows": rows,
        "curves": curves,
    }
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(console: Console, task: Task, rows: list[Row], finished: bool) -> None:
    """The table, and what its columns mean."""
    plus_minus = " ± " if "utf" in console.encoding.lower() else " +- "
    console.print()
    console.print(table(task, rows, plus_minus))
    if not finished:
        console.print("Stopped early: every row shows what had been reached.")
    where = machine()
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    notes = (
        f"Mean of {max(r.seeds for r in rows)} seeds ± their standard deviation."
        if rows[0].seeds > 1
        else "",
        "Update ms: the optimizer's part of a step, the median, without the model.",
        "Learning rate: the peak. Others: that of embeddings, head and norms, where they have their own.",
        f"{where['cores']} cores, {where['device']}, {where['date']}; {versions}.",
    )
    for note in filter(None, notes):
        console.print(note, highlight=False)
