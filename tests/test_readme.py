"""README and documentation: their code runs, and their numbers are those of the recorded results."""

import dataclasses
import math
import re
import statistics
from pathlib import Path
from types import ModuleType

import catalog
import jax
import pytest
import tables
from _reference import on_page_markdown
from test_trees import TREES

import optimorph as om
from optimorph._racing.comparisons import losses_at_equal_seconds, steps_to_target
from optimorph._racing.race_data import RaceData

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))
}
ALL = "\n".join(PAGES.values())
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.S)


def test_every_optimizer_has_a_row():
    rows = re.findall(r"^\| (`.*?`) \|", PAGES["docs/optimizers.md"], re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert named >= set(catalog.recipes_with())


@pytest.mark.examples("README.md", "docs/[io]*.md", "docs/guides/[cr]*ing.md")
@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if BLOCK.search(text)])
def test_code_runs(page, tmp_path, monkeypatch, capsys):
    """The blocks of a page, from the first to the last; each prints what the page shows below it."""
    monkeypatch.chdir(tmp_path)  # where they write
    names = {}
    with jax.numpy_dtype_promotion("standard"):  # as users have it
        for number, (code, shown) in enumerate(BLOCK.findall(PAGES[page])):
            exec(compile(code, f"{page}, block {number}", "exec"), names)
            printed = capsys.readouterr().out
            assert not shown or printed == shown


def test_the_two_commands():
    commands = re.findall(r"```sh\n(.*?)```", README, re.S)
    assert commands == [
        "pip install -e '.[race]' && optimorph race\n",
        "pip install -e '.[test]' && pytest\n",
    ]


def test_the_reference_has_every_public_name_once():
    modules = [name for name in om.__all__ if isinstance(getattr(om, name), ModuleType)]
    names = [f"optimorph.{name}" for name in {*om.__all__, "race"} - {*modules}]
    for module in modules:
        names += [f"optimorph.{module}.{name}" for name in getattr(om, module).__all__]
    assert sorted(re.findall(r"^::: (\S+)$", on_page_markdown(ALL), re.M)) == sorted(names)


def test_the_citation_has_the_version():
    assert f"\nversion: {om.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_menu_has_every_page():
    menu = (ROOT / "mkdocs.yml").read_text()
    pages = [page.removeprefix("docs/") for page in PAGES if page != "README.md"]
    notebooks = [f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert [page for page in pages + notebooks if page not in menu] == []


def test_the_readme_is_short():
    assert README.count("\n") <= 220


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_recorded_results(page):
    assert tables.filled(PAGES[page]) == PAGES[page], "run python benchmarks/tables.py"


def sentences():
    """What pages say about recorded results outside of tables: page → words."""
    race, digits, state = (tables.recorded(name) for name in ("race", "digits/race", "state"))
    assert race["finished"]
    assert race["seeds"] == digits["seeds"] == 3
    rows = {row["name"]: row for row in race["rows"]}
    lead = (rows["adamw"]["loss"] - rows["muon"]["loss"]) / rows["muon"]["spread"]
    assert 8 < lead < 9
    yield "README.md", "by eight times the spread of its seeds"
    yield "docs/guides/choosing.md", "by eight times the spread of its seeds"
    apart = {row["name"]: row for row in digits["rows"]}
    muon, adamw = apart["muon"], apart["adamw"]
    assert abs(muon["loss"] - adamw["loss"]) < muon["spread"], "level with Muon"
    level = " and ".join(f"{x['loss']:.4f} ± {x['spread']:.4f}" for x in (adamw, muon))
    yield "docs/guides/choosing.md", f"level with Muon: {level}"
    found = RaceData.read(tables.RESULTS / "race.json")
    lead = rows["adamw"]["loss"] - rows["muon"]["loss"]
    seconds = losses_at_equal_seconds(found)
    steps = f"after {steps_to_target(found)['muon']} of {race['steps']} steps, and ends {lead:.3f} lower"
    yield "docs/guides/choosing.md", steps
    most = rows["adamw"]["loss"] - rows["muonh"]["loss"]
    yield "docs/guides/choosing.md", f"`om.muonh` ends {most:.3f} lower"
    left = f"{seconds['adamw'] - seconds['muon']:.3f}"
    yield "docs/guides/choosing.md", f"{left} of that lead is left at equal seconds"
    yield "docs/benchmarks.md", f"At equal seconds {left} of its lead of {lead:.3f} is left."
    found = RaceData.read(tables.RESULTS / "flights" / "race.json")
    rows, seconds = {row.name: row.loss for row in found.rows}, losses_at_equal_seconds(found)
    steps = f"after {steps_to_target(found)['muon']} of {found.rows[0].steps} steps. But its update"
    yield "docs/guides/choosing.md", steps
    first = f"`rmsprop` leads with {min(seconds.values()):.3f}"
    assert seconds["rmsprop"] == min(seconds.values())
    yield (
        "docs/guides/choosing.md",
        f"{first}, AdamW has {seconds['adamw']:.3f} and Muon {seconds['muon']:.3f}",
    )
    both = [row for row in found.rows if row.name in ("adamw", "muon")]
    then = losses_at_equal_seconds(dataclasses.replace(found, rows=both))
    words = (
        f"ends {rows['adamw'] - rows['muon']:.3f} below AdamW after equal steps. When AdamW has ended, Muon"
    )
    yield "docs/guides/choosing.md", f"{words} is level with it: {then['muon']:.3f} and {then['adamw']:.3f}"
    wide, small = (state["races"]["text"]["muon"][kind] for kind in ("float32", "8 bits"))
    saved = f"at {small['loss']:.4f} instead of {wide['loss']:.4f}, with {small['bytes']:.2f} instead of"
    yield "docs/guides/choosing.md", f"{saved} {wide['bytes']:.2f} bytes"

    moves = {}
    for name, each in tables.recorded("transfer")["best"].items():
        first, *_, last = sorted(each, key=int) * 2
        moves[name] = abs(each[last]["on_grid"] - each[first]["on_grid"]), first, last
    adamw, muon, other, muonh = (
        moves[name] for name in ("adamw", "muon, rms_to_rms", "muon, adamw_rms", "muonh")
    )
    words = (
        f"of AdamW moves by {adamw[0]} factors of two from width {adamw[1]} to {adamw[2]}, that of Muon by"
    )
    scale = f'(by {other[0]} with `scale="adamw_rms"`)'
    words = f"{words} {muon[0]} from {muon[1]} to {muon[2]} {scale}, and that of MuonH by {muonh[0]}"
    yield "docs/guides/choosing.md", words

    fell = {
        name: 2 ** (each[narrow]["exponent"] - each[wide]["exponent"])
        for name, narrow, wide in (("muon, rms_to_rms", "32", "512"), ("adamw", "32", "256"))
        for each in [tables.recorded("transfer")["best"][name]]
    }
    words = f"rate fell {fell['muon, rms_to_rms']:.1f}-fold from width 32 to 512, where"
    yield "README.md", f"{words} `adamw`'s fell {fell['adamw']:.0f}-fold to 256"

    found = tables.tuned_race(250)
    rows, seconds = {row.name: row.loss for row in found.rows}, losses_at_equal_seconds(found)
    best, muon, adamw = (f"{rows[name]:.3f}" for name in ("soap_muon", "muon", "adamw"))
    yield "README.md", f"`soap_muon` ends at {best}, `muon` at {muon}, `adamw` at {adamw}"
    yield "docs/guides/choosing.md", f"after 250 steps on text: {best}, Muon {muon}, AdamW {adamw}"
    below = [rows[name] - rows["soap_muon"] for name in ("muon", "adamw", "muon2")]
    words = f"ends {below[0]:.3f} below Muon and {below[1]:.3f} below AdamW on text. At equal seconds it"
    yield "docs/guides/choosing.md", f"{words} is {seconds['soap_muon'] - seconds['muon']:.3f} behind Muon"
    yield "docs/benchmarks.md", f"the lowest loss after equal steps, {below[2]:.3f} below `muon2`"
    yield "docs/benchmarks.md", f"`muon2` leads with {min(seconds.values()):.3f}"
    leads = [
        f"{rows['adamw'].loss - rows['muon'].loss:.2f} after {steps:,}"
        for steps in (250, 1000, 4000)
        for rows in [{row.name: row for row in tables.tuned_race(steps).rows}]
    ]
    yield "docs/benchmarks.md", f"{leads[0]} steps, {leads[1]} and {leads[2]}"

    lead = {case: statistics.fmean(x["losses"]) for case, x in tables.recorded("lead")["best"].items()}
    decayed = [lead[f"{steps} steps, decay 0"] - lead[f"{steps} steps, decay 0.4"] for steps in (128, 512)]
    lowered = f"lowers Muon's loss by {decayed[0]:.3f} after 128 steps and by {decayed[1]:.3f} after 512"
    yield "docs/benchmarks.md", lowered
    yield "docs/benchmarks.md", f"then has a loss of {lead['128 steps, decay 0.4']:.3f}."
    held = tables.recorded("transfer")["best"]["muonh"]["32"]["loss"]
    yield "docs/benchmarks.md", f"has {held:.3f} in the study of widths"
    lower, own = (lead[f"{name}, then adamw"] - lead[f"{name}, then muon"] for name in ("adamw", "muon"))
    yield "docs/benchmarks.md", f"AdamW with a lead of {lower:.3f}, its own with {own:.3f}"
    yield "docs/guides/choosing.md", f"ends {lower:.3f} lower](../benchmarks.md#batch"

    fsdp = tables.recorded("sharding")["rows"]["FSDP, largest axis"]
    ours, theirs = (
        (sum(row["collectives"].values()), f"{row['sent'] / 1e6:.0f} MB")
        for row in (fsdp["optimorph"], fsdp["optax"])
    )
    yield "README.md", f"{ours[0]} collectives and sends {ours[1]}"
    yield "README.md", f"needs {theirs[0]} and sends {theirs[1]}"
    ms = {
        row["name"]: row["milliseconds"]
        for row in tables.recorded("accelerator")["rows"]
        if not row["stacked"]
    }
    yield "README.md", f"takes {ms['muon']:.2f} ms; optax's takes {ms['optax.contrib.muon']:.2f} ms"
    wide, small = (state["races"]["text"]["adamw"][kind] for kind in ("float32", "8 bits"))
    yield "README.md", f"keeps {small['bytes']:.2f} bytes for each parameter instead of {wide['bytes']:.2f}"
    losses = (f"{x['loss']:.4f} ± {x['spread']:.4f}" for x in (small, wide))
    yield "README.md", " instead of ".join(losses)

    worst = 0.0
    for races in (state["races"][task] for task in ("text", "digits")):
        for name in ("adamw", "muon"):
            a, b = (races[name][kind]["losses"] for kind in ("float32", "8 bits"))
            error = math.sqrt((statistics.variance(a) + statistics.variance(b)) / len(a))
            worst = max(worst, abs(statistics.mean(a) - statistics.mean(b)) / error)
    yield "docs/benchmarks.md", f"at most {worst:.1f} times their standard error over three seeds"
    leaves = f"{sum(map(len, TREES.values()))} leaves of {len(TREES)} public models"
    for page in ("README.md", "docs/guides/routing.md"):
        yield page, leaves

    trip = sum(ns for name, ns in state["costs"]["steps"].items() if name.startswith(("decode", "encode")))
    yield "docs/benchmarks.md", f"takes {trip:.1f} ns on one core"
    for name, label in {"om.adamw": "AdamW", "om.muon": "Muon"}.items():
        wide, small = state["steps"][name], state["steps"][f"{name}, state='int8'"]
        yield "docs/benchmarks.md", f"{small:.1f} s instead of {wide:.1f} s with {label}"
    plans = tables.recorded("sharding")["planned"]
    worst = {name: f"{plan['worst_over_mean']:.2f}" for name, plan in plans.items()}
    llama = [worst[f"Llama-3-405B, 4096 devices{way}"] for way in ("", ", divided")]
    yield (
        "docs/benchmarks.md",
        f"{llama[0]} times an even share with whole matrices, and {llama[1]} times with",
    )
    large = tables.recorded("accelerators")["large"]["divided"]["expected"]
    yield "docs/benchmarks.md", f"An even share is {large['least_gflop']:,.0f} Gflop."


def test_sentences_are_those_of_the_recorded_results():
    wrong = [(page, words) for page, words in sentences() if words not in " ".join(PAGES[page].split())]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES)
def test_pictures_and_files_exist(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        assert "://" in target or ((ROOT / page).parent / target).exists(), target
