"""Who won, as far as the seeds can tell."""

import itertools
import math
from collections.abc import Sequence

from optimorph._racing.record import Record, Row

SURE = 2.0
"""A mean is called lower than another if it is lower by more than this many standard errors."""


def noise(a: Row, b: Row) -> float:
    """How far two means may differ by the luck of their seeds: `SURE` standard errors of the difference.

    2 √(sₐ²/nₐ + s_b²/n_b), where s is the standard deviation over n seeds. With one seed each the noise is
    unknown, and 0 is returned.
    """
    return SURE * math.hypot(a.spread / math.sqrt(a.seeds), b.spread / math.sqrt(b.seeds))


def leaders(rows: Sequence[Row]) -> list[Row]:
    """The rows from the first up to one that is higher by more than `noise`; none if all diverged."""
    standing = [row for row in rows if not row.diverged]
    close = itertools.takewhile(lambda row: row.loss - standing[0].loss <= noise(standing[0], row), standing)
    return list(close)


def verdict(record: Record) -> str:
    """A sentence on who ends lowest; it names several who are within the noise of the seeds."""
    stopped = "" if record.finished else "Stopped early. "
    first = leaders(record.rows)
    if not first:
        tried = len(record.trials)
        return stopped + (
            "Every training diverged." if record.rows else f"{tried} learning rates were tried."
        )
    names, at = _listed([row.name for row in first]), _listed([f"{row.loss:.4g}" for row in first])
    said = f"{names} {'ends' if len(first) == 1 else 'end'} lowest, at {at}"
    rest = [row for row in record.rows[len(first) :] if not row.diverged]
    alone = len(record.rows) > 1 and min(row.seeds for row in record.rows) == 1
    if len(first) > 1 and not alone:
        said += "; the seeds do not tell them apart"
    elif rest:
        said += f", before {rest[0].name} at {rest[0].loss:.4g}"
    if alone:
        said += "; one seed cannot rank close losses"
    return f"{stopped}{said}. {record.measure[:1].upper()}{record.measure[1:]}, {first[0].steps} steps."


def _listed(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last
