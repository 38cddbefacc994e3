"""What optimizers in an eigenbasis cost: over a mesh, on one CPU, and compiled for accelerators.

    python benchmarks/eigenbasis.py [mesh] [balance] [steps] [accelerators]

mesh: one update of SOAP for the 84 matrices of a transformer (12 layers of width 768) on 8 forced devices,
beside a port leaf by leaf: averages are divided as the parameters are, factors and bases are on every device.
balance: the QR of the busiest device over the mean of all, from the plan, of models with uneven matrices.
steps: milliseconds of one update beside AdamW and Muon (the median of interleaved rounds), and seconds to
compile. Set OPENBLAS_NUM_THREADS=1: the threads of LAPACK wait for each other where cores are busy.
accelerators: QR of four matrices, compiled for one v5p or H100.

Part by part written to `benchmarks/results/eigenbasis.json`.
"""

import targets  # isort: skip  # before jax is imported

import os

if __name__ == "__main__":
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = flags + " --xla_force_host_platform_device_count=8"

import datetime
import importlib.metadata
import json
import math
import re
import statistics
import sys
import time
from pathlib import Path

import accelerators
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimizers
import sharding
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optimorph as om
from optimorph._distributed.balance import balanced

RESULTS = Path(__file__).parent / "results" / "eigenbasis.json"
AXES = {"*": "io"}


def leaf_by_leaf(rate=3e-3, b1=0.95, b2=0.95, every=10):
    """SOAP as it is ported for one device."""

    def init(params):
        sides = jax.tree.map(lambda w: [jnp.eye(n) for n in w.shape], params)
        return {"m": params, "v": params, "factors": sides, "bases": sides, "count": jnp.zeros([], jnp.int32)}

    def one(g, m, v, factors, bases, due):
        factors = [b2 * p + (1 - b2) * x @ x.T for p, x in zip(factors, (g, g.T), strict=True)]
        m, p = b1 * m + (1 - b1) * g, bases[0].T @ g @ bases[1]
        v = b2 * v + (1 - b2) * p * p
        update = bases[0] @ ((bases[0].T @ m @ bases[1]) / (jnp.sqrt(v) + 1e-8)) @ bases[1].T
        turned = lambda: [jnp.linalg.qr(p @ q)[0] for p, q in zip(factors, bases, strict=True)]  # noqa: E731
        return -rate * update, m, v, factors, jax.lax.cond(due, turned, lambda: bases)

    def update(updates, state, params):
        leaves, tree = jax.tree.flatten(updates)
        parts = (tree.flatten_up_to(state[name]) for name in ("m", "v", "factors", "bases"))
        due = state["count"] % every == 0
        made = [one(*each, due) for each in zip(leaves, *parts, strict=True)]
        u, *new = map(tree.unflatten, zip(*made, strict=True))
        return u, dict(zip(state, (*new, state["count"] + 1), strict=True))

    return optax.GradientTransformation(init, update)


def over_meshes():
    """Layout → way → what a device does, with the flops of its QR decompositions."""
    shapes, rows = sharding.transformer(), {}
    for layout in ("replicated", "FSDP, largest axis", "FSDP 4 x TP 2"):
        places = sharding.shardings(layout, shapes)
        rows[layout] = {
            "soap": _counts(om.soap(3e-3, axes=AXES), shapes, places),
            "leaf by leaf": _counts(leaf_by_leaf(), shapes, places),
        }
        print(layout, rows[layout], flush=True)
    return rows


def _counts(tx, shapes, places):
    leaves = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s, jnp.float32, sharding=p), shapes, places, is_leaf=_is_shape
    )
    by_path = {jax.tree_util.keystr(path): p for path, p in jax.tree.leaves_with_path(places)}
    mesh = next(iter(by_path.values())).mesh

    def placed(path, x):
        name = jax.tree_util.keystr(path)
        own = next((p for end, p in by_path.items() if name.endswith(end)), None)
        own = NamedSharding(mesh, P(mesh.axis_names)) if x.ndim == 3 else own or NamedSharding(mesh, P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own)

    state = jax.tree.map_with_path(placed, jax.eval_shape(tx.init, leaves))
    stored = (math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
    started = time.perf_counter()
    program = jax.jit(tx.update, donate_argnums=1).lower(leaves, state, leaves).compile()
    seconds, found = time.perf_counter() - started, hlo.counted(program)
    decomposed = re.findall(r"lapack_sgeqrf.*?operand_layout_constraints={f32\[([\d,]+)\]", program.as_text())
    sizes = [[int(n) for n in each.split(",")] for each in decomposed]
    return {
        "collectives": dict(found.collectives),
        "sent": found.sent,
        "flops": found.flops,
        "qr_flops": sum(8 / 3 * n**3 * math.prod(batch) for *batch, n, _ in sizes),
        "decompositions": sum(math.prod(batch) for *batch, _, _ in sizes),
        "state": sum(stored),
        "temporary": program.memory_analysis().temp_size_in_bytes,
        "compile_seconds": seconds,
    }


def _is_shape(x):
    return isinstance(x, tuple)


UNEVEN = {
    "GPT-2: 12 layers of width 768, 48 matrices": {
        (768, 2304): 12,
        (768, 768): 12,
        (768, 3072): 12,
        (3072, 768): 12,
    },
    "12 layers of width 768, 84 matrices": {(768, 768): 48, (768, 3072): 24, (3072, 768): 12},
    "15 matrices of 7 sizes, sides 256 to 2048": {
        (256, 512): 1,
        (512, 512): 3,
        (512, 1024): 2,
        (768, 768): 5,
        (1024, 2048): 1,
        (2048, 1000): 1,
        (2048, 2048): 2,
    },
}


def balance():
    """Model → devices → the busiest device over the mean: at the owners, as computed, and at best."""
    rows = {}
    for name, sizes in UNEVEN.items():
        rows[name] = {}
        for devices in (8, 16, 64):
            slots = {}
            for side, count in ((side, count) for shape, count in sizes.items() for side in shape):
                end = -(-count // devices) * devices
                slots.setdefault(side, []).append((np.arange(end) < count).reshape(devices, -1))
            filled = [np.concatenate(each, axis=1) for each in slots.values()]
            costs = [float(side) ** 3 for side in slots]
            plans = balanced(costs, filled)
            mean = sum(cost * x.sum() for cost, x in zip(costs, filled, strict=True)) / devices
            owners = sum(cost * x.shape[1] for cost, x in zip(costs, filled, strict=True))
            work = [
                cost * plan.chosen.shape[1] * (plan.chosen[:, 0] < x.shape[1] + len(plan.rounds))
                for cost, x, plan in zip(costs, filled, plans or (), strict=plans is not None)
            ]
            busiest = owners if plans is None else np.max(sum(work))
            rows[name][str(devices)] = {
                "owners": float(owners / mean),
                "balanced": float(busiest / mean),
                "at_best": max(1.0, float(max(costs) / mean)),
            }
        print(name, rows[name], flush=True)
    return rows


MODELS = {"GPT, 4 layers of width 128": (128, 4), "GPT, 2 layers of width 256": (256, 2)}


def steps():
    """Model → optimizer → milliseconds of a step with a refresh and of one without."""
    rows = {}
    for name, (width, layers) in MODELS.items():
        rng = np.random.default_rng(0)
        shapes = optimizers.gpt(width, layers)
        params = jax.tree.map(
            lambda s, rng=rng: jnp.asarray(rng.standard_normal(s), jnp.float32), shapes, is_leaf=_is_shape
        )
        made = {
            "adamw": om.adamw(1e-3),
            "muon": om.muon(0.02, axes={"*/scale": None, "*": "io"}),
            "soap": om.soap(3e-3, axes={"*/scale": None, "*": "io"}),
            "soap, spread": om.soap(3e-3, spread=True, axes={"*/scale": None, "*": "io"}),
            "soap, bfloat16 factors": om.soap(
                3e-3, factor_dtype="bfloat16", axes={"*/scale": None, "*": "io"}
            ),
        }
        sides = {label: optimizers.Side(tx, params, params) for label, tx in made.items()}
        times = {label: {"first": [], "refresh": [], "step": []} for label in made}
        states = {label: side.arguments[1] for label, side in sides.items()}
        for step in range(41):
            for label, side in sides.items():  # interleaved: the machine's noise meets all
                started = time.perf_counter()
                _, states[label] = jax.block_until_ready(side.compiled(params, states[label], params))
                kind = "first" if step == 0 else "step" if step % 10 else "refresh"
                times[label][kind].append(time.perf_counter() - started)
        size = sum(x.size for x in jax.tree.leaves(params))
        rows[name] = {
            label: {
                "ms": {kind: 1e3 * statistics.median(each) for kind, each in times[label].items()},
                "compile_seconds": statistics.median(side.compile_times),
                "state": side.state_bytes / size,
            }
            for label, side in sides.items()
        }
        print(name, rows[name], flush=True)
    return rows


def on_accelerators():
    """Device → QR of four matrices → what its compiler says."""
    rows = {}
    for name in ("v5p", "H100"):
        target = accelerators.CHIPS[name]
        if not targets.available(target):
            continue
        mesh, rows[name] = targets.mesh_of(target, {"data": 1}), {}
        for n in (128, 768):
            x = jax.ShapeDtypeStruct((4, n, n), jnp.float32, sharding=NamedSharding(mesh, P()))
            started = time.perf_counter()
            program = targets.compiled(lambda x: jnp.linalg.qr(x)[0], x, mesh=mesh)
            rows[name][f"4 x {n} x {n}"] = {
                "compile_seconds": time.perf_counter() - started,
                "lines": program.as_text().count("\n"),
            }
            print(name, n, rows[name][f"4 x {n} x {n}"], flush=True)
    return rows


PARTS = {"mesh": over_meshes, "balance": balance, "steps": steps, "accelerators": on_accelerators}


def main():
    """Measure the named parts, or all."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in sys.argv[1:] or PARTS:
        found[name] = found.get(name, {}) | PARTS[name]()
        found |= {
            "date": datetime.date.today().isoformat(),
            "device": "cpu",
            "cores": os.cpu_count(),
            "versions": found.get("versions", {})
            | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "optimorph")},
        }
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
