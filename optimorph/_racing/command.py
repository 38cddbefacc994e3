"""The `optimorph race` command: its options, which are checked, and then a race, a sweep, a list or plots."""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from optimorph._core.checks import BadInput
from optimorph._racing.comparisons import join_words
from optimorph._racing.display import plain_console, sweep_display, training_display
from optimorph._racing.grids import at_edge, grid, toml
from optimorph._racing.interrupt import stop_on_ctrl_c
from optimorph._racing.race_data import Trial
from optimorph._racing.registry import (
    DEFAULT,
    OPTIMIZERS,
    LearningRates,
    make_optimizer,
    tuned_learning_rates,
)
from optimorph._racing.result import RaceResult, collect
from optimorph._racing.sweep import Sweep, best_rates
from optimorph._racing.table import print_table
from optimorph._racing.task import Task
from optimorph._racing.tasks import digits, flights, quadratic, text
from optimorph._racing.training import Entry, train_all

TASKS: dict[str, Callable[[float], Task]] = {
    "text": lambda condition: text.task(),
    "digits": lambda condition: digits.task(),
    "flights": lambda condition: flights.task(),
    "quadratic": quadratic.task,
}
"""Name → function of `--condition`."""

DESCRIPTIONS = {
    "text": "a character GPT on eight plays by Shakespeare (about 4 minutes on 2 cores)",
    "digits": "a small CNN on scikit-learn's handwritten digits (seconds)",
    "flights": "an MLP with embeddings that tells where a flight goes (seconds)",
    "quadratic": "a quadratic with the condition number of your choice (seconds)",
}

RACE, SWEEP, REDRAW, LIST = "", "sweep", "redraw", "list"

OPTIONS = {
    "task": ("NAME", "what to train: text, digits, flights or quadratic", "text", (RACE, SWEEP)),
    "optimizers": ("A,B", "optimizers that race, or all", ",".join(DEFAULT), (RACE, SWEEP)),
    "steps": ("N", "training steps (default: the task's)", None, (RACE, SWEEP)),
    "seeds": ("N", "training runs of each optimizer", "1", (RACE,)),
    "lr": (
        "NAME=VALUE",
        "peak learning rate of an optimizer, such as adamw=0.005, or of its embeddings, head and norms, such "
        "as adamw.others=0.1 (default: tuned)",
        None,
        (RACE,),
    ),
    "condition": ("R", "condition number of the quadratic", "1000", (RACE, SWEEP, LIST)),
    "out": ("DIR", "folder of the results", "race-results", (RACE, SWEEP, REDRAW)),
}
"""Name → placeholder of the value, help, default, and which modes use it. The other modes refuse it."""

MODES = {
    SWEEP: "tune the learning rates over a grid",
    REDRAW: "draw plots and reports again from the JSON files in the folder",
    LIST: "show tasks, optimizers and learning rates",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `optimorph race`. An option that the user did not type is None."""
    for name, (metavar, about, default, _) in OPTIONS.items():
        action = "append" if name == "lr" else "store"
        about += "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name}", metavar=metavar, action=action, help=about)
    group = parser.add_argument_group("instead of a race", "Type at most one of these.")
    modes = group.add_mutually_exclusive_group()
    for name, about in MODES.items():
        modes.add_argument(
            f"--{name}", dest="mode", action="store_const", const=name, default=RACE, help=about
        )


def find_conflict(args: argparse.Namespace) -> str | None:
    """Which options cannot be combined, and what to type instead; None if there is no conflict."""
    for name, (*_, modes) in OPTIONS.items():
        if getattr(args, name) is not None and args.mode not in modes:
            return f"--{name} has no effect with --{args.mode}; leave out one of them"
    if args.condition is not None and args.mode != LIST and args.task != "quadratic":
        return "--condition applies only to the quadratic; type --task quadratic, or leave out --condition"
    return None


def fill_defaults(args: argparse.Namespace) -> None:
    for name, (_, _, default, _) in OPTIONS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.lr = args.lr or []


def main(args: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    console = plain_console()
    if conflict := find_conflict(args):
        raise BadInput(conflict)
    fill_defaults(args)
    condition = _parse_float("--condition", args.condition, low=1.0, high=quadratic.WORST)
    if args.mode == LIST:
        return _list(console, condition)
    if args.mode == REDRAW:
        return _redraw(console, Path(args.out))
    if args.task not in TASKS:
        raise BadInput(f"no task is called {args.task!r}; the tasks are {', '.join(TASKS)}")
    names = _parse_optimizers(args.optimizers)
    seeds = _parse_int("--seeds", args.seeds)
    steps = None if args.steps is None else _parse_int("--steps", args.steps)
    task = TASKS[args.task](condition)
    if task.package is not None and importlib.util.find_spec(task.package) is None:
        raise BadInput(f"{task.name} needs a package that has its data; type pip install {task.package}")
    steps = task.steps if steps is None else steps
    if args.mode == SWEEP:
        return _sweep(console, task, _candidates(console, task, names), steps, _make_folder(args.out))
    rates = _parse_learning_rates(task, names, args.lr)
    return _race(console, task, rates, steps, seeds, _make_folder(args.out))


def _race(
    console: Console, task: Task, rates: dict[str, LearningRates], steps: int, seeds: int, out: Path
) -> int:
    with stop_on_ctrl_c(console) as stop:
        console.print(
            f"{task.title}: {steps} steps, {seeds} seed{'s' * (seeds > 1)}. "
            "Ctrl-C stops the race and reports what was reached."
        )
        entries = [Entry(name, make_optimizer(name, task, r, steps), r) for name, r in rates.items()]
        with training_display(console, list(rates), steps * seeds) as on_step:
            train_all(task, entries, steps, seeds, on_step, stop)
    if not stop.is_set():
        console.print("Computing the singular values of the last updates ...")
    result = collect(task, entries, steps, seeds, not stop.is_set(), _recorded_trials(out, task.title))
    if not result.rows:
        console.print("Stopped before the first step: nothing to report.")
        return 130
    print_table(console, result)
    with _one_line_errors():
        console.print(f"Wrote {join_words(result.write(out))}.")
    return 0 if result.finished else 130


def _recorded_trials(out: Path, title: str) -> list[Trial]:
    """The trials in the folder's `sweep.json` if that sweep has this title, otherwise none."""
    try:
        sweep = _read(out / "sweep.json")
    except BadInput:  # the file is not that of a sweep
        return []
    return sweep.trials if sweep is not None and sweep.title == title else []


def _read(path: Path) -> RaceResult | None:
    """The result in a JSON file of a race or a sweep; None if the file does not exist."""
    try:
        return RaceResult.read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        problem = f"cannot read {str(path)!r} ({error.strerror}); type --out with another folder"
    except (ValueError, TypeError, KeyError, AttributeError):
        problem = f"{str(path)!r} was not written by this command; move it away, or race again to replace it"
    raise BadInput(problem)


def _redraw(console: Console, out: Path) -> int:
    race, sweep = _read(out / "race.json"), _read(out / "sweep.json")
    if race is None and sweep is None:
        raise BadInput(f"there is no race.json and no sweep.json in {str(out)!r}; race first, or type --out")
    written = []
    with _one_line_errors():
        if race is not None:
            race = dataclasses.replace(race, trials=_recorded_trials(out, race.title) or race.trials)
            race.plot(out / "race.png")
            race.report(out / "race.html")
            written += [out / "race.png", out / "race.html"]
        if sweep is not None:
            sweep.report(out / "sweep.html")
            written += [out / "sweep.html"]
    console.print(f"Wrote {join_words(written)}.")
    return 0


def _candidates(console: Console, task: Task, names: list[str]) -> dict[str, list[LearningRates]]:
    """Name → grid, for every optimizer whose learning rate is not given by theory."""
    known = ", ".join(name for name in names if name in task.theory)
    candidates = {name: list(grid(name, task.name)) for name in names if name not in task.theory}
    if not candidates:
        raise BadInput(
            f"theory gives the learning rate of {known}, so nothing is left to tune; type other --optimizers"
        )
    if known:
        console.print(f"Not tuned, because theory gives their learning rates: {known}.")
    return candidates


def _sweep(
    console: Console, task: Task, candidates: dict[str, list[LearningRates]], steps: int, out: Path
) -> int:
    makers = {name: functools.partial(make_optimizer, name, task, steps=steps) for name in candidates}
    total = sum(map(len, candidates.values()))
    with stop_on_ctrl_c(console) as stop, sweep_display(console, total) as on_trial:
        # Not vmapped, which is slower on CPUs.
        sweep = Sweep(task, "tuning", steps, stop, max_bytes=0, on_trial=on_trial, rungs=(0.25, 0.5))
        trials = sweep.run(makers, candidates)
    if not trials:
        console.print("Stopped before any learning rate was tried: nothing to report.")
        return 130
    counts = {name: sum(trial.optimizer == name for trial in trials) for name in candidates}
    best = {name: best_rates(trials, name) for name in candidates if counts[name] == len(candidates[name])}
    for name, rates in best.items():
        if at_edge(name, rates, task.name):
            console.print(f"{name}: {rates} is at the edge of its grid; a better rate may lie outside.")
    section = toml(task.name, steps, best)
    console.print(section)
    result = collect(task, [], steps, 1, not stop.is_set(), trials)
    paths = [out / name for name in ("learning_rates.toml", "sweep.json", "sweep.html")]
    with _one_line_errors():
        paths[0].write_text(section)
        result.write_json(paths[1])
        result.report(paths[2])
    console.print(f"Wrote {join_words(paths)}.")
    return 0 if result.finished else 130


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.filename is None:  # not a file, but for example a closed pipe
            raise
        raise BadInput(
            f"cannot write {str(error.filename)!r} ({error.strerror}); move it away, or type another --out"
        ) from None


def _list(console: Console, condition: float) -> int:
    for name, description in DESCRIPTIONS.items():
        console.print(f"{name}: {description}")
        for optimizer, rates in tuned_learning_rates(TASKS[name](condition)).items():
            console.print(f"  {optimizer:<10} learning rate {rates}")
    return 0


def _parse_optimizers(text: str) -> list[str]:
    if text.strip() == "all":
        return list(OPTIMIZERS)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [""]:
        if name not in OPTIMIZERS:
            raise BadInput(f"no optimizer is called {name!r}; type all, or some of {', '.join(OPTIMIZERS)}")
    return list(dict.fromkeys(names))


def _parse_int(option: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise BadInput(f"{option} must be a whole number of at least 1, but is {text!r}")
    return value


def _parse_float(option: str, text: str, low: float = 0.0, high: float = 1e30) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise BadInput(f"{option} must be a number from {low:g} to {high:g}, but is {text!r}")
    return value


def _parse_learning_rates(task: Task, names: list[str], assignments: list[str]) -> dict[str, LearningRates]:
    """Name → the tuned learning rates, changed by the `NAME=VALUE` of every `--lr`."""
    tuned = tuned_learning_rates(task)
    rates = {name: tuned[name] for name in names}
    targets = {name: (name, "learning_rate") for name in names}
    targets |= {f"{name}.others": (name, "others") for name in names if rates[name].others is not None}
    for assignment in assignments:
        target, _, value = assignment.partition("=")
        if target not in targets:
            known = ", ".join(targets)
            raise BadInput(
                f"--lr {assignment!r} names no optimizer of this race; type NAME=VALUE with {known}"
            )
        name, field = targets[target]
        rates[name] = rates[name]._replace(**{field: _parse_float(f"--lr {target}", value)})
    return rates


def _make_folder(text: str) -> Path:
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        problem = f"cannot write to {text!r} ({error.strerror}); type --out with another folder"
        raise BadInput(problem) from None
    return path
