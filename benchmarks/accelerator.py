"""Updates of GPT-2 small on one accelerator, beside optax's and PyTorch's.

    python benchmarks/accelerator.py [--out FILE]

Of each optimizer: seconds to compile, milliseconds of one jitted and donated update (median of interleaved
rounds), bytes of state and of temporaries for each parameter, and on GPUs the kernels of the compiled program
and the bytes that they read and write. Layers are separate leaves, and in the rows
"stacked" one leaf for all layers. Writes `benchmarks/results/accelerator.json`, with the device, the versions
and the date. It runs on CPUs too, where the numbers of `benchmarks/optimizers.py` are the better ones.
"""

import argparse
import datetime
import importlib.metadata
import json
import statistics
import time
from pathlib import Path

import hlo
import jax
import jax.numpy as jnp
import optax
import optax.contrib

import optimorph as om

ROUNDS, STEPS = 7, 10
RESULTS = Path(__file__).parent / "results" / "accelerator.json"
WIDTH, LAYERS = 768, 12
LOOPED = ("optax.adamw", "adamw", "adamw int8", "muon")
"""What is timed in a loop of one program too."""


def shapes(stacked):
    """GPT-2 small: 124 million parameters."""
    layer = dict.fromkeys(("query", "key", "value", "out"), (WIDTH, WIDTH))
    layer |= {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    layer = {name: {"kernel": shape, "bias": shape[1:]} for name, shape in layer.items()}
    layer["norm"] = {"scale": (WIDTH,), "bias": (WIDTH,)}
    is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
    if stacked:
        layers = {"layers": jax.tree.map(lambda s: (LAYERS, *s), layer, **is_shape)}
    else:
        layers = {f"layer{k}": layer for k in range(LAYERS)}
    return {"embedding": (50257, WIDTH), "positions": (1024, WIDTH), **layers}, is_shape


def parameters(stacked, dtype):
    """Random numbers of those shapes."""
    tree, is_shape = shapes(stacked)
    leaves, structure = jax.tree.flatten(tree, **is_shape)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return structure.unflatten(
        [0.02 * jax.random.normal(k, s, dtype) for k, s in zip(keys, leaves, strict=True)]
    )


def muon(stacked, recipe=om.muon, **arguments):
    """Of the matrices in layers."""
    spec = {"layers/*/kernel": "bio"} if stacked else {"layer*/kernel": "io"}
    return recipe(0.02, axes={**spec, "*": None}, **arguments)


def optimizers(stacked):
    """Name → transformation."""
    if stacked:
        return {
            "optax.adamw": optax.adamw(1e-3),
            "adamw": om.adamw(1e-3),
            "adamw int8": om.adamw(1e-3, state="int8"),
            "muon": muon(True),
        }
    labels = lambda tree: jax.tree.map_with_path(  # noqa: E731
        lambda path, x: optax.contrib.MuonDimensionNumbers() if "kernel" in str(path[-1]) else None, tree
    )
    return {
        "optax.adamw": optax.adamw(1e-3),
        "adamw": om.adamw(1e-3),
        "adamw bfloat16 moments": om.adamw(1e-3, mu_dtype="bfloat16", nu_dtype="bfloat16"),
        "adamw int8": om.adamw(1e-3, state="int8"),
        "optax.contrib.muon": optax.contrib.muon(0.02, muon_weight_dimension_numbers=labels),
        "muon": muon(False),
        "muon int8": muon(False, state="int8"),
        "normuon": muon(False, om.normuon),
        "adamuon": muon(False, om.adamuon),
        "muon2": muon(False, om.muon2),
        "muonh": muon(False, om.muonh),
        "scion": om.scion(1e-3, axes={"layer*/kernel": "io", "*": None}),
    }


def measured(tx, params, name):
    """What compilation says, and a function that takes one update."""
    state = jax.jit(tx.init)(params)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p), donate_argnums=(0, 1))
    start = time.perf_counter()
    compiled = step.lower(params, state, params).compile()
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    size = sum(x.size for x in jax.tree.leaves(params))
    held = {"state": state, "gradient": jax.tree.map(jnp.copy, params)}

    def run():
        for _ in range(STEPS):
            held["gradient"], held["state"] = compiled(held["gradient"], held["state"], params)
        jax.block_until_ready(held)

    run()
    row = {
        "name": name,
        "compile_seconds": seconds,
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)) / size,
        "temporary_bytes": memory.temp_size_in_bytes / size,
    }
    if jax.default_backend() == "gpu":
        row["kernels"], row["traffic_bytes"] = hlo.launched(compiled)
    return row, run


def looped(tx, params):
    """Milliseconds of one of many updates in one program, without what a call costs on the host."""
    state = jax.jit(tx.init)(params)

    def one(_, carry):
        return tx.update(*carry, params)

    program = jax.jit(lambda g, s: jax.lax.fori_loop(0, 2 * STEPS, one, (g, s)))
    compiled = program.lower(params, state).compile()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(params, state))
        times.append((time.perf_counter() - start) / (2 * STEPS) * 1e3)
    return statistics.median(times[1:])


def timed(run):
    """Milliseconds of one update."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) / STEPS * 1e3


def torch_rows(tree):
    """PyTorch's fused AdamW and its Muon, if it is installed and sees the device."""
    try:
        import torch
    except ImportError:
        return
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    leaves = [(jax.tree_util.keystr(path), x.shape) for path, x in jax.tree.leaves_with_path(tree)]
    weights = {path: torch.randn(shape, device=device) for path, shape in leaves}
    for w in weights.values():
        w.grad = torch.randn_like(w)
    matrices = [w for path, w in weights.items() if "kernel" in path]
    others = [w for path, w in weights.items() if "kernel" not in path]
    made = {"torch.optim.AdamW, fused": [torch.optim.AdamW([*weights.values()], fused=True)]}
    if hasattr(torch.optim, "Muon"):
        made["torch.optim.Muon"] = [torch.optim.Muon(matrices), torch.optim.AdamW(others, fused=True)]
    for name, steps in made.items():

        def run(steps=steps):
            for _ in range(STEPS):
                for each in steps:
                    each.step()
            if device == "cuda":
                torch.cuda.synchronize()

        run()
        yield {"name": name}, run


def main():
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args().out
    rows = []
    for stacked in (False, True):
        params = parameters(stacked, jnp.float32)
        made = [measured(tx, params, name) for name, tx in optimizers(stacked).items()]
        if not stacked:
            made += torch_rows(params)
        times = {k: [] for k in range(len(made))}
        for _ in range(ROUNDS):
            for k, (_, run) in enumerate(made):
                times[k].append(timed(run))
        for k, (row, _) in enumerate(made):
            row |= {"stacked": stacked, "milliseconds": statistics.median(times[k])}
            if row["name"] in LOOPED:
                row["looped_milliseconds"] = looped(optimizers(stacked)[row["name"]], params)
            rows.append(row)
            print(json.dumps(row), flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")}
    report = {
        "device": jax.devices()[0].device_kind,
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "rows": rows,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
