"""Progress on the console: live bars on a terminal, plain lines in a pipe."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from optimorph._racing.race_data import Trial
from optimorph._racing.training import Entry, OnStep

PIPE_WIDTH = 10_000
"""The width of a console that writes to a pipe; it breaks no line."""


class SharedConsole(Console):
    """A console to which another thread can print while bars are drawn, without mixing the two."""

    lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    def print(self, *args: Any, **kwargs: Any) -> None:
        with self.lock:
            super().print(*args, **kwargs)


def plain_console(quiet: bool = False) -> SharedConsole:
    """A console that breaks lines between words on a terminal, and nowhere in a pipe.

    It interprets no markup, because names come from the user.
    """
    console = SharedConsole(quiet=quiet, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


class Bars(Progress):
    """Progress bars that leave three columns free for the `^C` that a terminal echoes.

    Without them the last line would wrap. Rich does not know of the wrapped line, and would erase one line
    too few.
    """

    def __init__(self, *columns: Any, console: Console, disable: bool = False):
        self.output = console  # needed by `get_renderables` before rich sets `self.console`
        super().__init__(*columns, console=console, disable=disable)
        if isinstance(console, SharedConsole):
            console.lock = self.live._lock

    def get_renderables(self) -> Iterator[RenderableType]:
        yield Constrain(self.make_tasks_table(self.tasks), self.output.width - 3)


def training_display(
    console: Console, names: list[str], total: int
) -> contextlib.AbstractContextManager[OnStep]:
    """Show the progress of all entries, each with `total` steps: bars on a terminal, otherwise lines."""
    live = console.is_terminal and not console.is_dumb_terminal
    return _training_bars(console, names, total) if live else _training_lines(console, total)


@contextlib.contextmanager
def _training_bars(console: Console, names: list[str], total: int) -> Iterator[OnStep]:
    bars = Bars(
        TextColumn("{task.description:<10}", markup=False),
        BarColumn(),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("loss {task.fields[loss]:<9}"),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("left"),
        console=console,
    )
    ids = {name: bars.add_task(name, total=total, loss="") for name in names}

    def on_step(entry: Entry) -> None:
        run = entry.runs[-1]
        loss = "diverged" if run.diverged else f"{run.losses[-1]:.4g}"
        bars.update(ids[entry.name], completed=entry.step, loss=loss)

    with bars:
        yield on_step


@contextlib.contextmanager
def _training_lines(console: Console, total: int) -> Iterator[OnStep]:
    num_evals: dict[str, int] = {}

    def on_step(entry: Entry) -> None:
        evals = sum(len(run.losses) for run in entry.runs)
        if num_evals.get(entry.name) == evals:
            return
        num_evals[entry.name] = evals
        left = entry.seconds / max(1, entry.step) * (total - entry.step)
        status = f"{left:.0f} s of training left" if entry.step else "compiled"
        run = entry.runs[-1]
        loss = "diverged" if run.diverged else f"loss {run.losses[-1]:.4g}"
        console.print(f"{entry.name:<10} step {entry.step}/{total}  {loss}  {status}")

    yield on_step


@contextlib.contextmanager
def sweep_display(console: Console, total: int) -> Iterator[Callable[[Trial], None]]:
    """Show a sweep: one line for each trial, and a bar on a terminal."""
    with Bars(*Progress.get_default_columns(), console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task("learning rates", total=total, visible=total > 0)

        def on_trial(trial: Trial) -> None:
            console.print(f"{trial.optimizer:<10} {trial.rates!s:<16} loss {trial.loss:.4g}")
            bars.advance(bar)

        yield on_trial
