"""What became of every array of a state."""

import collections
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax

from optimorph._routing.grouping import glob_of, group_by, table, without_numbers

KEPT, CONVERTED, FRESH, DROPPED = "kept", "converted", "fresh", "dropped"
_TITLES = ("path", "arrays", "kind", "fate", "why")


class CarryRow(NamedTuple):
    """What `carry_state` did with one array.

    Args:
      path: the path of the array's leaf; for a count, the part of a partition, or "".
      kind: "first moment", "count for bias correction", and so on.
      fate: "kept", "converted", "fresh" (as `tx.init` makes it), or "dropped".
      why: for "converted", from what to what; for "fresh" and "dropped", the reason.
      matters: whether the loss of this array changes the next updates.
    """

    path: str
    kind: str
    fate: str
    why: str = ""
    matters: bool = False

    @property
    def name(self) -> str:
        return f"{self.path!r}, {self.kind}" if self.path else self.kind


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class CarryReport:
    """What `carry_state` did with every array; `print` shows it as a table. `jax.jit` may return it.

    Args:
      rows: one row for each array of the new state, in its order, and then one for each dropped array.
    """

    rows: tuple[CarryRow, ...]

    def __iter__(self) -> Iterator[CarryRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lost(self) -> tuple[CarryRow, ...]:
        """The rows that `strict=True` refuses: arrays on which updates depend, and that are lost."""
        return tuple(row for row in self.rows if row.matters)

    def __str__(self) -> str:
        """The table. Leaves that differ only in the numbers of their paths share a line."""
        groups = group_by(self.rows, lambda row: (without_numbers(row.path), *row[1:]))
        cells = [(glob_of(row.path for row in rows), str(len(rows)), *rows[0][1:4]) for rows in groups]
        fates = collections.Counter(row.fate for row in self.rows)
        total = ", ".join(f"{fates[fate]} {fate}" for fate in (KEPT, CONVERTED, FRESH, DROPPED))
        lost = f"Updates depend on {len(self.lost)} that did not stay what they were."
        return "\n".join([*table(_TITLES, cells), "", f"{total}. {lost}"])
