"""The table of a race: its cells and notes, and how a console prints it."""

import itertools
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from optimorph._racing.comparisons import TARGET, losses_at_equal_seconds, steps_to_target
from optimorph._racing.race_data import RaceData

HEADS = (
    "optimizer",
    "final loss",
    "steps",
    "equal\nseconds",
    f"steps to\n{TARGET}",
    "update\nms",
    "state\nB/param",
    "learning\nrate",
)


def table_rows(race: RaceData, plus_minus: str = " ± ") -> Iterator[tuple[str, ...]]:
    """The column heads, then one row for each optimizer, without empty columns."""
    equal_seconds, to_target = losses_at_equal_seconds(race), steps_to_target(race)
    rows = [HEADS]
    for row in race.rows:
        loss = f"{row.loss:.4g}" + (f"{plus_minus}{row.spread:.2g}" if row.seeds > 1 else "")
        rates = [rate for rate in (row.learning_rate, row.others_learning_rate) if rate is not None]
        rows += [
            (
                row.name,
                "diverged" if row.diverged else loss,
                "" if _equal_steps(race) else str(row.steps),
                f"{equal_seconds[row.name]:.4g}" if row.name in equal_seconds else "",
                str(to_target.get(row.name, "")),
                f"{row.optimizer_ms:.2f}",
                f"{row.state_bytes_per_parameter:.2f}",
                " / ".join(f"{rate:.3g}" for rate in rates),
            )
        ]
    nonempty = [any(column) for column in zip(*rows[1:], strict=True)]
    return (tuple(itertools.compress(row, nonempty)) for row in rows)


def _equal_steps(race: RaceData) -> bool:
    return all(row.steps == race.steps for row in race.rows)


def tables(race: RaceData, width: int, plus_minus: str = " ± ") -> Iterator[Table]:
    """One table, or several with some of the columns each if one would be wider than `width`."""
    names, *columns = ([head, *cells] for head, *cells in zip(*table_rows(race, plus_minus), strict=True))
    title: str | None = f"{race.title}: {race.measure}"
    while columns:
        widths = itertools.accumulate(map(_width, columns), initial=_width(names) + 1)
        count = max(1, sum(needed <= width for needed in widths) - 1)
        yield _table(title, names, columns[:count])
        title, columns = None, columns[count:]


def _width(column: Sequence[str]) -> int:
    """The width of the longest line, with the padding and the gap between columns."""
    return 2 + max(len(line) for cell in column for line in cell.split("\n"))


def _table(title: str | None, names: Sequence[str], columns: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(names[0], overflow="fold")
    for head, *_ in columns:
        table.add_column(head, justify="right", no_wrap=True)
    for cells in zip(names[1:], *(column[1:] for column in columns), strict=True):
        table.add_row(*cells)
    return table


def notes(race: RaceData) -> list[str]:
    """What the columns mean, and last where and when the race was measured."""
    machine, seeds = race.machine, max(row.seeds for row in race.rows)
    lines = []
    if not race.finished:
        lines += ["Stopped early: every row shows what was reached by then. No spectra were computed."]
    if race.rows[0].seeds > 1:
        lines += [f"Mean of {seeds} seeds ± their standard deviation."]
    if _equal_steps(race):
        lines += [f"Every optimizer took {race.steps} steps."]
    lines += [
        "Equal seconds: the loss at the time when the fastest optimizer ends, by median times of a step."
    ]
    if any(row.name == TARGET for row in race.rows):
        when = f"when the mean loss reaches the final loss of {TARGET}; empty if it never does"
        lines += [f"Steps to {TARGET}: {when}."]
    lines += ["Update ms: the median time of the optimizer's update, without the gradient."]
    if any(row.others_learning_rate is not None for row in race.rows):
        lines += ["Learning rate: the peak of the schedule; after the slash, of embeddings, head and norms."]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return [*lines, f"{machine['cores']} cores, {machine['device']}, {machine['date']}; {versions}."]


def print_table(console: Console, race: RaceData) -> None:
    plus_minus = " ± " if "utf" in console.encoding.lower() else " +- "
    console.print()
    for table in tables(race, console.width, plus_minus):
        console.print(table)
    for note in notes(race):
        console.print(note)
