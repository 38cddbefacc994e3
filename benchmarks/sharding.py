"""Muon over a mesh beside optax's: flops, collectives, bytes sent, memory and compile time of one device.

    python benchmarks/sharding.py

One jitted update of a transformer's 84 matrices (12 layers of width 768) on 8 forced devices, counted from
the optimized program; nothing is timed but compilation. Then, from shapes alone, what is planned for models
and meshes that do not fit here. Written to `benchmarks/results/sharding.json`.
"""

import os

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import datetime
import importlib.metadata
import json
import math
import time
from pathlib import Path

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optimorph as om
from optimorph._distributed.groups import Leaf, groups_of, in_order
from optimorph._distributed.hardware import HARDWARE
from optimorph._distributed.placement import place
from optimorph._distributed.roles import Roles, cost_of, division_of, shards_sent
from optimorph.linalg import Axes, NewtonSchulz

RESULTS = Path(__file__).parent / "results" / "sharding.json"
DEVICES = 8
ROW_PARALLEL = ("out", "down")


def transformer(layers=12, width=768, wide=4):
    """The shapes of its matrices, each a leaf of its own."""
    square, up = (width, width), (width, wide * width)
    layer = dict.fromkeys(("query", "key", "value", "out"), square) | {"up": up, "gate": up, "down": up[::-1]}
    return {f"layer{k}": layer for k in range(layers)}


def largest(name, shape):
    return P("data", None) if shape[0] > shape[1] else P(None, "data")


def crossed(name, shape):
    return P("model", "data") if name in ROW_PARALLEL else P("data", "model")


LAYOUTS = {  # name → (spec of a leaf, shape of the mesh)
    "replicated": (lambda name, shape: P(), (DEVICES,)),
    "FSDP, largest axis": (largest, (DEVICES,)),
    "FSDP, last axis": (lambda name, shape: P(None, "data"), (DEVICES,)),
    "FSDP 4 x TP 2": (crossed, (DEVICES // 2, 2)),
    "HSDP: data axis of 4 x 2": (largest, (DEVICES // 2, 2)),
}


def shardings(layout, shapes, kind=AxisType.Auto, devices=None):
    """For each leaf its sharding."""
    spec, sizes = LAYOUTS[layout]
    devices = jax.devices()[:DEVICES] if devices is None else devices
    names = ("data", "model")[: len(sizes)]
    mesh = jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes), devices=devices)
    return {
        layer: {name: NamedSharding(mesh, spec(name, shape)) for name, shape in leaves.items()}
        for layer, leaves in shapes.items()
    }


def ours(comm_dtype=None):
    return om.muon(0.02, axes={"*": "io"}, comm_dtype=comm_dtype)


def theirs():
    spec = optax.contrib.MuonDimensionNumbers(0, 1)
    return optax.contrib.muon(
        0.02, muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: spec, params)
    )


def compiled(tx, shapes, places):
    """The program of one update with its state donated, and the seconds to compile it."""
    leaves = jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place),
        shapes,
        places,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    where = {
        jax.tree_util.keystr(path): place for path, place in jax.tree_util.tree_flatten_with_path(places)[0]
    }
    everywhere = NamedSharding(next(iter(where.values())).mesh, P())

    def placed(path, x):
        known = [place for end, place in where.items() if jax.tree_util.keystr(path).endswith(end)]
        place = known[0] if known and x.ndim == 2 else everywhere
        if known and 1 in x.shape:  # a mean keeps an axis of one number
            names = [
                name if size > 1 else None for name, size in zip(_padded(place, 2), x.shape, strict=True)
            ]
            place = NamedSharding(place.mesh, P(*names))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), leaves)
    state = jax.tree_util.tree_map_with_path(placed, jax.eval_shape(tx.init, plain))
    started = time.perf_counter()
    program = jax.jit(tx.update, donate_argnums=1).lower(leaves, state, leaves).compile()
    return program, time.perf_counter() - started


def counts(tx, shapes, places):
    """What one device does in an update."""
    program, seconds = compiled(tx, shapes, places)
    found, memory = hlo.counted(program), program.memory_analysis()
    return {
        "flops": found.flops,
        "collectives": dict(found.collectives),
        "in_loops": found.in_loops,
        "sent": found.sent,
        "temporary": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "compile_seconds": seconds,
    }


def leaves_of(shapes, places):
    """The same as the planner sees it."""
    return [
        Leaf(
            shape, Axes("io"), tuple((e,) if isinstance(e, str) else e or () for e in _padded(place, 2)), F32
        )
        for layer in shapes
        for shape, place in zip(shapes[layer].values(), places[layer].values(), strict=True)
    ]


F32 = np.dtype(np.float32)


def _padded(place, ndim):
    entries = tuple(place.spec)
    return entries + (None,) * (ndim - len(entries))


def least(layout, shapes):
    """Flops and bytes if nothing were padded."""
    places = shardings(layout, shapes)
    mesh = dict(next(iter(places["layer0"].values())).mesh.shape)
    plan = place(mesh, leaves_of(shapes, places), cost=NewtonSchulz().flops)
    return {"flops": plan.least_flops, "sent": least_sent(mesh, leaves_of(shapes, places))}


def least_sent(mesh, leaves):
    """Bytes that a device would send if the matrices were divided evenly, and no slot were empty."""
    total = 0.0
    for group, batch_axes, dtype in groups_of(mesh, leaves, equivariant=True):
        axes, owners = in_order(mesh, group.mesh_axes), [name for name in mesh if name not in batch_axes]
        roles = Roles(axes, (), tuple(name for name in owners if name not in axes))
        shards = group.matrices / math.prod(mesh[name] for name in owners) * shards_sent(mesh, roles)
        total += dtype.itemsize * math.prod(group.local_shape) * shards
    return total


def simulated():
    """Plans for meshes of thousands: (model, devices) → flops and bytes of a device, and how evenly."""
    rows, polar, hardware = {}, NewtonSchulz(), HARDWARE["v5p"]
    models = {"Llama-3-8B, 64 devices": llama(64, llama_8b())}
    for devices in (1024, 4096, 16384):
        mixture = experts(devices)
        models |= {
            f"Llama-3-405B, {devices} devices": llama(devices),
            f"1 T mixture of experts, {devices} devices": mixture,
            f"its experts alone, {devices} devices": (mixture[0], mixture[1][:3]),
        }
    for name, (mesh, leaves) in models.items():
        for way, divide in {"": False, ", divided": True}.items():
            started = time.perf_counter()
            division = division_of(polar, hardware, divide)
            plan = place(mesh, leaves, cost=cost_of(polar, hardware), division=division)
            rows[name + way] = {
                "mesh": mesh,
                "matrices": sum(math.prod(leaf.shape[:-2]) for leaf in leaves),
                "divided": plan.divided,
                "flops": plan.flops,
                "worst_over_mean": plan.flops / plan.least_flops,
                "sent": plan.sent,
                "sent_over_least": plan.sent / least_sent(mesh, leaves),
                "sent_inside": plan.inside,
                "collectives_inside": plan.collectives,
                "milliseconds": [1e3 * seconds for seconds in plan.seconds],
                "rounds": sum(len(exchange.rounds) for exchange in plan.exchanges),
                "plan_seconds": time.perf_counter() - started,
            }
    return rows


def llama_8b():
    """The matrices of Llama-3-8B, its 32 layers stacked."""
    return llama_shapes(32, 4096, 1024, 14336)


def llama_shapes(layers, width, keys, hidden):
    """Name → shape."""
    return {
        "query": (layers, width, width),
        "key": (layers, width, keys),
        "value": (layers, width, keys),
        "out": (layers, width, width),
        "gate": (layers, width, hidden),
        "up": (layers, width, hidden),
        "down": (layers, hidden, width),
    }


def llama(devices, shapes=None):
    """FSDP over all but 8, which are tensor parallel; without shapes, 126 layers of width 16384."""
    mesh = {"data": devices // 8, "model": 8}
    columns, rows = ((), ("data",), ("model",)), ((), ("model",), ("data",))
    shapes = llama_shapes(126, 16384, 1024, 53248) if shapes is None else shapes
    return mesh, [
        Leaf(shape, Axes("bio"), rows if name in ROW_PARALLEL else columns, F32)
        for name, shape in shapes.items()
    ]


def experts(devices):
    """60 layers of width 7168 with 384 experts: these over 128 devices, the rest FSDP."""
    mesh, width, hidden = {"data": devices // 128, "expert": 128}, 7168, 2048
    spread = ((), ("expert",), ("data",), ())
    leaves = [Leaf((60, 384, width, hidden), Axes("bbio"), spread, F32)] * 2
    leaves += [Leaf((60, 384, hidden, width), Axes("bbio"), (*spread[:2], (), ("data",)), F32)]
    return mesh, leaves + [Leaf((60, width, width), Axes("bio"), ((), ("expert",), ("data",)), F32)] * 4


def table(rows):
    out = Table(
        title="one update of 84 matrices, each device of 8", box=box.SIMPLE_HEAD, title_justify="left"
    )
    heads = ("layout", "", "Gflop", "collectives", "MB sent", "MB temporary", "compile s")
    for head in heads:
        out.add_column(head, justify="left" if head in heads[:2] else "right")
    for layout, sides in rows.items():
        for side, row in sides.items():
            kinds = row.get("collectives")
            out.add_row(
                layout if side == "optimorph" else "",
                side,
                f"{row['flops'] / 1e9:.0f}",
                "" if kinds is None else str(sum(kinds.values())),
                f"{row['sent'] / 1e6:.1f}",
                f"{row['temporary'] / 1e6:.0f}" if "temporary" in row else "",
                f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "",
            )
    return out


def paper(rows):
    out = Table(
        title="planned for v5p, from shapes alone: ms of products + sending by published numbers",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    heads = ("model", "matrices", "divided", "Tflop", "worst / mean", "GB sent", "over least", "inside", "ms")
    for head in heads:
        out.add_column(head, justify="left" if head == "model" else "right")
    for name, row in rows.items():
        out.add_row(
            name,
            f"{row['matrices']:,}",
            f"{row['divided']:,}",
            f"{row['flops'] / 1e12:.1f}",
            f"{row['worst_over_mean']:.2f}",
            f"{row['sent'] / 1e9:.2f}",
            f"{row['sent_over_least']:.2f}",
            f"{row['sent_inside'] / 1e9:.2f}",
            " + ".join(f"{part:.0f}" for part in row["milliseconds"]),
        )
    return out


def main():
    console, shapes = Console(width=120), transformer()
    rows = {}
    for layout in track(LAYOUTS, console=console):
        places = shardings(layout, shapes)
        rows[layout] = {
            "optimorph": counts(ours(), shapes, places),
            "optimorph, bfloat16 sent": counts(ours(jnp.bfloat16), shapes, places),
            "optax": counts(theirs(), shapes, places),
            "least": least(layout, shapes),
        }
    about = {
        "date": datetime.date.today().isoformat(),
        "devices": f"{DEVICES} forced on {os.cpu_count()} cores",
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "optimorph")
        },
    }
    planned = simulated()
    console.print(table(rows), paper(planned), about)
    console.print(
        "MaxText's fork of optax's Muon on the same set, as others measured it: 353 to 408 Gflop, up to 1863 "
        "collectives and 4123 MB on separate leaves."
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(about | {"rows": rows, "planned": planned}, indent=1) + "\n")


if __name__ == "__main__":
    main()
