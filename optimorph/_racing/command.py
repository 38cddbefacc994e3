"""The `optimorph race` command: checks what was typed, then races, sweeps, lists or redraws."""

import argparse
import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from optimorph._racing.contestants import MAKERS, WITH_OTHERS, Rates, make, tuned
from optimorph._racing.display import display, plain_console, trying
from optimorph._racing.grids import at_edge, grid, toml
from optimorph._racing.interrupt import stop_on_ctrl_c
from optimorph._racing.lanes import Maker
from optimorph._racing.laps import Contestant, hold
from optimorph._racing.options import add_arguments as add_arguments
from optimorph._racing.options import clash, fill
from optimorph._racing.record import Trial
from optimorph._racing.result import Result, collect
from optimorph._racing.sweep import Sweep, best
from optimorph._racing.table import show
from optimorph._racing.task import Task
from optimorph._racing.tasks import digits, quadratic, text

TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    "text": lambda given: text.task(),
    "digits": lambda given: digits.task(),
    "quadratic": lambda given: quadratic.task(given.condition),
}

ABOUT = {
    "text": "a character GPT on eight plays by Shakespeare (about 4 minutes on 2 cores)",
    "digits": "a small CNN on scikit-learn's handwritten digits (seconds)",
    "quadratic": "a quadratic with the condition number of your choice (seconds)",
}


CTRL_C = "Ctrl-C stops the race and reports what was reached."


class BadInput(Exception):
    """What the user typed cannot be done; the message says what to type instead."""


def main(given: argparse.Namespace) -> int:
    """Run the command; returns its exit code.

    Raises:
      BadInput: with one line for the user.
    """
    console = plain_console()
    if problem := clash(given):
        raise BadInput(problem)
    fill(given)
    given.condition = _number("--condition", given.condition, low=1.0, high=quadratic.WORST)
    if given.list:
        return _list(console, given)
    if given.redraw:
        return _redraw(console, Path(given.out))
    if given.task not in TASKS:
        raise BadInput(f"no task is called {given.task!r}; the tasks are {', '.join(TASKS)}")
    names = _names(given.optimizers)
    seeds = _whole("--seeds", given.seeds)
    steps = None if given.steps is None else _whole("--steps", given.steps)
    task = TASKS[given.task](given)
    steps = task.steps if steps is None else steps
    if given.sweep:
        return _sweep(console, task, _points(console, task, names), steps, _folder(given.out))
    rates = _rates(task, names, given.lr)
    return _race(console, task, rates, steps, seeds, _folder(given.out))


def _race(console: Console, task: Task, rates: dict[str, Rates], steps: int, seeds: int, out: Path) -> int:
    with stop_on_ctrl_c(console) as stop:
        console.print(f"{task.title}: {steps} steps, {seeds} seed{'s' * (seeds > 1)}. {CTRL_C}")
        contestants = [Contestant(name, make(name, task, each, steps), each) for name, each in rates.items()]
        with display(console, list(rates), steps * seeds) as shown:
            hold(task, contestants, steps, seeds, shown.moved, stop)
    if not stop.is_set():
        console.print("Computing the singular values of the last updates ...")
    result = collect(task, contestants, steps, seeds, not stop.is_set(), _recorded(out, task.title))
    if not result.rows:
        console.print("Stopped before the first step: nothing to report.")
        return 130
    show(console, result)
    with _writing():
        _wrote(console, result.write(out))
    return 0 if result.finished else 130


def _recorded(out: Path, title: str) -> list[Trial]:
    """The trials in the folder's `sweep.json` if that sweep has this title, otherwise none."""
    try:
        found = _read(out / "sweep.json")
    except BadInput:  # the file is not that of a sweep
        return []
    return found.trials if found is not None and found.title == title else []


def _read(path: Path) -> Result | None:
    """The result in a JSON file of a race or a sweep; None if the file does not exist."""
    try:
        return Result.read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadInput(
            f"cannot read {str(path)!r} ({error.strerror}); type --out with another folder"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise BadInput(
            f"{str(path)!r} was not written by this command; move it away, or race again to replace it"
        ) from None


def _redraw(console: Console, out: Path) -> int:
    race, sweep = _read(out / "race.json"), _read(out / "sweep.json")
    if race is None and sweep is None:
        raise BadInput(f"there is no race.json and no sweep.json in {str(out)!r}; race first, or type --out")
    written = []
    with _writing():
        if race is not None:
            race = dataclasses.replace(race, trials=_recorded(out, race.title) or race.trials)
            race.plot(out / "race.png")
            race.report(out / "race.html")
            written += [out / "race.png", out / "race.html"]
        if sweep is not None:
            sweep.report(out / "sweep.html")
            written += [out / "sweep.html"]
    _wrote(console, written)
    return 0


def _points(console: Console, task: Task, names: list[str]) -> dict[str, list[Rates]]:
    """The grid of every optimizer whose learning rate is not given by theory."""
    known = ", ".join(name for name in names if name in task.theory)
    points = {name: list(grid(name, task.name)) for name in names if name not in task.theory}
    if not points:
        raise BadInput(
            f"nothing to tune, as theory gives the learning rate of {known}; type other --optimizers"
        )
    if known:
        console.print(f"Not tuned, because theory gives their learning rates: {known}.")
    return points


def _sweep(console: Console, task: Task, points: dict[str, list[Rates]], steps: int, out: Path) -> int:
    trials: list[Trial] = []
    chosen: dict[str, Rates] = {}
    with stop_on_ctrl_c(console) as stop, trying(console, sum(map(len, points.values()))) as tried:
        sweep = Sweep(task, "tuning", steps, stop, 0)  # on CPUs one by one is faster
        for name, rates in points.items():
            found = [] if stop.is_set() else sweep.tries(name, _maker(name, task, steps), rates, tried)
            trials += found
            if len(found) == len(rates):
                chosen[name] = best(found)
    if not trials:
        console.print("Stopped before any learning rate was tried: nothing to report.")
        return 130
    for name, rates in chosen.items():
        if at_edge(name, rates, task.name):
            console.print(f"{name}: {rates} is at the edge of its grid; a better rate may lie outside.")
    section = toml(task.name, steps, chosen)
    console.print(section)
    result = collect(task, [], steps, 1, not stop.is_set(), trials)
    with _writing():
        (out / "learning_rates.toml").write_text(section)
        result.write_json(out / "sweep.json")
        result.report(out / "sweep.html")
    _wrote(console, [out / f"{name}" for name in ("learning_rates.toml", "sweep.json", "sweep.html")])
    return 0 if result.finished else 130


def _maker(name: str, task: Task, steps: int) -> Maker:
    return lambda rates: make(name, task, rates, steps)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Turn a file that cannot be written into an error of one line."""
    try:
        yield
    except OSError as error:
        if error.filename is None:  # not a file, such as a closed pipe
            raise
        raise BadInput(
            f"cannot write {str(error.filename)!r} ({error.strerror}); move it away, or type another --out"
        ) from None


def _wrote(console: Console, paths: list[Path]) -> None:
    *others, last = map(str, paths)
    console.print(f"Wrote {', '.join(others)} and {last}." if others else f"Wrote {last}.")


def _list(console: Console, given: argparse.Namespace) -> int:
    for name, about in ABOUT.items():
        console.print(f"{name}: {about}")
        for optimizer, rates in tuned(TASKS[name](given)).items():
            console.print(f"  {optimizer:<10} learning rate {rates}")
    return 0


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [""]:
        if name not in MAKERS:
            raise BadInput(f"no optimizer is called {name!r}; the optimizers are {', '.join(MAKERS)}")
    return list(dict.fromkeys(names))


def _whole(option: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise BadInput(f"{option} must be a whole number of at least 1, but is {text!r}")
    return value


def _number(what: str, text: str, low: float = 0.0, high: float = 1e30) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise BadInput(f"{what} must be a number from {low:g} to {high:g}, but is {text!r}")
    return value


def _rates(task: Task, names: list[str], given: list[str]) -> dict[str, Rates]:
    table = tuned(task)
    rates = {name: table[name] for name in names}
    for entry in given:
        target, _, value = entry.partition("=")
        name, _, which = target.partition(".")
        allowed = ("",) if name not in WITH_OTHERS else ("", "others")
        if name not in rates or which not in allowed:
            known = [n + s for n in names for s in ("", ".others")[: 1 + (n in WITH_OTHERS)]]
            raise BadInput(
                f"--lr {entry!r} names no optimizer of this race; type NAME=VALUE with {', '.join(known)}"
            )
        number = _number(f"--lr {target}", value)
        old = rates[name]
        rates[name] = Rates(old.learning_rate, number) if which else Rates(number, old.others)
    return rates


def _folder(text: str) -> Path:
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise BadInput(
            f"cannot write to {text!r} ({error.strerror}); type --out with another folder"
        ) from None
    return path
