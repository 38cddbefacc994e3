"""The command, as its user meets it."""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import importlib.resources
import io
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
from rich.console import Console

import optimorph as om
from optimorph.__main__ import main
from optimorph._racing import command, grids, result, training
from optimorph._racing.command import MODES, OPTIONS, RACE, find_conflict
from optimorph._racing.comparisons import losses_at_equal_seconds, steps_to_target
from optimorph._racing.display import plain_console, training_display
from optimorph._racing.interrupt import STOPPING, stop_on_ctrl_c
from optimorph._racing.race_data import Curve
from optimorph._racing.registry import (
    DEFAULT,
    OPTIMIZERS,
    LearningRates,
    make_optimizer,
    tuned_learning_rates,
)
from optimorph._racing.result import RaceResult, make_row
from optimorph._racing.sweep import Sweep, best_rates
from optimorph._racing.table import table_rows, tables
from optimorph._racing.tasks import digits, flights, quadratic, text
from optimorph._racing.training import CompiledTask, Entry, Run, train_all
from optimorph.linalg import Axes  # noqa: F401  (the public package imports beside the command)


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Flax, scikit-learn and matplotlib are not written for strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_quadratic_race(tmp_path, capsys):
    assert main(["race", "--task", "quadratic", "--steps", "40", "--seeds", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for name in DEFAULT:
        assert re.search(rf"^ *{name} ", out, re.M), out
    assert "step 40/80" in out
    found = json.loads((tmp_path / "race.json").read_text())
    assert found["finished"] is True
    assert [row["loss"] for row in found["rows"]] == sorted(row["loss"] for row in found["rows"])
    assert {row["steps"] for row in found["rows"]} == {40}
    assert {(c["optimizer"], c["seed"]) for c in found["curves"]} == {(n, s) for n in DEFAULT for s in (0, 1)}
    assert all(c["seconds"] == sorted(c["seconds"]) and c["steps"][-1] == 40 for c in found["curves"])
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "race.html").read_text().count('<th scope="row">') == 2 * len(DEFAULT)
    assert {spectrum["path"] for spectrum in found["spectra"]} == {"kernel"}
    assert {spectrum["optimizer"] for spectrum in found["spectra"]} == set(DEFAULT)


def test_redrawn_from_its_figures(tmp_path, capsys):
    given = ["race", "--out", str(tmp_path)]
    main([*given, "--task", "quadratic", "--steps", "30", "--optimizers", "sgd,muon", "--lr", "sgd=100"])
    assert "null" in (tmp_path / "race.json").read_text()  # a loss that overflowed
    drawn = {path: path.read_bytes() for path in tmp_path.glob("race.*")}
    assert len(drawn) == 3
    for suffix in ("png", "html"):
        (tmp_path / f"race.{suffix}").unlink()
    assert main([*given, "--redraw"]) == 0
    assert {path: path.read_bytes() for path in tmp_path.glob("race.*")} == drawn
    assert "race.html" in capsys.readouterr().out


def test_pages_of_a_sweep_are_redrawn_and_the_race_keeps_its_rates(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(grids.GRIDS["quadratic"], "adagrad", (0.01, 1.0))
    given = ["race", "--task", "quadratic", "--optimizers", "adagrad", "--steps", "3", "--out", str(tmp_path)]
    main(given)  # raced first, tuned later
    main([*given, "--sweep"])
    drawn = (tmp_path / "sweep.html").read_bytes()
    (tmp_path / "sweep.html").unlink()
    capsys.readouterr()
    assert main(["race", "--redraw", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("race.png", "race.html", "sweep.html"))
    assert (tmp_path / "sweep.html").read_bytes() == drawn
    assert "rates-title" in (tmp_path / "race.html").read_text()
    for suffix in ("json", "png", "html"):
        (tmp_path / f"race.{suffix}").unlink()
    assert main(["race", "--redraw", "--out", str(tmp_path)]) == 0
    assert not list(tmp_path.glob("race.*"))


STATE_BYTES = (
    {"sgd": 0, "ademamix": 12, "mars_adamw": 12}
    | dict.fromkeys(("momentum", "nesterov", "adagrad", "rmsprop", "lion", "muon", "muonh", "scion"), 4)
    | dict.fromkeys(("adam", "nadam", "adamw", "nadamw", "laprop", "adamh", "adamuon", "muon2"), 8)
    | {"normuon": 4 + 4 / 32}  # a number for each row
    | dict.fromkeys(("soap", "soap_muon"), 24)  # two factors and two bases of a square matrix
    | {"klsoap": 24 + 2 * 4 / 32}  # and two rows of second moments
    | {"shampoo": 20 + 2 * 4 / 32}  # these rows in place of the second moments of all elements
)


@pytest.mark.slow
def test_every_optimizer_races_and_its_state_is_counted(tmp_path):
    main(["race", "--task", "quadratic", "--optimizers", "all", "--steps", "4", "--out", str(tmp_path)])
    rows = {row["name"]: row for row in json.loads((tmp_path / "race.json").read_text())["rows"]}
    assert set(rows) == set(OPTIMIZERS) == set(STATE_BYTES)
    for name, size in STATE_BYTES.items():
        assert rows[name]["state_bytes_per_parameter"] == pytest.approx(size, abs=0.07), name
        assert rows[name]["loss"] is not None, name


def test_learning_rates_by_hand(tmp_path, capsys):
    arguments = [
        "race",
        "--task",
        "quadratic",
        "--steps",
        "3",
        "--optimizers",
        "muon,sgd",
        "--out",
        str(tmp_path),
    ]
    assert main([*arguments, "--lr", "sgd=0.125", "--lr", "muon.others=0.5", "--condition", "10"]) == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "race.json").read_text())["rows"]}
    assert set(rows) == {"muon", "sgd"}
    assert rows["sgd"]["learning_rate"] == 0.125
    assert rows["muon"]["others_learning_rate"] == 0.5
    assert "condition number 10" in capsys.readouterr().out


def test_a_diverged_optimizer_does_not_spoil_the_race(tmp_path, capsys):
    arguments = [
        "race",
        "--task",
        "quadratic",
        "--steps",
        "60",
        "--optimizers",
        "sgd,adam",
        "--out",
        str(tmp_path),
    ]
    assert main([*arguments, "--lr", "sgd=1e30"]) == 0
    out = capsys.readouterr().out
    assert "diverged" in out
    found = json.loads((tmp_path / "race.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["adam", "sgd"]
    assert found["rows"][1]["loss"] is None
    assert found["rows"][1]["steps"] < 60


def test_infinite_losses_are_null_in_json(tmp_path):
    """A loss that overflows without becoming NaN: with this rate the sum of squares reaches inf."""
    arguments = [
        "race",
        "--task",
        "quadratic",
        "--optimizers",
        "sgd,adam",
        "--steps",
        "30",
        "--out",
        str(tmp_path),
    ]
    assert main([*arguments, "--lr", "sgd=100"]) == 0
    curves = json.loads((tmp_path / "race.json").read_text())["curves"]
    assert None in next(c["losses"] for c in curves if c["optimizer"] == "sgd")


def run_of(loss, step):
    """A run after this many steps, without the training."""
    run = object.__new__(Run)
    run.params = run.state = jnp.zeros(3)
    run.losses, run.compile_seconds = [4.0, loss], 1.0
    run.model_seconds, run.update_seconds = [0.1] * step, [0.01] * step
    return run


def row_of(*losses_and_steps):
    runs = [run_of(*each) for each in losses_and_steps]
    return make_row(Entry("muon", optax.identity(), LearningRates(0.02, 0.05), runs))


def test_a_seed_that_diverged_is_not_left_out():
    assert row_of((math.nan, 50), (2.1, 250)).diverged
    assert row_of((2.0, 250), (2.2, 250)).loss == pytest.approx(2.1)
    stopped = row_of((2.0, 250), (3.0, 40))
    assert (stopped.seeds, stopped.loss, stopped.steps) == (1, 2.0, 250)


def shown(width):
    console = Console(width=width, record=True, file=io.StringIO())
    rows = [row_of((2.2138, 250), (2.2338, 250), (2.1938, 250))]
    task = text.task()
    record = RaceResult(task.name, task.title, task.measure, 250, 3, True, {}, rows, [])
    for table in tables(record, width):
        console.print(table)
    return console.export_text()


def race_of(curves, steps_per_second):
    """A race of these losses at steps 0, 50 and 100, with one curve for each seed."""
    rows = [
        dataclasses.replace(
            row_of(*((losses[-1], 100) for losses in seeds)),
            name=name,
            steps_per_second=steps_per_second[name],
        )
        for name, seeds in curves.items()
    ]
    curves = [
        Curve(name, seed, [0, 50, 100], [0.0, 1.0, 2.0], losses)
        for name, seeds in curves.items()
        for seed, losses in enumerate(seeds)
    ]
    return RaceResult("custom", "race", "loss", 100, 2, True, {}, rows, curves)


def test_losses_at_equal_seconds_and_steps_to_the_loss_of_adamw():
    race = race_of(
        {
            "muon": [[4.0, 2.0, 1.0], [4.0, 2.4, 1.2]],
            "adamw": [[4.0, 3.0, 2.0], [4.0, 3.0, 1.8]],
            "sgd": [[4.0, 3.0, 2.5], [4.0, 3.0, 2.5]],
            "blown": [[4.0, 3.0, math.nan], [4.0, 1.0, 1.0]],
        },
        {"muon": 25.0, "adamw": 40.0, "sgd": 50.0, "blown": 1e3},
    )
    found = losses_at_equal_seconds(race)  # after the 2 seconds of sgd: 50 and 80 steps of the others
    assert found == pytest.approx({"muon": 2.2, "adamw": 2.34, "sgd": 2.5})
    assert steps_to_target(race) == {"muon": 64, "adamw": 100}  # 50 + 50 (2.2 - 1.9) / (2.2 - 1.1)
    assert not steps_to_target(race_of({"muon": [[4.0, 2.0, 1.0]]}, {"muon": 25.0}))
    assert steps_to_target(race_of({"adamw": [[1.0, 1.0, 1.0]]}, {"adamw": 25.0})) == {"adamw": 0}
    heads, *rows = table_rows(race)
    assert "steps" not in heads  # all took 100
    assert dict(zip(heads, rows[0], strict=True))["steps to\nadamw"] == "64"
    assert dict(zip(heads, rows[2], strict=True))["steps to\nadamw"] == ""
    assert dict(zip(heads, rows[3], strict=True))["final loss"] == "diverged"
    longer = dataclasses.replace(race, steps=200)  # it was stopped
    assert "steps" in next(table_rows(longer))


def test_steps_per_second_are_those_of_the_median_step():
    run = run_of(2.0, 50)
    assert make_row(Entry("sgd", optax.identity(), None, [run])).steps_per_second == pytest.approx(1 / 0.11)
    run.model_seconds[7] = 30.0  # the machine was busy
    assert make_row(Entry("sgd", optax.identity(), None, [run])).steps_per_second == pytest.approx(1 / 0.11)


@pytest.mark.parametrize("width", [40, 60, 80])
def test_the_table_is_whole_at_any_width(width):
    out = shown(width)
    assert "…" not in out
    for word in ("2.214 ± 0.02", "0.02 / 0.05", "10.00", "B/param"):
        assert word in out
    heads = [line.split()[:1] for line in out.splitlines()].count(["optimizer"])
    assert heads == (2 if width == 40 else 1)
    assert max(map(len, out.splitlines())) <= width


NAMED = [dataclasses.replace(row_of((2.0, 250)), name=name) for name in OPTIMIZERS]


@pytest.mark.parametrize("width", range(30, 101))
def test_no_name_in_the_table_is_broken(width):
    console = Console(width=width, record=True, file=io.StringIO())
    for table in tables(RaceResult("custom", "race", "loss", 250, 1, True, {}, NAMED, []), width):
        console.print(table)
    lines = [line.split()[:1] for line in console.export_text().splitlines()]
    first = [word[0] for word in lines if word and word[0].isidentifier()]
    assert set(first) - {"equal", "steps", "update", "state", "learning"} == {"optimizer", *OPTIMIZERS}


def test_lines_break_between_words_on_a_terminal_and_nowhere_in_a_pipe(monkeypatch):
    words = "supercalifragilistic [muon] :smile: " * 9
    for force, lines in ((True, 10), (False, 1)):
        console = plain_console()
        console.file, console._force_terminal = io.StringIO(), force
        console.width = 40 if force else console.width
        console.print(words.strip())
        out = console.file.getvalue()
        assert out.split() == words.split()
        assert (len(out.splitlines()) == 1) == (lines == 1)


BAD = {
    "task": (["--task", "imagenet"], ["'imagenet'", "text, digits, flights, quadratic"]),
    "optimizer": (["--optimizers", "adam,adamax"], ["'adamax'", "all", "muon"]),
    "no optimizer": (["--optimizers", ","], ["no optimizer", "muon"]),
    "negative steps": (["--steps", "-3"], ["--steps", "'-3'", "at least 1"]),
    "words for steps": (["--steps", "many"], ["--steps", "'many'"]),
    "no seeds": (["--seeds", "0"], ["--seeds", "'0'"]),
    "lr of an unknown optimizer": (["--lr", "adamax=1"], ["'adamax=1'", "muon.others"]),
    "lr of an optimizer that does not race": (["--optimizers", "sgd", "--lr", "adam=1"], ["'adam=1'", "sgd"]),
    "lr without value": (["--lr", "adam"], ["--lr adam", "''"]),
    "negative lr": (["--lr", "adam=-1"], ["--lr adam", "'-1'"]),
    "others of sgd": (["--lr", "sgd.others=1"], ["'sgd.others=1'"]),
    "condition": (["--task", "quadratic", "--condition", "0.5"], ["--condition", "'0.5'"]),
    "condition of 1e9": (["--task", "quadratic", "--condition", "1e9"], ["--condition", "1e+06"]),
    "sweep with lr": (["--sweep", "--lr", "adam=1"], ["--sweep", "--lr"]),
    "condition of text": (["--condition", "100"], ["--condition", "--task quadratic"]),
    "condition of digits": (["--task", "digits", "--condition", "100"], ["--task quadratic"]),
    "two at a time": (["--list", "--redraw"], ["--list", "--redraw", "not allowed with"]),
    "nothing to sweep": (["--task", "quadratic", "--sweep", "--optimizers", "sgd"], ["theory", "sgd"]),
    "folder": (["--out", "/proc/nothing"], ["'/proc/nothing'", "--out"]),
    "nothing to redraw": (["--redraw", "--out", "nowhere"], ["race.json", "--out"]),
    "unknown option": (["--optimisers", "adam"], ["--optimisers"]),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "stop_on_ctrl_c", lambda console: pytest.fail("training began"))
    with pytest.raises(SystemExit) as stopped:
        main(["race", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_what_has_no_effect_is_refused():
    for mode in (RACE, *MODES):
        for name, (*_, modes) in OPTIONS.items():
            given = argparse.Namespace(**dict.fromkeys(OPTIONS) | {"mode": mode, name: "1"})
            if name == "condition":
                given.task = "quadratic" if mode in OPTIONS["task"][-1] else None
            problem = find_conflict(given)
            assert (problem is None) == (mode in modes), (mode, name, problem)
            assert problem is None or (f"--{name} " in problem and f"--{mode};" in problem)


def test_every_option_is_in_the_table_of_what_is_used(capsys):
    with pytest.raises(SystemExit):
        main(["race", "--help"])
    options = set(re.findall(r"--([a-z]+)", capsys.readouterr().out)) - {"help"}
    assert options == {*OPTIONS, *MODES}
    assert all(RACE in modes for *_, modes in OPTIONS.values())


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"optimorph {importlib.metadata.version('optimorph')}\n"


def test_a_file_that_is_no_race(tmp_path, capsys):
    (tmp_path / "race.json").write_text("[1]")
    with pytest.raises(SystemExit):
        main(["race", "--redraw", "--out", str(tmp_path)])
    assert "race.json' was not written by this command" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [["--redraw"], ["--sweep"], []], ids=str)
def test_a_file_that_cannot_be_written(mode, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(grids.GRIDS["quadratic"], "adagrad", (0.01,))
    given = ["--task", "quadratic", "--optimizers", "adagrad", "--steps", "2"]
    out = ["--out", str(tmp_path)]
    assert main(["race", *given, *out]) == 0
    for name in ("race.png", "sweep.json"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name / "foreign").mkdir(parents=True)
    if mode == ["--redraw"]:
        (tmp_path / "sweep.json" / "foreign").rmdir()
        (tmp_path / "sweep.json").rmdir()
        given = []
    with pytest.raises(SystemExit) as stopped:
        main(["race", *given, *mode, *out])
    assert stopped.value.code == 2
    name = "sweep.json" if mode == ["--sweep"] else "race.png"
    error = capsys.readouterr().err
    assert f"cannot write '{tmp_path / name}'" in error
    assert error.count("\n") == 1


def test_no_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_a_file_where_the_folder_should_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["race", "--out", str(tmp_path / "file")])
    assert "another folder" in capsys.readouterr().err


def test_list(capsys):
    assert main(["race", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in [*command.TASKS, *OPTIMIZERS])


def test_every_task_has_learning_rates():
    for task in command.TASKS:
        made = command.TASKS[task](1000.0)
        rates = tuned_learning_rates(made)
        assert list(rates) == list(OPTIMIZERS)
        for name, rate in rates.items():
            assert (rate.others is not None) == (OPTIMIZERS[name].others_of is not None)
            assert name in made.theory or rate in list(grids.grid(name, task))
            make_optimizer(name, made, rate, 10)  # the recipe takes what the task has, such as a decay


def test_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(grids.GRIDS["quadratic"], "adagrad", (0.01, 1.0, 1e30))
    arguments = ["--task", "quadratic", "--optimizers", "sgd,adagrad", "--steps", "20", "--sweep"]
    assert main(["race", *arguments, "--out", str(tmp_path)]) == 0
    written = (tmp_path / "learning_rates.toml").read_text()
    assert "adagrad = { learning_rate = 1.0 }" in written
    assert "sgd =" not in written  # theory knows it
    assert "--steps 20" in written
    out = capsys.readouterr().out
    assert "adagrad    1e+30" in out
    assert "theory gives their learning rates: sgd." in out
    tried = RaceResult.read(tmp_path / "sweep.json").trials
    assert [trial.learning_rate for trial in tried] == [0.01, 1.0, 1e30]
    assert not math.isfinite(tried[-1].loss)
    assert "adagrad" in (tmp_path / "sweep.html").read_text()
    main(["race", "--task", "quadratic", "--optimizers", "adagrad", "--steps", "3", "--out", str(tmp_path)])
    assert RaceResult.read(tmp_path / "race.json").trials[:2] == tried[:2]
    assert "1 of 3" in (tmp_path / "race.html").read_text()


def test_edges_of_a_grid():
    low, *_, high = grids.GRIDS["text"]["sgd"]
    assert grids.at_edge("sgd", LearningRates(low), "text")
    assert grids.at_edge("sgd", LearningRates(high), "text")
    assert not grids.at_edge("sgd", LearningRates(grids.GRIDS["text"]["sgd"][2]), "text")
    assert grids.at_edge(
        "muon", LearningRates(grids.GRIDS["text"]["muon"][1], grids.GRIDS["text"]["others"][0]), "text"
    )


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A real interrupt of a real process on a terminal of 80 columns: its folder, exit code and output."""
    folder = tmp_path_factory.mktemp("interrupted")
    code = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    code += "from optimorph.__main__ import main; sys.exit(main())"
    arguments = ["race", "--task", "quadratic", "--optimizers", "sgd,adam", "--steps", "10000000"]
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--out", str(folder)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm"},
        start_new_session=True,
    )
    os.close(theirs)
    out, sent = b"", False
    with contextlib.suppress(OSError):  # at its end
        while some := os.read(ours, 65536):
            out += some
            if not sent and re.search(rb"adam [^\n]*[1-9]\d*/10000000", out):
                sent = os.write(ours, b"\x03")  # as it is typed: the terminal echoes it
    os.close(ours)
    return folder, process.wait(timeout=60), out.decode()


def screen(written):
    """What stands on a terminal in the end, of what rich writes there: lines, and the way up to wipe them."""
    lines, at = [""], 0
    for token in re.findall(r"\x1b\[(?:\?)?[\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if token == "\n":
            at += 1
            lines += [""] * (at == len(lines))
        elif token == "\x1b[1A":
            at -= 1
        elif token == "\x1b[2K":
            lines[at] = ""
        elif token[0] not in "\x1b\r":
            lines[at] += token
            while len(lines[at]) > 80:  # the terminal's own break
                lines[at : at + 1] = [lines[at][:80], lines[at][80:]]
                at += 1
    return lines


def test_ctrl_c_keeps_what_was_measured(interrupted):
    folder, code, out = interrupted
    assert code == 130, out
    assert "Stopped early" in out
    found = json.loads((folder / "race.json").read_text())
    assert found["finished"] is False
    assert all(row["steps"] > 0 for row in found["rows"])
    taken = {row["name"]: row["steps"] for row in found["rows"]}  # no row without a step
    for curve in found["curves"]:
        assert curve["steps"][-1] == taken.get(curve["optimizer"], 0)


def test_ctrl_c_says_what_happens_and_leaves_each_line_once(interrupted):
    _, _, out = interrupted
    assert "^C" in out
    after = out[out.index("^C") :]
    assert STOPPING in " ".join(after.replace("\r", "").split())
    assert after.index("Stopping") < after.index("Stopped early")
    bars = [line.split()[0] for line in screen(out) if "/10000000" in line]
    assert bars == ["sgd", "adam"], screen(out)


def test_a_message_of_another_thread_leaves_each_bar_once():
    """It would be written when the bars have already stopped."""

    class Late:
        def __rich_console__(self, console, options):
            time.sleep(0.5)
            yield STOPPING

    console = plain_console()
    console.file, console.width = io.StringIO(), 80
    console._force_terminal = console.is_interactive = True
    speaker = threading.Thread(target=console.print, args=[Late()])
    with training_display(console, ["sgd", "adam"], 10):
        speaker.start()
        time.sleep(0.2)
    speaker.join()
    lines = screen(console.file.getvalue())
    assert [line.split()[0] for line in lines if "/10" in line] == ["sgd", "adam"], lines


def test_a_stop_is_announced_while_the_main_thread_is_busy(monkeypatch):
    """As when it compiles: no handler of Python runs there until that is done."""
    console = Console(file=io.StringIO(), width=200)
    said = threading.Event()
    monkeypatch.setattr(console, "print", lambda text: text == STOPPING and said.set())
    with stop_on_ctrl_c(console) as stop:
        signal.raise_signal(signal.SIGINT)
        assert said.wait(60)
        assert stop.is_set()


def test_a_stopped_race_evaluates_nothing_twice():
    task, stop, calls = quadratic.task(10.0), threading.Event(), []
    entries = [Entry(name, make_optimizer(name, task, LearningRates(0.1), 40)) for name in ("sgd", "adam")]

    def on_step(entry):
        calls.append((entry.name, entry.step))
        if len(calls) == 30:
            stop.set()

    train_all(task, entries, 40, 1, on_step, stop)
    for entry in entries:
        assert entry.runs[0].steps == sorted(set(entry.runs[0].steps))
        assert entry.runs[0].steps[-1] == entry.step


def test_the_first_calls_of_a_program_are_not_timed(monkeypatch):
    """Nor do they change where the training starts."""
    calls = []

    class Cold(CompiledTask):
        def __init__(self, task):
            super().__init__(task)
            inner, self.gradient = self.gradient, lambda *given: calls.append("gradient") or inner(*given)

        def compile(self, *given):
            inner, seconds = super().compile(*given)
            return lambda *given: calls.append("update") or inner(*given), seconds

    run = Run(Cold(quadratic.task(10.0)), optax.adam(0.1), 0)
    monkeypatch.setattr(training, "Run", lambda *given: run)
    before = np.asarray(run.params["kernel"])
    seen = []
    train_all(
        run.compiled.task,
        [Entry("adam", optax.adam(0.1))],
        1,
        1,
        lambda entry: seen.append((entry.step, list(calls), np.asarray(entry.runs[0].params["kernel"]))),
        threading.Event(),
    )
    step, called, params = seen[0]
    assert step == 0
    assert called.count("update") >= 1
    assert called.count("gradient") >= 2  # one of them for shapes
    np.testing.assert_array_equal(params, before)
    assert len(run.update_seconds) == len(run.model_seconds) == 1


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A command of seconds."""
    monkeypatch.setitem(grids.GRIDS["quadratic"], "adagrad", (0.01, 0.1))
    return ["race", "--task", "quadratic", "--steps", "5", "--optimizers", "adagrad", "--out", str(tmp_path)]


def test_ctrl_c_before_the_training_is_heard(small, monkeypatch, capsys):
    def interrupted(*given):
        signal.raise_signal(signal.SIGINT)
        return make_optimizer(*given)

    monkeypatch.setattr(command, "make_optimizer", interrupted)
    assert main(small) == 130
    assert "Stopped before the first step" in capsys.readouterr().out


def test_ctrl_c_among_the_spectra_keeps_the_race(small, monkeypatch, tmp_path):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(result, "spectra", interrupted)
    assert main(small) == 130
    found = json.loads((tmp_path / "race.json").read_text())
    assert found["rows"][0]["steps"] == 5
    assert found["finished"] is False
    assert found["spectra"] == []


def test_the_worse_half_of_the_rates_stops_at_a_quarter_and_at_half_of_the_steps():
    task, rates = quadratic.task(10.0), [LearningRates(2.0**-k) for k in range(9)]
    sweep = Sweep(task, "tuning", 40, threading.Event(), 0, lambda trial: None, rungs=(0.25, 0.5))
    makers = {"sgd": lambda rates: om.sgd(rates.learning_rate)}
    trials = sweep.run(makers, {"sgd": rates})
    steps = {trial.learning_rate: trial.steps for trial in trials}
    assert sorted(steps.values()) == [10] * 4 + [20] * 2 + [40] * 3
    whole = Sweep(task, "tuning", 40, threading.Event(), 0, lambda trial: None).run(makers, {"sgd": rates})
    assert best_rates(trials, "sgd") == best_rates(whole, "sgd")
    losses = {trial.learning_rate: trial.loss for trial in whole}
    assert all(trial.loss == losses[trial.learning_rate] for trial in trials if trial.steps == 40)


def test_ctrl_c_before_any_rate_leaves_the_last_sweep_alone(small, monkeypatch, tmp_path, capsys):
    main([*small, "--sweep"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    take_step = Run.take_step

    def interrupted(self, **options):
        signal.raise_signal(signal.SIGINT)
        take_step(self, **options)

    monkeypatch.setattr(Run, "take_step", interrupted)
    assert main([*small, "--sweep"]) == 130
    assert "nothing to report" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bars_are_whole_at_60_columns():
    console = Console(force_terminal=True, width=60, record=True, file=io.StringIO())
    with training_display(console, ["momentum"], 3000) as on_step:
        on_step(Entry("momentum", optax.identity(), None, [run_of(4.188e-07, 1234)]))
    drawn = console.export_text()
    assert "1234/3000" in drawn
    assert "…" not in drawn


def test_a_second_ctrl_c_interrupts_at_once():
    with stop_on_ctrl_c() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_thread_leaves_ctrl_c_alone():
    found = []

    def race():
        with stop_on_ctrl_c() as stop:
            found.append((stop.is_set(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=race)
    thread.start()
    thread.join()
    assert found == [(False, signal.getsignal(signal.SIGINT))]


def test_bars_show_every_optimizer():
    console = Console(force_terminal=True, width=100, record=True, file=io.StringIO())
    task = quadratic.task(10.0)
    rates = {"sgd": LearningRates(1.0), "adam": LearningRates(0.01)}
    entries = [Entry(name, make_optimizer(name, task, rate, 20), rate) for name, rate in rates.items()]
    with training_display(console, list(rates), 20) as on_step:
        train_all(task, entries, 20, 1, on_step, threading.Event())
    drawn = console.export_text()
    for word in ("sgd", "adam", "20/20", "loss", "left"):
        assert word in drawn


def test_the_text_is_what_its_provenance_says():
    data = importlib.resources.files("optimorph._racing").joinpath("data")
    content = data.joinpath("shakespeare.txt").read_bytes()
    assert hashlib.sha256(content).hexdigest() in data.joinpath("PROVENANCE.md").read_text()
    assert len(content) > 1_000_000
    assert b"Gutenberg" not in content
    content.decode("ascii")


def test_validation_text_is_neither_trained_nor_tuned_on():
    parts, size = text.load_characters()
    whole = sum(len(part) for part in parts.values())
    assert whole == len(
        importlib.resources.files("optimorph._racing").joinpath("data/shakespeare.txt").read_bytes()
    )
    assert len(parts["train"]) > 0.85 * whole
    train = parts["train"].astype(np.uint8).tobytes()
    for part in ("tuning", "validation"):
        for x, y in text.task().held_out(part):
            np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
            assert sum(row.astype(np.uint8).tobytes() in train for row in x) < 0.02 * len(x)
            assert x.max() < size


def test_text_batches_repeat_by_seed():
    a, b, c = (next(text.task().batches(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a[0], b[0])
    assert np.any(a[0] != c[0])


def train(run, steps):
    for _ in range(steps):
        run.take_step()
    run.evaluate()


def test_digits_learns():
    task = digits.task()
    run = Run(CompiledTask(task), make_optimizer("muon", task, tuned_learning_rates(task)["muon"], 60), 0)
    train(run, 60)
    assert run.losses[0] == pytest.approx(math.log(10), rel=0.3)
    assert run.losses[-1] < 0.5


def test_flights_come_from_a_package_that_is_not_imported(tmp_path, monkeypatch, capsys):
    """Of a package of the same shape, in which the hour of a flight is its day."""
    monkeypatch.setattr(flights, "PACKAGE", "stand_in")
    with pytest.raises(SystemExit):
        main(["race", "--task", "flights", "--out", str(tmp_path)])
    assert capsys.readouterr().err.endswith("needs a package that has its data; type pip install stand_in.\n")
    (tmp_path / "stand_in" / "data").mkdir(parents=True)
    (tmp_path / "stand_in" / "__init__.py").write_text("raise AssertionError")
    lines = ["day,month,carrier,origin,dest,sched_dep_time,sched_arr_time"]
    lines += [f"{day},7,UA,JFK,{'ABC'[day % 3]},{day}55,2400" for day in range(1, 24)] * flights.EVERY
    with zipfile.ZipFile(tmp_path / "stand_in" / "data" / "flights.csv.zip", "w") as archive:
        archive.writestr("flights.csv", "\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    task = flights.task()
    ((tuning, _),), ((validation, goals),) = (task.held_out(part) for part in ("tuning", "validation"))
    trained, _ = next(task.batches(0))
    flights.load_flights.cache_clear()
    assert {*tuning[:, 3]} == {5, 15}
    assert {*validation[:, 3]} == {10, 20}
    assert not {5, 10, 15, 20} & {*trained[:, 3]}
    assert {*map(tuple, np.delete(trained, 3, 1))} == {(0, 0, 0, 11, 0, 0)}
    start = task.loss(task.init(0), (jnp.asarray(validation), jnp.asarray(goals)))
    assert start == pytest.approx(math.log(flights.DESTINATIONS), rel=0.1)


@pytest.mark.slow
def test_text_starts_at_the_entropy_of_letters_and_learns():
    task = text.task()
    run = Run(CompiledTask(task), make_optimizer("adamw", task, LearningRates(1e-3, 1e-2), 10), 0)
    train(run, 10)
    assert run.losses[0] == pytest.approx(math.log(72), rel=0.15)
    assert run.losses[-1] < 0.9 * run.losses[0]


@pytest.mark.slow
def test_text_is_causal():
    """Scores at a place do not depend on later letters."""
    from flax import nnx

    model = text.GPT(72, nnx.Rngs(0))
    tokens = jnp.asarray(next(text.task().batches(0))[0][:1])
    changed = tokens.at[0, 40:].set(0)
    longest_sum = 4 * text.WIDTH
    rounding.close(model(tokens)[0, :40], model(changed)[0, :40], condition=longest_sum)


def test_adamw_and_muon_route_alike():
    """The same leaves are matrices to both, so that their learning rates mean the same leaves."""
    task = text.task()
    params = task.init(0)
    states = [
        make_optimizer(name, task, LearningRates(0.01, 0.01), 10).init(params).inner_states
        for name in ("adamw", "muon")
    ]
    sizes = [{leaf.size for leaf in jax.tree.leaves(state["matrix"]) if leaf.ndim} for state in states]
    assert sizes[0] == sizes[1] == {128 * 128, 128 * 512}
