"""Which optimizers end lowest, given the noise of the seeds; at equal seconds; and the steps for a loss."""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from optimorph._racing.race_data import Curve, RaceData, Row

TARGET = "adamw"
"""The optimizer whose final loss the others are to reach."""

STANDARD_ERRORS = 2.0
"""Two means differ if their difference exceeds this many of its standard errors."""


def losses_at_equal_seconds(race: RaceData) -> dict[str, float]:
    """Optimizer → its loss, the mean over its seeds, when the fastest one has taken all its steps.

    Every step counts with the median time of a step, and the loss between two evaluations is interpolated.
    """
    seconds = [row.steps / row.steps_per_second for row in race.rows if not row.diverged]
    return {
        row.name: _loss_at(min(seconds) * row.steps_per_second, _curves(race, row))
        for row in race.rows
        if not row.diverged and _curves(race, row)
    }


def steps_to_target(race: RaceData) -> dict[str, int]:
    """Optimizer → the first step at which its mean loss is as low as the final loss of `TARGET`.

    The loss between two evaluations is interpolated. An optimizer that never gets there has no entry.
    """
    targets = [row.loss for row in race.rows if row.name == TARGET and not row.diverged]
    found = {}
    for row, target in itertools.product(race.rows, targets):
        if (curves := _curves(race, row)) and (step := _first_step(target, curves)) is not None:
            found[row.name] = step
    return found


def _curves(race: RaceData, row: Row) -> list[Curve]:
    """The curves whose mean is the row; none if one of them diverged."""
    curves = [curve for curve in race.curves if curve.optimizer == row.name and curve.steps[-1] == row.steps]
    return [] if row.diverged else curves


def _loss_at(step: float, curves: list[Curve]) -> float:
    return statistics.fmean(np.interp(step, curve.steps, curve.losses) for curve in curves)


def _first_step(target: float, curves: list[Curve]) -> int | None:
    steps = curves[0].steps
    losses = [_loss_at(float(step), curves) for step in steps]
    for (a, above), (b, below) in itertools.pairwise(zip(steps, losses, strict=True)):
        if min(above, below) <= target:
            return a if above <= target else math.ceil(a + (b - a) * (above - target) / (above - below))
    return None


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
