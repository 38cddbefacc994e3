"""The verdict: which optimizers have the lowest final loss, given the noise of the seeds."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from optimorph._racing.race_data import RaceData, Row

STANDARD_ERRORS = 2.0
"""Two means differ if their difference exceeds this many of its standard errors."""


def noise(a: Row, b: Row) -> float:
    """How far two means can differ by chance: `STANDARD_ERRORS` standard errors of their difference.

    2 √(sₐ²/nₐ + s_b²/n_b), where s is the standard deviation over n seeds. With one seed, s is unknown and
    counts as 0.
    """
    return STANDARD_ERRORS * math.hypot(a.spread / math.sqrt(a.seeds), b.spread / math.sqrt(b.seeds))


def leaders(rows: Sequence[Row]) -> list[Row]:
    """The first rows, whose losses exceed the lowest by no more than `noise`; none if all diverged."""
    finite = [row for row in rows if not row.diverged]
    close = itertools.takewhile(lambda row: row.loss - finite[0].loss <= noise(finite[0], row), finite)
    return list(close)


def verdict(race: RaceData) -> str:
    """Which optimizers end lowest: one, or several whose losses differ by no more than the noise."""
    stopped = "" if race.finished else "Stopped early. "
    first = leaders(race.rows)
    if not first:
        tried = f"{len(race.trials)} learning rates were tried."
        return stopped + ("Every run diverged." if race.rows else tried)
    names, losses = join_words([row.name for row in first]), join_words([f"{row.loss:.4g}" for row in first])
    sentence = f"{names} {'ends' if len(first) == 1 else 'end'} lowest, at {losses}"
    rest = [row for row in race.rows[len(first) :] if not row.diverged]
    one_seed = len(race.rows) > 1 and min(row.seeds for row in race.rows) == 1
    if len(first) > 1 and not one_seed:
        sentence += "; the seeds do not tell them apart"
    elif rest:
        sentence += f", before {rest[0].name} at {rest[0].loss:.4g}"
    if one_seed:
        sentence += "; one seed cannot rank close losses"
    return f"{stopped}{sentence}. {race.measure[:1].upper()}{race.measure[1:]}, {first[0].steps} steps."


def join_words(words: Iterable[Any]) -> str:
    """The words with commas, and "and" before the last."""
    *others, last = map(str, words)
    return f"{', '.join(others)} and {last}" if others else last
