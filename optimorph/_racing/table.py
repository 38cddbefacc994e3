"""The table of a race: its cells, for people at a terminal and for the page."""

import itertools
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from optimorph._racing.record import Record, Row

HEADS = (
    "optimizer",
    "final loss",
    "steps",
    "steps/s",
    "update\nms",
    "state\nB/param",
    "learning\nrate",
    "others",
)


def cells(record: Record, between: str = " ± ") -> Iterator[tuple[str, ...]]:
    """The heads, then a line an optimizer; a column that would be empty is left out."""
    lines = [HEADS, *(_cells(row, between) for row in record.rows)]
    kept = [any(column) for column in zip(*lines[1:], strict=True)]
    return (tuple(itertools.compress(line, kept)) for line in lines)


def _cells(r: Row, between: str) -> tuple[str, ...]:
    loss = f"{r.loss:.4g}" + (f"{between}{r.spread:.2g}" if r.seeds > 1 else "")
    return (
        r.name,
        "diverged" if r.diverged else loss,
        str(r.steps),
        f"{r.steps_per_second:.1f}",
        f"{r.optimizer_ms:.2f}",
        f"{r.state_bytes_per_parameter:.2f}",
        "" if r.learning_rate is None else f"{r.learning_rate:.3g}",
        "" if r.others_learning_rate is None else f"{r.others_learning_rate:.3g}",
    )


def tables(record: Record, width: int, between: str = " ± ") -> Iterator[Table]:
    """One table, or several that share out the columns if one would be wider than `width`."""
    names, *columns = ([head, *cells] for head, *cells in zip(*cells(record, between), strict=True))
    title: str | None = f"{record.title}: {record.measure}"
    while columns:
        fits = itertools.accumulate((_width(column) for column in columns), initial=_width(names) + 1)
        count = max(1, sum(needed <= width for needed in fits) - 1)
        yield _table(title, names, columns[:count])
        title, columns = None, columns[count:]


def _width(column: Sequence[str]) -> int:
    """Of the longest line, the padding and the gap between columns."""
    return 2 + max(len(line) for cell in column for line in cell.split("\n"))


def _table(title: str | None, names: Sequence[str], columns: Sequence[Sequence[str]]) -> Table:
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column(names[0], overflow="fold")
    for head, *_ in columns:
        out.add_column(head, justify="right", no_wrap=True)
    for line in zip(names[1:], *(column[1:] for column in columns), strict=True):
        out.add_row(*line)
    return out


def notes(record: Record) -> list[str]:
    """What the columns mean, and where it was measured."""
    heads, rows = next(cells(record)), record.rows
    where = record.machine
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    found = (
        ""
        if record.finished
        else "Stopped early: every row shows what was reached by then. No spectra were computed.",
        f"Mean of {max(r.seeds for r in rows)} seeds ± their standard deviation."
        if rows[0].seeds > 1
        else "",
        "Steps/s: from the median time of gradient and update, after a few untimed steps.",
        "Update ms: the median time of the optimizer's update, without the gradient.",
        "Learning rate: the peak of the schedule." if "others" in heads else "",
        "Others: the peak learning rate of embeddings, head and norms, where it is separate."
        if "others" in heads
        else "",
        f"{where['cores']} cores, {where['device']}, {where['date']}; {versions}.",
    )
    return list(filter(None, found))


def show(console: Console, record: Record) -> None:
    """The table and its notes."""
    plus_minus = " ± " if "utf" in console.encoding.lower() else " +- "
    console.print()
    for table in tables(record, console.width, plus_minus):
        console.print(table)
    for note in notes(record):
        console.print(note)
