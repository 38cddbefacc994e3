"""The floors stand: imports point down; every public name is documented, catalogued and has one path."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import catalog
import optax
import pytest
from test_equals import equals_lines

import optimorph as om

PACKAGE = Path(om.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in MODULES]
FLOORS = {
    "_core": 0,
    "_apply_updates": 1,
    "_split_weights": 1,
    "rules": 1,
    "codecs": 1,
    "linalg": 1,
    "_distributed": 2,
    "_routing": 2,
    "_transforms": 3,
    "layouts": 3,
    "curvature": 3,
    "schedules": 3,
    "theory": 3,
    "_storage": 4,
    "_recipes": 5,
    "_carry": 5,
    "_inject_hyperparams": 5,
    "_register_for_export": 5,
    "_plan": 6,
    "probes": 6,
    "__init__": 7,
    "_plan_command": 8,
    "_racing": 8,
    "__main__": 9,
}
PACKAGES = {name.split(".")[0] for name in NAMES if "." in name}
AT_RUN_TIME = {"jax", "optax", "jaxtyping", "numpy", "optimorph"}
WITH_RACE = AT_RUN_TIME | {"flax", "rich", "matplotlib", "sklearn"}
PUBLIC = {
    module: vars(module)["__all__"]
    for module in (om, om.codecs, om.layouts, om.linalg, om.rules, om.schedules, om.theory, om.curvature)
}
OBJECTS = [
    pytest.param(getattr(module, name), id=f"{module.__name__}.{name}")
    for module, names in PUBLIC.items()
    for name in names
    if not inspect.ismodule(getattr(module, name))
]


def imported(path):
    """The modules that a file imports, as dotted names; `from optimorph import x` counts as `optimorph.x`.

    What is imported for types alone is not imported.
    """
    tree = ast.parse(path.read_text())
    tree.body = [
        n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "optimorph":
                public = (alias.name for alias in node.names)
                yield from ("optimorph" if name.startswith("__") else f"optimorph.{name}" for name in public)
            else:
                yield node.module


def floor(dotted):
    return FLOORS[dotted.split(".")[1] if "." in dotted else "__init__"]


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_say_their_floor(package):
    doc = ast.get_docstring(ast.parse((PACKAGE / package / "__init__.py").read_text()))
    assert f"Floor {FLOORS[package]}" in doc


@pytest.mark.parametrize(("path", "name"), list(zip(MODULES, NAMES, strict=True)), ids=NAMES)
def test_imports_point_down(path, name):
    own = FLOORS[name.split(".")[0]]
    inside = [module for module in imported(path) if module.split(".")[0] == "optimorph"]
    assert all(floor(module) <= own for module in inside)
    allowed = WITH_RACE if own >= FLOORS["_racing"] else AT_RUN_TIME
    outside = {module.split(".")[0] for module in imported(path)} - set(__import__("sys").stdlib_module_names)
    assert outside <= allowed


@pytest.mark.parametrize("package", ["codecs", "linalg"])
def test_modules_are_private(package):
    modules = {name.split(".")[1] for name in NAMES if name.startswith(f"{package}.")} - {"__init__"}
    assert all(module.startswith("_") for module in modules)


def test_no_cycles():
    graph = {}
    for path, name in zip(MODULES, NAMES, strict=True):
        own = "optimorph." + name.removesuffix(".__init__") if name != "__init__" else "optimorph"
        graph[own] = {m for m in imported(path) if m.split(".")[0] == "optimorph"} - {own}
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, f"imports go round: {open_}"
        if module in done or module not in graph:
            return
        open_.append(module)
        for other in graph[module]:
            visit(other)
        open_.pop()
        done.add(module)

    for module in graph:
        visit(module)


@pytest.mark.parametrize(("path", "name"), list(zip(MODULES, NAMES, strict=True)), ids=NAMES)
def test_the_host_decides_nothing(path, name):
    """A program is that of what it is compiled for; only displays ask what is here."""
    if floor(f"optimorph.{name}") < FLOORS["_racing"]:
        text = path.read_text()
        assert not [word for word in ("default_backend", "device_count", "jax.devices") if word in text]


def test_modules_are_small():
    sizes = {name: len(path.read_text().splitlines()) for path, name in zip(MODULES, NAMES, strict=True)}
    assert {name: size for name, size in sizes.items() if size > 400} == {}


@pytest.mark.parametrize("thing", OBJECTS)
def test_documented(thing):
    doc = inspect.getdoc(thing)
    assert doc
    assert doc.split("\n")[0].endswith((".", ":"))


TRANSFORMS = [
    name
    for name in om.__all__
    if inspect.isfunction(make := getattr(om, name))
    and inspect.isclass(kind := inspect.signature(make).return_annotation)
    and issubclass(kind, optax.GradientTransformation)
]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_in_the_catalog_with_sources(name):
    assert name in catalog.NAMES, f"add a line for {name} to tests/catalog.py"
    doc = inspect.getdoc(getattr(om, name))
    assert "References:" in doc or name in (
        "divide",
        "add",
        "mix",
        "in_float32",
        "partition",
        "chain",
        "route_matrices",
    ), f"add References: to the docstring of {name}"  # combinators are no algorithms


@pytest.mark.parametrize("name", [entry.name for entry in catalog.RECIPES])
def test_recipes_say_what_they_equal(name):
    """A program, which `test_equals` compares, or a part of the paper, which the catalog transcribes."""
    references = inspect.getdoc(getattr(om, name)).split("References:")[-1]
    of_a_paper = re.search(r"(algorithm|equation)s? [(\d]", references)
    assert equals_lines(getattr(om, name)) or of_a_paper, f"add Equals: to the docstring of {name}"


def test_catalog_ids_are_readable_and_unique():
    assert len(set(catalog.IDS)) == len(catalog.IDS)
    assert all(hasattr(om, entry.name) for entry in catalog.ENTRIES)
    assert {*catalog.LIKE, *catalog.LIKE.values()} <= {*catalog.IDS}


def test_private_modules():
    """Users import the package, its public modules, and nothing else."""
    public = {name.split(".")[0] for name in NAMES if not name.startswith("_")}
    assert public == {"codecs", "curvature", "layouts", "linalg", "probes", "rules", "schedules", "theory"}
    assert set(dir(om)) - {"race"} == set(om.__all__)
    for name in public:
        module = importlib.import_module(f"optimorph.{name}")
        assert {each for each in dir(module) if not each.startswith("_")} == {*module.__all__}, name


def test_one_path_for_every_object():
    seen = {}
    for module, names in PUBLIC.items():
        assert sorted(names) == sorted(set(names))
        for name in names:
            thing = getattr(module, name)
            assert id(thing) not in seen, f"{module.__name__}.{name} is also {seen[id(thing)]}"
            seen[id(thing)] = f"{module.__name__}.{name}"


def test_nothing_public_is_left_out():
    """Every public function and class of the transforms' and recipes' files is exported."""
    for path, name in zip(MODULES, NAMES, strict=True):
        if name.split(".")[0] != "_transforms" or name.endswith("__init__"):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert node.name in (*om.__all__, "decay_and_step")


@pytest.mark.parametrize("entry", catalog.RECIPES, ids=[entry.id for entry in catalog.RECIPES])
def test_states_hold_arrays_only(entry):
    """No configuration in state: every leaf is an array, and no two calls differ in structure by a number."""
    import jax
    import jax.numpy as jnp

    state = entry.build().init({"w": jnp.ones((2, 3))})
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
