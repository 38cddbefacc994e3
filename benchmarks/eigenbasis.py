"""What optimizers in an eigenbasis cost: over a mesh, on one CPU, and compiled for accelerators.

    python benchmarks/eigenbasis.py [mesh] [balance] [steps] [accelerators] [first]

mesh: one update of SOAP for the 84 matrices of a transformer (12 layers of width 768) on 8 forced devices,
beside a port leaf by leaf: averages are divided as the parameters are, factors and bases are on every device.
balance: the QR of the busiest device over the mean of all, from the plan, of models with uneven matrices.
steps: milliseconds of one update beside AdamW and Muon (the median of interleaved rounds), and seconds to
compile. Set OPENBLAS_NUM_THREADS=1: the threads of LAPACK wait for each other where cores are busy.
accelerators: QR and eigh of four matrices, compiled for one v5p or H100, and an update of uneven matrices for
eight. Run it with `pip install -e '.[accelerators]'`.
first: losses on the race's text where every one of the first steps refreshes the bases, seed by seed. The
rates are those of SOAP there.

Part by part written to `benchmarks/results/eigenbasis.json`.
"""

import targets  # isort: skip  # before jax is imported

import os

if __name__ == "__main__":
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = flags + " --xla_force_host_platform_device_count=8"

import datetime
import functools
import importlib.metadata
import itertools
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
from optimorph._racing import registry
from optimorph._racing.task import warmup_cosine
from optimorph._racing.tasks import text
from optimorph._racing.training import CompiledTask, Run

RESULTS = Path(__file__).parent / "results" / "eigenbasis.json"
AXES = {"*": "io"}
BASES = {"": lambda x: jnp.linalg.qr(x)[0], "eigh of ": lambda x: jnp.linalg.eigh(x)[1]}


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
    """Model → devices → the busiest device over the mean: at the owners, as computed, and at best.

    With `every`, the busiest device of the worst step in ten.
    """
    rows = {}
    for name, sizes in UNEVEN.items():
        rows[name] = {}
        for devices in (8, 16, 64):
            slots = {}
            for side, count in ((side, count) for shape, count in sizes.items() for side in shape):
                slots.setdefault(side, []).append(count)
            numbers = [_numbers(devices, counts) for counts in slots.values()]
            costs = [float(side) ** 3 for side in slots]
            mean = sum(cost * np.sum(x >= 0) for cost, x in zip(costs, numbers, strict=True)) / devices
            owners = sum(cost * x.shape[1] for cost, x in zip(costs, numbers, strict=True))
            rows[name][str(devices)] = {
                "owners": float(owners / mean),
                "balanced": float(_busiest(costs, numbers, 1, owners) / mean),
                "at_best": max(1.0, float(max(costs) / mean)),
                "spread": float(_busiest(costs, numbers, 10, owners) / mean * 10),
                "spread_at_best": max(1.0, float(max(costs) / mean) * 10),
            }
        print(name, rows[name], flush=True)
    return rows


def _numbers(devices, counts):
    """Which matrix of its size each slot of stacks has; -1 for none."""
    firsts, each = np.cumsum([0, *counts]), []
    for first, count in zip(firsts, counts, strict=False):
        number = np.arange(-(-count // devices) * devices)
        each.append(np.where(number < count, first + number, -1).reshape(devices, -1))
    return np.concatenate(each, axis=1)


def _busiest(costs, numbers, every, owners):
    """The most work of one device in one turn."""
    plans = balanced(costs, numbers, every)
    if plans is None:
        return float(owners)
    work = [
        cost * plan.chosen.shape[2] * (plan.chosen[..., 0] < x.shape[1] + len(plan.rounds))
        for cost, x, plan in zip(costs, numbers, plans, strict=True)
    ]
    return float(np.max(sum(work)))


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
    """Device → QR and `eigh` of four matrices → what its compiler says."""
    rows = {}
    for name in ("v5p", "H100"):
        target = accelerators.CHIPS[name]
        if not targets.available(target):
            continue
        mesh, rows[name] = targets.mesh_of(target, {"data": 1}), {}
        for n, (before, basis) in itertools.product((128, 768), BASES.items()):
            x = jax.ShapeDtypeStruct((4, n, n), jnp.float32, sharding=NamedSharding(mesh, P()))
            started, cpu = time.perf_counter(), time.process_time()
            program = targets.compiled(basis, x, mesh=mesh)
            label = f"{before}4 x {n} x {n}"
            rows[name][label] = {
                "compile_seconds": time.perf_counter() - started,
                "compile_cpu_seconds": time.process_time() - cpu,
                "lines": program.as_text().count("\n"),
            }
            print(name, label, rows[name][label], flush=True)
        mesh = targets.mesh_of("H100" if name == "H100" else "v5p:2x2x2", {"data": 8})
        for label, spread in (("together", False), ("spread", True)):
            rows[name][label] = _of_uneven_matrices(mesh, spread)
            print(name, label, rows[name][label], flush=True)
    return rows


def _of_uneven_matrices(mesh, spread):
    """What the compiler says of an update of 15 matrices of 7 sizes on eight devices."""
    sizes = UNEVEN["15 matrices of 7 sizes, sides 256 to 2048"]
    shapes = {f"{n}x{m}-{k}": (n // 8, m // 8) for (n, m), count in sizes.items() for k in range(count)}
    whole, owners = NamedSharding(mesh, P()), NamedSharding(mesh, P(mesh.axis_names))
    tx = om.soap(3e-3, axes=AXES, spread=spread)
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32, sharding=whole) for name, s in shapes.items()}
    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, params)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=owners if x.ndim > 1 else whole), state
    )
    started = time.perf_counter()
    program = targets.compiled(tx.update, params, state, params, mesh=mesh)
    seconds, text = time.perf_counter() - started, program.as_text()
    return {
        "compile_seconds": seconds,
        "lines": text.count("\n"),
        "collectives": dict(hlo.counted(program).collectives),
        "permutations of a refresh": len(re.findall(r" collective-permute(?:-start)?\(", text)),
    }


VARIANTS = {
    "soap, refresh_warmup=30": functools.partial(om.soap, refresh_warmup=30),
    "klsoap, refresh_warmup=30": functools.partial(om.klsoap, refresh_warmup=30),
    "klsoap": om.klsoap,
    "soap, every=1": functools.partial(om.soap, every=1),
}


def first_steps():
    """Variant → seed → validation loss of the race on text; what is recorded is not trained again."""
    task, rates = text.task(), registry.recorded_learning_rates("text")["soap"]
    rate, others = (warmup_cosine(peak, task.steps) for peak in rates)
    compiled = CompiledTask(task)
    rows = json.loads(RESULTS.read_text()).get("first", {})
    for seed, name in itertools.product(range(3), VARIANTS):
        if str(seed) not in rows.setdefault(name, {}):
            adamw = om.adamw(others, b2=registry.B2, weight_decay=0.0)
            tx = VARIANTS[name](rate, weight_decay=task.weight_decay, others=adamw)
            run = Run(compiled, tx, seed)
            while run.step < task.steps:
                run.take_step()
            run.evaluate()
            rows[name][str(seed)] = run.losses[-1]
            print(seed, name, run.losses[-1], flush=True)
            RESULTS.write_text(json.dumps(json.loads(RESULTS.read_text()) | {"first": rows}, indent=1) + "\n")
    return rows


PARTS = {
    "mesh": over_meshes,
    "balance": balance,
    "steps": steps,
    "accelerators": on_accelerators,
    "first": first_steps,
}


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
