"""Who won, as far as the seeds can tell."""

import itertools
import math
from collections.abc import Sequence

from optimorph.racing.record import Record, Row

SURE = 2.0
"""Standard errors by which a mean must be lower than another to be called so."""


def noise(a: Row, b: Row) -> float:
    """How far two means may be apart by the luck of their seeds: `SURE` standard errors of the difference.

    2 √(sₐ²/nₐ + s_b²/n_b), of standard deviations s over n seeds. Of one seed each it is zero: unknown.
    """
    return SURE * math.hypot(a.spread / math.sqrt(a.seeds), b.spread / math.sqrt(b.seeds))


def leaders(rows: Sequence[Row]) -> list[Row]:
    """The first, and whoever follows up to one who is higher by more than `noise`; nobody if all blew up."""
    standing = [row for row in rows if not row.diverged]
    close = itertools.takewhile(lambda row: row.loss - standing[0].loss <= noise(standing[0], row), standing)
    return list(close)


def verdict(record: Record) -> str:
    """Who ends lowest, in a sentence; several where they are within the noise of the seeds."""
    stopped = "" if record.finished else "Stopped early. "
    first = leaders(record.rows)
    if not first:
        tried = len(record.trials)
        return stopped + ("Every training blew up." if record.rows else f"{tried} learning rates were tried.")
    names, at = _listed([row.name for row in first]), _listed([f"{row.loss:.4g}" for row in first])
    said = f"{names} {'ends' if len(first) == 1 else 'end'} lowest, at {at}"
    rest = [row for row in record.rows[len(first) :] if not row.diverged]
    alone = len(record.rows) > 1 and min(row.seeds for row in record.rows) == 1
    if len(first) > 1 and not alone:
        said += ": closer than the seeds' spread"
    elif rest:
        said += f", before {rest[0].name} at {rest[0].loss:.4g}"
    if alone:
        said += "; one seed cannot rank close losses"
    return f"{stopped}{said}. {record.measure[:1].upper()}{record.measure[1:]}, {first[0].steps} steps."


def _listed(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last
