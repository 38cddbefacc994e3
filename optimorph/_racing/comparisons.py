"""Losses compared at equal seconds, and the steps that each optimizer needs for the loss of another."""

import itertools
import math
import statistics

import numpy as np

from optimorph._racing.race_data import Curve, RaceData, Row

TARGET = "adamw"
"""The optimizer whose final loss the others are to reach."""


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
