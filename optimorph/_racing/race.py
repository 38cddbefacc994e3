"""`optimorph.race`: a race on the user's own loss, parameters and batches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import optax

from optimorph._core.shown import shown
from optimorph._core.types import AxesRules
from optimorph._racing import custom_task
from optimorph._racing.custom_task import Optimizer
from optimorph._racing.display import plain_console, sweep_display, training_display
from optimorph._racing.interrupt import stop_on_ctrl_c
from optimorph._racing.race_data import Trial
from optimorph._racing.result import RaceResult, collect
from optimorph._racing.sweep import Sweep, best_rates
from optimorph._racing.training import Entry, train_all


def race(
    loss: Callable[[Any, Any], Any],
    params: Any,
    batches: Any,
    optimizers: Mapping[str, Optimizer],
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
) -> RaceResult:
    """Train a model with several optimizers on the same batches, and compare their losses and costs.

    An optimizer can be a function of a learning rate. Then all learning rates are tried first, each for
    `steps` steps, with a seed that the race does not use. The rate with the lowest held-out loss enters the
    race. Since the held-out data choose the rate, an optimizer with more rates to choose from has a small
    advantage.

    Ctrl-C stops the race after the current step and returns the result so far, without spectra.

    Args:
      loss: function (params, batch) → scalar.
      params: a pytree of floating-point arrays, which is copied; or a function seed → such a pytree.
      batches: a list of batches, or another iterable that can be read repeatedly; or a function seed →
        iterator, which is called again when the iterator ends.
      optimizers: name → optimizer, or name → function of a learning rate that returns an optimizer. The
        learning rate is a traced array. A function that compares it, as some of optax's schedules do, is
        compiled for each rate.
      held_out: batches that are not trained on. The held-out loss is the mean over them.
      steps: steps of each run, at least 1.
      learning_rates: rates to try with every function in `optimizers`; or a mapping, name → rates.
      seeds: runs of each optimizer, with the seeds 0, 1, ...
      axes: which leaves are matrices, as in `muon`. A leaf that no rule decides has no spectrum.
      sweep_bytes: the most memory in which all rates of an optimizer train together, in one vmapped program.
        The estimate counts parameters, gradients, updates, state, and what the loss keeps for its gradient.
        If it is exceeded, the rates train one after another, in a program that is compiled once. With 0
        they always do.
      title: a heading that says what is trained.
      measure: what the loss is, with its unit.
      log_loss: whether plots have a logarithmic loss axis. None: they have one if no loss is negative and the
        lowest is below a tenth of the first.
      progress: whether to show the progress of training.

    Returns:
      A result that prints as a table. Its fields are `rows` (lowest loss first), `curves`, `trials` of
      learning rates, and `spectra` of updates. `.plot(path)` and `.report(path)` write single files, and
      `.write(folder)` writes all.

    Raises:
      ValueError: an argument cannot be used; the message says what to type instead.
    """
    labels = {"title": title, "measure": measure, "log_loss": log_loss}
    task = custom_task.make_task(loss, params, batches, held_out, steps, **labels)
    candidates = custom_task.candidate_rates(optimizers, learning_rates)
    custom_task.check(task, params, batches, seeds, sweep_bytes)
    makers = {name: _maker(optimizers[name]) for name in candidates}
    made = {name: make(candidates[name][0]) for name, make in makers.items()}
    custom_task.check_updates(task, {**optimizers, **made})
    console = plain_console(quiet=not progress)
    with stop_on_ctrl_c(console) as stop:
        with sweep_display(console, sum(map(len, candidates.values()))) as on_trial:
            trials = Sweep(task, "held out", steps, stop, sweep_bytes, on_trial).run(makers, candidates)
        entries = [] if stop.is_set() else [_entry(name, tx, trials) for name, tx in optimizers.items()]
        with training_display(console, [entry.name for entry in entries], steps * seeds) as on_step:
            train_all(task, entries, steps, seeds, on_step, stop)
    return collect(task, entries, steps, seeds, not stop.is_set(), trials, axes)


def _maker(optimizer: Any) -> Callable[..., optax.GradientTransformation]:
    def make(rates: Any) -> optax.GradientTransformation:
        tx = optimizer(rates.learning_rate)
        if not isinstance(tx, optax.GradientTransformation):
            raise ValueError(
                f"race: {shown(optimizer)} must return an optimizer, but returns {shown(tx)}. Type "
                "lambda learning_rate: om.adamw(learning_rate), for example."
            )
        return tx

    return make


def _entry(name: str, optimizer: Optimizer, trials: list[Trial]) -> Entry:
    if isinstance(optimizer, optax.GradientTransformation):
        return Entry(name, optimizer)
    rates = best_rates(trials, name)
    return Entry(name, optimizer(rates.learning_rate), rates)
