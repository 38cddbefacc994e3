"""What is seen while a race runs: live bars on a terminal, plain lines in a pipe."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from optimorph._racing.contestants import Rates
from optimorph._racing.laps import Contestant
from optimorph._racing.record import Trial

UNBOUNDED = 10_000
"""Width of a console that writes to a pipe, so that no line is broken."""


class SharedConsole(Console):
    """A console to which another thread can print while bars are drawn, without mixing the two."""

    lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    def print(self, *given: Any, **named: Any) -> None:
        """Print while no bar is drawn."""
        with self.lock:
            super().print(*given, **named)


def plain_console(quiet: bool = False) -> SharedConsole:
    """A console that breaks lines between words on a terminal, and nowhere in a pipe.

    It reads no markup, because names come from the user.
    """
    console = SharedConsole(quiet=quiet, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = UNBOUNDED
    return console


class Bars(Progress):
    """Bars that leave room for the `^C` that a terminal echoes.

    Without it the last line would wrap, and rich would wipe one line too few.
    """

    def __init__(self, *columns: ProgressColumn, console: Console, disable: bool = False):
        """The console, if it is shared, prints under the lock of the bars."""
        super().__init__(*columns, console=console, disable=disable)
        if isinstance(console, SharedConsole):
            console.lock = self.live._lock

    def get_renderables(self) -> Iterator[RenderableType]:
        """One table of all bars."""
        yield Narrower(self.make_tasks_table(self.tasks))


class Narrower(NamedTuple):
    """A renderable that leaves the last three columns of the terminal empty."""

    inside: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        """Render what is inside at the smaller width."""
        yield from console.render(self.inside, options.update_width(options.max_width - 3))


class Live:
    """A bar for every contestant."""

    def __init__(self, console: Console, names: list[str], total: int):
        """`total` is each contestant's steps over all seeds."""
        self.progress = Bars(
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("loss {task.fields[loss]:<9}"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn("left"),
            console=console,
        )
        self.bars = {name: self.progress.add_task(name, total=total, loss="") for name in names}

    def __enter__(self) -> "Live":
        """Draw the bars."""
        self.progress.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Leave the last bars standing."""
        self.progress.stop()

    def moved(self, one: Contestant) -> None:
        """Move a bar."""
        loss = "diverged" if one.runs[-1].diverged else f"{one.loss:.4g}"
        self.progress.update(self.bars[one.name], completed=one.step, loss=loss)


class Lines:
    """A line whenever a contestant has moved."""

    def __init__(self, console: Console, total: int):
        """`total` is each contestant's steps over all seeds."""
        self.console, self.total = console, total
        self.looks: dict[str, int] = {}

    def __enter__(self) -> "Lines":
        """Nothing to draw."""
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Nothing to clear."""

    def moved(self, one: Contestant) -> None:
        """Print a line whenever the held-out loss was looked at."""
        looks = sum(len(run.losses) for run in one.runs)
        if self.looks.get(one.name) == looks:
            return
        self.looks[one.name] = looks
        left = one.seconds / one.step * (self.total - one.step) if one.step else float("nan")
        ahead = f"{left:.0f} s of training left" if one.step else "compiled"
        loss = "diverged" if one.runs[-1].diverged else f"loss {one.loss:.4g}"
        self.console.print(f"{one.name:<10} step {one.step}/{self.total}  {loss}  {ahead}")


def display(console: Console, names: list[str], total: int) -> Live | Lines:
    """The live display where the terminal can draw one."""
    live = console.is_terminal and not console.is_dumb_terminal
    return Live(console, names, total) if live else Lines(console, total)


@contextlib.contextmanager
def trying(console: Console, total: int) -> Iterator[Callable[[Trial], None]]:
    """A bar on a terminal, and a line whenever a learning rate has been tried."""
    bars = Bars(*Progress.get_default_columns(), console=console, disable=not console.is_terminal)
    with bars:
        bar = bars.add_task("learning rates", total=total, visible=total > 0)

        def tried(trial: Trial) -> None:
            rates = Rates(trial.learning_rate, trial.others)
            console.print(f"{trial.optimizer:<10} {rates!s:<16} loss {trial.loss:.4g}")
            bars.advance(bar)

        yield tried
