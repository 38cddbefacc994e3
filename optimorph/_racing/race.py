"""A race on the user's own loss, parameters and batches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import optax
from rich.console import Console

from optimorph.core.types import AxesRules
from optimorph._racing import own
from optimorph._racing.contestants import Rates
from optimorph._racing.display import display, plain_console, trying
from optimorph._racing.interrupt import stop_on_ctrl_c
from optimorph._racing.laps import Contestant, hold
from optimorph._racing.own import Entry
from optimorph._racing.record import Trial
from optimorph._racing.result import Result, collect
from optimorph._racing.sweep import Sweep, best


def race(
    loss: Callable[[Any, Any], Any],
    params: Any,
    batches: Any,
    optimizers: Mapping[str, Entry],
    *,
    held_out: Iterable[Any],
    steps: int,
    learning_rates: Sequence[float] | Mapping[str, Sequence[float]] = (),
    seeds: int = 1,
    axes: AxesRules | None = None,
    sweep_bytes: int = 2**30,
    title: str = "race",
    measure: str = "held-out loss",
    log_loss: bool | None = None,
    progress: bool = True,
) -> Result:
    """Train your model with several optimizers, on the same batches, and show who wins at what price.

    Where an optimizer is a function of a learning rate, all rates are tried first, for as many steps and with
    a seed that the race does not use, and the rate of the lowest held-out loss races. That loss has then
    helped to choose: more rates to choose from are a small advantage. Ctrl-C stops after a step and returns
    what was reached, without spectra.

    Args:
      loss: (params, batch) → scalar.
      params: any tree of floating-point arrays, copied and left alone; or a function seed → such a tree.
      batches: a list, or anything that can be iterated over again and again; or a function seed → iterator,
        which is called again when the iterator ends.
      optimizers: name → transformation, or name → function of a learning rate that returns one. The rate is a
        traced array; a function that compares it, as some of optax's schedules do, is compiled for each rate.
      held_out: batches that are not trained on; the loss is their mean.
      steps: of every training, at least 1.
      learning_rates: tried by every function; or a mapping, name → rates.
      seeds: trainings of each optimizer, with the seeds 0, 1, ...
      axes: which leaves are matrices, as `muon` takes it, for the spectra; leaves undecided have none.
      sweep_bytes: all rates of an optimizer train in one vmapped program if parameters, gradients, updates,
        state and what the loss keeps for its gradient, times the number of rates, need no more than this;
        else one after another, in one program that is compiled once. 0: always so.
      title: what is trained, for headings.
      measure: what the loss is, with its unit.
      log_loss: whether the loss axis of pictures is logarithmic; None: it is if a loss falls below a tenth of
        the start and none is negative.
      progress: whether to show what happens meanwhile.

    Returns:
      Figures that print as a table: `rows`, best first, `curves`, `trials` of learning rates, `spectra` of
      updates; `.plot(path)`, `.report(path)` and `.write(folder)` for all files.

    Raises:
      ValueError: what cannot be raced, and what to type instead.
    """
    task = own.task(loss, params, batches, held_out, steps, title, measure, log_loss)
    points = own.points(optimizers, learning_rates)
    own.check(task, params, batches, seeds)
    console = plain_console(quiet=not progress)
    with stop_on_ctrl_c(console) as stop:
        sweep = Sweep(task, "held out", steps, stop, sweep_bytes)
        trials = _try_all(sweep, optimizers, points, console)
        entered = {} if stop.is_set() else optimizers
        contestants = [_contestant(name, entry, trials) for name, entry in entered.items()]
        with display(console, [one.name for one in contestants], steps * seeds) as shown:
            hold(task, contestants, steps, seeds, shown.moved, stop)
    return collect(task, contestants, steps, seeds, not stop.is_set(), trials, axes)


def _try_all(
    sweep: Sweep, makers: Mapping[str, Any], points: Mapping[str, list[Rates]], console: Console
) -> list[Trial]:
    trials: list[Trial] = []
    with trying(console, sum(map(len, points.values()))) as tried:
        for name, rates in points.items():
            if not sweep.stop.is_set():
                make = makers[name]
                trials += sweep.tries(name, lambda point, make=make: make(point.learning_rate), rates, tried)
    return trials


def _contestant(name: str, entry: Entry, trials: list[Trial]) -> Contestant:
    if isinstance(entry, optax.GradientTransformation):
        return Contestant(name, entry)
    rates = best([trial for trial in trials if trial.optimizer == name])
    return Contestant(name, entry(rates.learning_rate), rates)
