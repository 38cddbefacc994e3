"""The notebooks run from the first cell to the last, headless; committed files are clean and illustrated."""

import ast
import base64
import io
import re
import sys
from pathlib import Path

import matplotlib.image
import nbformat
import pytest
from nbclient import NotebookClient

import optimorph

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
LATE = {optimorph: {"race"}}  # exported, but imported when it is asked for
PUBLIC = {"flax", "jax", "matplotlib", "numpy", "optax", "optimorph", "sklearn"} | sys.stdlib_module_names

DRAWING = {"optimorph._racing.palette.OPTIMIZERS", "optimorph._racing.ticks.PlainLog"}  # how, not what
SPOKEN = {
    "AdaGrad": "adagrad",
    "Adam": "adam",
    "AdamW": "adamw",
    "Muon": "muon",
    "Nesterov": "nesterov",
    "RMSprop": "rmsprop",
}
"""What pictures say for the name of a style."""

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def figures(notebook):
    """How many pictures each cell shows."""
    return [
        sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        for cell in notebook.cells
    ]


def code(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def is_public(name):
    """Whether a dotted name is of a package that may be used, private nowhere and, if ours, exported."""
    if name in DRAWING:
        return True
    package, *inner = name.split(".")
    if package not in PUBLIC or any(part.startswith("_") for part in inner):
        return False
    here = optimorph
    for part in inner if package == "optimorph" else []:
        if part not in {*getattr(here, "__all__", ()), *LATE.get(here, ())}:
            return False
        here = getattr(here, part)
    return True


def names_used(source):
    """Every name that is imported, and every attribute of an imported package, dotted."""
    imported = {}
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                imported |= {one.asname or one.name: one.name for one in names}
                yield from (one.name for one in names)
            case ast.ImportFrom(module=module, names=names):
                yield from (f"{module}.{one.name}" for one in names)
            case ast.Attribute():
                package, *inner = ast.unparse(node).split(".")
                if package in imported and all(part.isidentifier() for part in inner):
                    yield ".".join((imported[package], *inner))


@pytest.mark.examples("02_*")
@every_notebook
@pytest.mark.filterwarnings("ignore")  # of the kernel's machinery, not of the notebook
def test_notebook(path):
    committed = nbformat.read(path, 4)
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert figures(notebook) == figures(committed)
    assert not any(
        output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", [])
    )


@every_notebook
def test_the_committed_file_is_clean(path):
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not any(cell.metadata for cell in notebook.cells), "no timings, tags or folds"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run once, in order"
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}, (
        "no error, no stray value"
    )
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream"), "no warning"


@every_notebook
def test_the_figures_are_in_the_file(path):
    notebook = nbformat.read(path, 4)
    assert sum(figures(notebook)) >= 1
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(output.data["image/png"])))
            assert picture[..., :3].std() > 0.05, "the picture is blank"


@every_notebook
def test_pictures_have_the_colours_and_the_labels_of_all_others(path):
    """An optimizer's colour comes from the palette, and a logarithmic axis has plain labels."""
    source = code(nbformat.read(path, 4))
    assert not re.findall(r"scale\(?=?[\"']log[\"']|loglog|semilog", source)
    for variables, names in re.findall(r"(.*) = \(OPTIMIZERS\[name\]\.color for name in \((.*)\)\)", source):
        assert variables.split(", ") == [name.upper() for name in re.findall(r"\w+", names)]
    for label, color in re.findall(r"[\"'](\w+)[\"'], color=(\w+)", source):
        assert label not in SPOKEN or color == SPOKEN[label].upper()


@every_notebook
def test_only_the_public_api_is_used(path):
    used = names_used(code(nbformat.read(path, 4)))
    assert [name for name in used if not is_public(name)] == []


@every_notebook
def test_the_claim_is_stated_asserted_and_limited(path):
    notebook = nbformat.read(path, 4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "**Claim" in notebook.cells[0].source
    assert "$$" in prose
    assert "## Where it does not hold" in prose
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(code(notebook))))


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "from scipy.linalg import polar",
        "import optimorph._core",
        "from optimorph._transforms.averages import ema",
        "from optimorph import recipe",
        "from optimorph.theory import _condition",
        "import optimorph as om\nom._core.rule",
        "import jax\njax._src",
    ],
)
def test_what_is_not_public_is_seen(source):
    assert not all(map(is_public, names_used(source)))


def test_they_are_numbered():
    numbers = [re.fullmatch(r"(\d\d)(_[a-z]+)+", path.stem)[1] for path in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers) > 0
