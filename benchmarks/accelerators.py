"""Updates compiled for TPUs and GPUs that are not there: what each device would do.

    pip install -e '.[accelerators]'
    python benchmarks/accelerators.py [mesh] [recipes] [chip] [large]

Nothing is run. The compilers of v5e, v5p, v6e and H100 say what one device sends, computes and holds; on TPUs
also how many cycles each operation takes, without communication.

mesh: one update of Muon for the 84 matrices of a transformer (12 layers of width 768) in four layouts: by
sharding hints or `custom_partitioning` ("found"), by the exchange (`shardings=`, "given", or Explicit axes,
"explicit"), and optax's, also with layers stacked and read as MaxText does ("MaxText").
recipes: one update of the same matrices in FSDP, with `shardings=`, of Muon, AdamW and their relatives.
chip: one update of GPT-2 small on one device: AdamW, moments in bfloat16 and in 8 bits, Muon, beside optax's.
large: one update of Muon for Llama-3-8B on 64 v5p, with matrices whole and divided over devices, beside what
is expected from published numbers.

A target whose compiler is not installed is left out. Written to `benchmarks/results/accelerators.json`, part
by part, with a picture, `accelerators.png`.
"""

import targets  # isort: skip  # before jax is imported

import argparse
import datetime
import importlib.metadata
import inspect
import json
import time
from pathlib import Path

import accelerator
import jax
import jax.numpy as jnp
import optax.contrib
import sharding
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich import box
from rich.console import Console
from rich.table import Table

import optimorph as om

RESULTS = Path(__file__).parent / "results" / "accelerators.json"
MESHES = {
    "v5e 2x4": ("v5e:2x4", (4, 2)),
    "v5p 2x2x2": ("v5p:2x2x2", (4, 2)),
    "v6e 4x4": ("v6e:4x4", (8, 2)),
    "v5p 4x4x4": ("v5p:4x4x4", (8, 8)),
    "H100 x 8": ("H100", (4, 2)),
}
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "H100": "H100"}
NAMES = ("data", "model")
RECIPES = (
    *("adamw", "lion", "laprop", "adamh", "ademamix", "mars_adamw"),
    *("muon", "muonh", "normuon", "adamuon", "muon2", "scion"),
)


def largest(shape, axes):
    return P(*[axes if k == int(shape[1] > shape[0]) else None for k in range(2)])


LAYOUTS = {
    "replicated": lambda name, shape: P(),
    "FSDP": lambda name, shape: largest(shape, NAMES),
    "HSDP": lambda name, shape: largest(shape, "data"),
    "FSDP x TP": sharding.crossed,
}
WAYS = ("found", "given", "explicit", "optax", "MaxText")
OPTAX = {"v5p 2x2x2": ("FSDP", "FSDP x TP"), "H100 x 8": ("FSDP",)}
"""Where optax's Muon is compiled too, which takes minutes."""


def as_maxtext():
    """Its Muon is that of optax. It reads most leaves so: inputs first, outputs last, and layers between."""
    spec = optax.contrib.MuonDimensionNumbers(0, -1)
    return optax.contrib.muon(
        0.02, muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: spec, params)
    )


def counted(tx, shapes, places, mesh):
    """What one device does in a donated update of float32 parameters that lie so."""
    params = jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place),
        shapes,
        places,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    known = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}

    def placed(path, x):
        alike = [
            leaf
            for end, leaf in known.items()
            if jax.tree_util.keystr(path).endswith(end) and leaf.ndim == x.ndim
        ]
        sizes = zip(alike[0].sharding.spec, alike[0].shape, x.shape, strict=False) if alike else ()
        place = NamedSharding(mesh, P(*(axes if own == size else None for axes, own, size in sizes)))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    state = jax.tree_util.tree_map_with_path(placed, jax.eval_shape(tx.init, params))
    results = jax.tree.map(lambda x: x.sharding, (params, state))
    started = time.perf_counter()
    program = targets.compiled(
        tx.update, params, state, params, mesh=mesh, donate_argnums=1, out_shardings=results
    )
    seconds = time.perf_counter() - started
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return targets.counted(program) | {"state": stored, "compile_seconds": seconds}


def placed_by(spec, shapes, mesh):
    """The shardings of the matrices of layers."""
    return {
        layer: {leaf: NamedSharding(mesh, spec(leaf, shape)) for leaf, shape in leaves.items()}
        for layer, leaves in shapes.items()
    }


def over_meshes(console):
    """Mesh → layout → way → counts."""
    shapes, rows = sharding.transformer(), {}
    for name, (target, sizes) in MESHES.items():
        if not targets.available(target):
            continue
        mesh = targets.mesh_of(target, dict(zip(NAMES, sizes, strict=True)))
        rows[name] = {}
        for layout, spec in LAYOUTS.items():
            if name == "v5p 4x4x4" and layout != "FSDP x TP":
                continue
            rows[name][layout] = {}
            for way in WAYS if layout in OPTAX.get(name, ()) else WAYS[:3]:
                row = rows[name][layout][way] = of_way(way, spec, shapes, mesh)
                console.print(name, layout, way, _in_words(row), soft_wrap=True)
    return rows


def of_way(way, spec, shapes, mesh):
    """Counts of one row of `over_meshes`."""
    if way == "explicit":
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names))
    places = placed_by(spec, shapes, mesh)
    if way == "MaxText":
        layer, count = next(iter(shapes.values())), len(shapes)
        shapes = {leaf: (rows, count, columns) for leaf, (rows, columns) in layer.items()}
        specs = ((leaf, spec(leaf, shape)) for leaf, shape in layer.items())
        places = {leaf: NamedSharding(mesh, P(rows, None, columns)) for leaf, (rows, columns) in specs}
    tx = {
        "found": sharding.ours(),
        "given": om.muon(0.02, axes={"*": "io"}, shardings=places),
        "explicit": sharding.ours(),
        "optax": sharding.theirs(),
        "MaxText": as_maxtext(),
    }[way]
    return counted(tx, shapes, places, mesh)


def of_recipes(console):
    """Mesh → recipe → counts."""
    shapes, rows = sharding.transformer(), {}
    for name in ("v5p 2x2x2", "H100 x 8"):
        target, sizes = MESHES[name]
        if not targets.available(target):
            continue
        mesh = targets.mesh_of(target, dict(zip(NAMES, sizes, strict=True)))
        places, rows[name] = placed_by(LAYOUTS["FSDP"], shapes, mesh), {}
        for recipe in RECIPES:
            rows[name][recipe] = counted(_recipe(recipe, places), shapes, places, mesh)
            console.print(name, recipe, _in_words(rows[name][recipe]), soft_wrap=True)
    return rows


def _recipe(name, places):
    """A recipe of all leaves; those that work element by element take neither axes nor shardings."""
    recipe, known = getattr(om, name), {"axes": {"*": "io"}, "shardings": places}
    taken = inspect.signature(recipe).parameters
    return recipe(0.02, **{argument: value for argument, value in known.items() if argument in taken})


def on_chips(console):
    """Device → optimizer → counts."""
    rows = {}
    for name, target in CHIPS.items():
        if not targets.available(target):
            continue
        mesh = targets.mesh_of(target, {"data": 1})
        rows[name] = {}
        for stacked in (False, True):
            shapes, is_shape = accelerator.shapes(stacked)
            places = jax.tree.map(lambda _, mesh=mesh: NamedSharding(mesh, P()), shapes, **is_shape)
            for label, tx in accelerator.optimizers(stacked).items():
                if label == "optax.contrib.muon" and name == "v6e":
                    continue
                row = counted(tx, shapes, places, mesh)
                rows[name][label + (", stacked" if stacked else "")] = row
                console.print(name, label, "stacked" if stacked else "", _in_words(row), soft_wrap=True)
    return rows


def large(console):
    """Way → counts, with what the plan expects."""
    if not targets.available("v5p"):
        return {}
    mesh, rows = targets.mesh_of("v5p:4x4x4", dict(zip(NAMES, (8, 8), strict=True))), {}
    shapes = sharding.llama_8b()
    places = {name: NamedSharding(mesh, P(None, *sharding.crossed(name, s))) for name, s in shapes.items()}
    leaves = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    for way, divide in {"whole": "never", "divided": "auto"}.items():
        tx = om.muon(0.02, axes={"*": "bio"}, shardings=places, divide=divide)
        plan = om.plan(leaves, tx, mesh=mesh).over_mesh
        expected = {
            "gflop": plan.flops / 1e9,
            "least_gflop": plan.least_flops / 1e9,
            "sent": plan.sent + plan.inside,
            "collectives": plan.collectives,
            "milliseconds": [1e3 * seconds for seconds in plan.seconds],
        }
        rows[way] = counted(tx, shapes, places, mesh) | {"expected": expected}
        console.print("Llama-3-8B, v5p 4x4x4", way, _in_words(rows[way]), expected, soft_wrap=True)
    return rows


def _in_words(row):
    work = ", ".join(f"{count:.2f} M cycles of {kind}" for kind, count in row["mcycles"].items())
    return (
        f"{row['collectives']} {row['gflop']:.0f} Gflop, {row['temporary'] / 1e6:.0f} MB temporary, "
        f"{work or str(row['kernels']) + ' kernels'}, {row['compile_seconds']:.1f} s to compile"
    )


def table(title, rows):
    """Rows of (name, counts)."""
    out = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for head in (
        "",
        "collectives",
        "Gflop",
        "MB temporary",
        "M cycles: products + rest",
        "kernels",
        "compile s",
    ):
        out.add_column(head, justify="right" if head else "left")
    for name, row in rows:
        cycles = row["mcycles"]
        out.add_row(
            name,
            str(sum(row["collectives"].values())),
            f"{row['gflop']:.0f}",
            f"{row['temporary'] / 1e6:.0f}",
            f"{cycles.get('products', 0):.2f} + {cycles.get('rest', 0):.2f}" if cycles else "",
            str(row["kernels"] or ""),
            f"{row['compile_seconds']:.1f}",
        )
    return out


def draw(found, path):
    """Collectives and temporaries of Muon over meshes, and the cycles of updates on one chip."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = found.get("mesh", {}).get("v5p 2x2x2", {})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    ways = {"found": "#0072B2", "given": "#009E73", "optax": "#999999"}
    for k, (way, color) in enumerate(ways.items()):
        for j, sides in enumerate(rows.values()):
            if way in sides:
                count = sum(sides[way]["collectives"].values())
                label = {"found": "muon(0.02)", "given": "muon(0.02, shardings=...)", "optax": "optax"}[way]
                left.barh(j + 0.27 * (k - 1), max(count, 0.8), 0.25, color=color, label=label)
                left.text(max(count, 0.8) * 1.1, j + 0.27 * (k - 1), str(count), va="center", fontsize=8)
    left.set_yticks(range(len(rows)), [*rows])
    left.set(
        xscale="log", xlabel="collectives of one update", xlim=(0.7, 5000), title="84 matrices, 8 TPU v5p"
    )
    left.invert_yaxis()
    handles, labels = left.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    left.legend(unique.values(), unique.keys(), fontsize=8, frameon=False, loc="upper right")
    chip = found.get("chip", {}).get("v5p", {})
    names = [name for name in chip if "stacked" not in name]
    products = [chip[name]["mcycles"].get("products", 0) for name in names]
    rest = [chip[name]["mcycles"].get("rest", 0) for name in names]
    right.barh(names, products, color="#0072B2", label="products of matrices")
    right.barh(names, rest, left=products, color="#E69F00", label="all else")
    right.set(xlabel="million cycles, as the compiler estimates", title="GPT-2 small, one TPU v5p")
    right.invert_yaxis()
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


PARTS = {"mesh": over_meshes, "recipes": of_recipes, "chip": on_chips, "large": large}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all without")
    named = parser.parse_args().parts
    if unknown := set(named) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}. Type some of {', '.join(PARTS)}.")
    console = Console(width=120)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in named or PARTS:
        found[name] = found.get(name, {}) | PARTS[name](console)
        found["date"] = datetime.date.today().isoformat()
        found["versions"] = found.get("versions", {}) | {
            package: importlib.metadata.version(package)
            for package in ("jax", "jaxlib", "optax", "optimorph", "libtpu")
            if package != "libtpu" or targets.available("v5p")
        }
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for mesh, layouts in found.get("mesh", {}).items():
        sides = [(f"{layout}, {way}", row) for layout, ways in layouts.items() for way, row in ways.items()]
        console.print(table(f"Muon, 84 matrices, {mesh}: one device", sides))
    console.print(table("Muon, Llama-3-8B, 64 v5p: one device", found.get("large", {}).items()))
    for way, row in found.get("large", {}).items():
        console.print(way, "sends", f"{row['sent'] / 1e6:.0f} MB; expected", row["expected"], soft_wrap=True)
    for chip, sides in found.get("chip", {}).items():
        console.print(table(f"GPT-2 small, one {chip}", sides.items()))
    draw(found, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
