"""`optimorph race`: its arguments, its errors, its order of events."""

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from optimorph.racing.contestants import MAKERS, WITH_OTHERS, Rates, make, tuned
from optimorph.racing.display import display, trying
from optimorph.racing.grids import at_edge, grid, toml
from optimorph.racing.interrupt import stop_on_ctrl_c
from optimorph.racing.lanes import Maker
from optimorph.racing.laps import Contestant, hold
from optimorph.racing.record import Trial
from optimorph.racing.result import Result, collect
from optimorph.racing.sweep import Sweep, best
from optimorph.racing.table import show
from optimorph.racing.task import Task
from optimorph.racing.tasks import digits, quadratic, text

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


class BadInput(Exception):
    """What the user typed cannot be done; the message says what to type instead."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `optimorph race`."""
    parser.add_argument("--task", default="text", metavar="NAME", help=f"{', '.join(TASKS)} (default: text)")
    parser.add_argument(
        "--optimizers", metavar="A,B", default=",".join(MAKERS), help="who races (default: all)"
    )
    parser.add_argument("--steps", metavar="N", help="training steps (default: the task's)")
    parser.add_argument("--seeds", metavar="N", default="1", help="runs of each optimizer (default: 1)")
    parser.add_argument(
        "--lr",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a peak learning rate, such as adamw=0.005; adamw.others and muon.others are those of "
        "embeddings, head and norms (default: tuned)",
    )
    parser.add_argument(
        "--condition", metavar="R", default="1000", help="condition number of the quadratic (default: 1000)"
    )
    parser.add_argument("--sweep", action="store_true", help="tune the learning rates instead, over a grid")
    parser.add_argument(
        "--out", metavar="DIR", default="race-results", help="folder for the results (default: race-results)"
    )
    parser.add_argument(
        "--redraw", action="store_true", help="draw picture and page again, from the folder's race.json; stop"
    )
    parser.add_argument("--list", action="store_true", help="show tasks, optimizers, learning rates; stop")


def main(given: argparse.Namespace) -> int:
    """Run the command; returns its exit code.

    Raises:
      BadInput: with one line for the user.
    """
    console = Console(soft_wrap=True)
    given.condition = _number("--condition", given.condition, low=1.0, high=quadratic.WORST)
    if given.task not in TASKS:
        raise BadInput(f"no task is called {given.task!r}; there are {', '.join(TASKS)}")
    if given.list:
        return _list(console, given)
    if given.redraw:
        return _redraw(console, Path(given.out))
    names = _names(given.optimizers)
    seeds = _whole("--seeds", given.seeds)
    steps = None if given.steps is None else _whole("--steps", given.steps)
    task = TASKS[given.task](given)
    if given.sweep and given.lr:
        raise BadInput("--sweep tries a grid of learning rates; leave out --lr, or leave out --sweep")
    rates = {} if given.sweep else _rates(task, names, given.lr)
    out = _folder(given.out)
    steps = task.steps if steps is None else steps
    if given.sweep:
        return _sweep(console, task, names, steps, out)
    return _race(console, task, rates, steps, seeds, out)


def _race(console: Console, task: Task, rates: dict[str, Rates], steps: int, seeds: int, out: Path) -> int:
    console.print(f"{task.title}: {steps} steps, {seeds} seed{'s' * (seeds > 1)}. Ctrl-C stops and reports.")
    contestants = [Contestant(name, make(name, task, each, steps), each) for name, each in rates.items()]
    with stop_on_ctrl_c() as stop, display(console, list(rates), steps * seeds) as shown:
        hold(task, contestants, steps, seeds, shown.moved, stop)
    result = collect(task, contestants, steps, seeds, not stop.is_set(), _recorded(out, task))
    if not result.rows:
        console.print("Stopped before the first step: nothing to report.")
        return 130
    show(console, result)
    _wrote(console, result.write(out))
    return 0 if result.finished else 130


def _recorded(out: Path, task: Task) -> list[Trial]:
    """The learning rates that a sweep of this task has left in the folder."""
    try:
        found = Result.read(out / "sweep.json")
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ):  # none, or something else
        return []
    return found.trials if found.title == task.title else []


def _redraw(console: Console, out: Path) -> int:
    path = out / "race.json"
    try:
        result = Result.read(path)
    except OSError as error:
        raise BadInput(f"cannot read {str(path)!r} ({error.strerror}); race first, or type --out") from None
    result.plot(out / "race.png")
    result.report(out / "race.html")
    _wrote(console, [out / "race.png", out / "race.html"])
    return 0


def _sweep(console: Console, task: Task, names: list[str], steps: int, out: Path) -> int:
    points = {name: list(grid(name, task.name)) for name in names if name not in task.theory}
    trials: list[Trial] = []
    chosen: dict[str, Rates] = {}
    with stop_on_ctrl_c() as stop, trying(console, sum(map(len, points.values()))) as tried:
        sweep = Sweep(task, "tuning", steps, stop, 0)  # on CPUs one by one is faster
        for name, rates in points.items():
            found = [] if stop.is_set() else sweep.tries(name, _maker(name, task, steps), rates, tried)
            trials += found
            if len(found) == len(rates):
                chosen[name] = best(found)
    for name, rates in chosen.items():
        if at_edge(name, rates, task.name):
            console.print(f"{name}: {rates} is at the edge of its grid; a better rate may lie outside.")
    section = toml(task.name, steps, chosen)
    (out / "learning_rates.toml").write_text(section)
    console.print(section, highlight=False, markup=False)
    result = collect(task, [], steps, 1, not stop.is_set(), trials)
    result.write_json(out / "sweep.json")
    result.report(out / "sweep.html")
    _wrote(console, [out / f"{name}" for name in ("learning_rates.toml", "sweep.json", "sweep.html")])
    return 0 if result.finished else 130


def _maker(name: str, task: Task, steps: int) -> Maker:
    return lambda rates: make(name, task, rates, steps)


def _wrote(console: Console, paths: list[Path]) -> None:
    *others, last = map(str, paths)
    console.print(f"Wrote {', '.join(others)} and {last}.", highlight=False)


def _list(console: Console, given: argparse.Namespace) -> int:
    for name, about in ABOUT.items():
        console.print(f"{name}: {about}", highlight=False)
        for optimizer, rates in tuned(TASKS[name](given)).items():
            console.print(f"  {optimizer:<10} learning rate {rates}", highlight=False)
    return 0


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [""]:
        if name not in MAKERS:
            raise BadInput(f"no optimizer is called {name!r}; there are {', '.join(MAKERS)}")
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
            raise BadInput(f"--lr {entry!r} names nobody who races; type NAME=VALUE with {', '.join(known)}")
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
