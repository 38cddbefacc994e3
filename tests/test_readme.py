"""README and documentation: their code runs, and their numbers are those of the recorded results."""

import json
import re
from pathlib import Path
from types import ModuleType

import jax
import pytest

import optimorph as om

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))
}
ALL = "\n".join(PAGES.values())
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = {*re.findall(r"\d[\d.,]*(?<![.,])(?= )", ALL), *re.findall(r"\d[\d.]* (?:ns|s|%)", ALL)}
"""Every number of the pages, alone and with its unit, whatever the words around it."""
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.S)


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
    assert sorted(re.findall(r"^::: (\S+)$", ALL, re.M)) == sorted(names)


def test_the_citation_has_the_version():
    assert f"\nversion: {om.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_menu_has_every_page():
    menu = (ROOT / "mkdocs.yml").read_text()
    pages = [page.removeprefix("docs/") for page in PAGES if page != "README.md"]
    notebooks = [f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert [page for page in pages + notebooks if page not in menu] == []


def test_the_readme_is_short():
    assert README.count("\n") <= 220


def test_the_race_table_is_the_recorded_one():
    recorded = json.loads((RESULTS / "race.json").read_text())
    assert recorded["finished"]
    assert recorded["seeds"] >= 3
    for row in recorded["rows"]:
        others = "" if row["others_learning_rate"] is None else f" / {row['others_learning_rate']:.3g}"
        line = (
            f"| {row['name']} | {row['loss']:.3f} ± {row['spread']:.3f} | {row['steps_per_second']:.1f} "
            f"| {row['optimizer_ms']:.1f} | {row['state_bytes_per_parameter']:.2f} "
            f"| {row['learning_rate']:.3g}{others} |"
        )
        assert line in ALL
    assert recorded["date"] in ALL
    assert f"jax {recorded['versions']['jax']}" in ALL


def test_the_choice_is_that_of_the_recorded_races():
    text, digits = (
        {row["name"]: row for row in json.loads((RESULTS / name / "race.json").read_text())["rows"]}
        for name in ("", "digits")
    )
    for name, row in text.items():
        other = digits[name]
        assert (
            f"| {name} | {row['loss']:.3f} ± {row['spread']:.3f} "
            f"| {other['loss']:.4f} ± {other['spread']:.4f} |" in ALL
        )


def test_the_cost_table_is_the_recorded_one():
    recorded = json.loads((RESULTS / "optimizers.json").read_text())
    for name, row in recorded["rows"].items():
        ms, seconds, state = row["ms"], row["compile_seconds"], row["state_bytes_per_parameter"]
        line = (
            f"| {name} | {ms[0]:.2f} / {ms[1]:.2f} | {ms[1] / ms[0]:.2f} "
            f"| {seconds[0]:.2f} / {seconds[1]:.2f} | {state[0]:.2f} / {state[1]:.2f} |"
        )
        assert line in ALL


def test_the_accelerator_table_is_the_recorded_one():
    recorded = json.loads((RESULTS / "accelerator.json").read_text())
    for row in recorded["rows"]:
        name = row["name"] + (", stacked layers" if row["stacked"] else "")
        cells = [f"{row['milliseconds']:.2f}"]
        for key, digits in (("compile_seconds", 1), ("state_bytes", 2), ("temporary_bytes", 2)):
            cells.append(f"{row[key]:.{digits}f}" if key in row else "-")
        assert f"| {name} | {' | '.join(cells)} |" in ALL
    assert recorded["device"] in ALL


def test_the_tables_of_what_is_compiled_are_the_recorded_ones():
    recorded = json.loads((RESULTS / "accelerators.json").read_text())

    def work(row):
        return f"{sum(row['mcycles'].values()):.2f}" if row["mcycles"] else str(row["kernels"])

    def cells(rows, cell):
        return " / ".join(cell(rows[way]) if way in rows else "-" for way in ("found", "given", "optax"))

    for mesh in ("v5p 2x2x2", "v5p 4x4x4", "H100 x 8"):
        for layout, rows in recorded["mesh"][mesh].items():
            columns = (
                cells(rows, lambda row: str(sum(row["collectives"].values()))),
                cells(rows, lambda row: f"{row['gflop']:.0f}"),
                cells(rows, lambda row: f"{row['temporary'] / 1e6:.0f}"),
                cells(rows, work),
            )
            assert f"| {mesh} | {layout} | {' | '.join(columns)} |" in ALL
    for name in recorded["chip"]["v5p"]:
        sides = (recorded["chip"][chip][name] for chip in ("v5p", "H100"))
        columns = (
            f"{work(row)}, {row['temporary'] / 1e6:.0f}, {row['compile_seconds']:.1f}" for row in sides
        )
        assert f"| {name} | {' | '.join(columns)} |" in ALL


def test_the_polar_table_is_the_recorded_one():
    recorded = json.loads((RESULTS / "polar.json").read_text())
    for name, row in recorded["rows"].items():
        ours, theirs = row["ms"]["optimorph"], row["ms"]["optax"]
        share = 2e-4 * row["multiplications"] / ours / recorded["peak_gigaflops"]
        line = (
            f"| {name} | {ours:.1f} / {theirs:.1f} | {theirs / ours:.2f} | {share:.0f}% "
            f"| {row['temporary_bytes_per_byte']:.1f}x |"
        )
        assert line in ALL


def test_the_cost_of_probes_is_the_recorded_one():
    rows = json.loads((RESULTS / "probes.json").read_text())["rows"]
    for row, digits in zip(rows.values(), (1, 0, 0), strict=True):
        assert {f"{row['look']:.{digits}f}", f"{100 * row['share']:.1f} %"} <= FIGURES


def test_the_sweep_is_the_recorded_one():
    recorded = json.loads((RESULTS / "vmap.json").read_text())
    rows = recorded["recipes"]["adamw"]["rows"]
    assert {str(len(recorded["rates"])), str(recorded["steps"])} <= FIGURES
    for row in rows.values():
        assert f"{row['seconds']:.1f} s" in FIGURES
        assert row["ratio"] == 1 or f"{row['ratio']:.2f}" in FIGURES


def test_what_is_said_of_small_state_is_recorded():
    recorded = json.loads((RESULTS / "state.json").read_text())
    for case, rows in recorded["costs"]["updates"].items():
        for way, row in rows.items() if "where" not in case else ():
            assert (
                f"| {case}: {way} | {row['state']:.2f} | {row['temporaries']:.2f} | {row['ratio']:.2f} "
                f"| {row['compile_seconds']:.2f} |" in ALL
            )
    steps, seconds = recorded["costs"]["steps"], recorded["steps"]
    trip = sum(ns for name, ns in steps.items() if name.startswith(("decode", "encode")))
    assert f"{trip:.1f} ns" in FIGURES
    for name in ("om.adamw", "om.muon"):
        wide, small = seconds[name], seconds[f"{name}, state='int8'"]
        assert {f"{small:.1f} s", f"{wide:.1f} s"} <= FIGURES
    for task, names in recorded["races"].items():
        for name, row in names.items():
            wide, small = row["float32"], row["8 bits"]
            assert (
                f"| {task}: {name} | {wide['loss']:.4f} ± {wide['spread']:.4f} "
                f"| {small['loss']:.4f} ± {small['spread']:.4f} "
                f"| {wide['bytes']:.2f} / {small['bytes']:.2f} |" in ALL
            )
    for name, row in recorded["peers"].items():
        largest = " | ".join(f"{x:.3g}" for x in row["largest"].values())
        assert f"| {name} | {row['bytes']:.2f} | {row['v']:.3g} | {largest} |" in ALL
    assert f"jax {recorded['about']['costs']['versions']['jax']}" in ALL


@pytest.mark.parametrize("page", PAGES)
def test_pictures_and_files_exist(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        assert "://" in target or ((ROOT / page).parent / target).exists(), target
