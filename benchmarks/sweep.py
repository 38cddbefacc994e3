"""Sixteen learning rates at once: one program under `jax.vmap` beside sixteen runs, on the race's digits.

    python benchmarks/sweep.py

Prints and writes to `benchmarks/results/vmap.json`: seconds to compile and to train, medians of interleaved
rounds, and the ratios to the sweep in one program. The runs beside it are those of a user who passes the rate
as an array to one program, and of one who types it as a Python number, which every program then has baked in
(these sixteen compilations are their own repetition, and done in the first round only).
"""

import datetime
import importlib.metadata
import itertools
import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optimorph as om
from optimorph._racing.tasks.digits import task

RATES = np.geomspace(1e-4, 0.1, 16).astype(np.float32)
STEPS = 25
ROUNDS = 3
RECIPES = {"adamw": om.adamw}
RESULTS = Path(__file__).parent / "results" / "vmap.json"


def trainer(make, digits):
    """rate → the loss on the tuning pictures after training."""
    batches = jax.tree.map(lambda *x: np.stack(x), *itertools.islice(digits.batches(0), STEPS))
    start, (held_out,) = digits.init(0), digits.held_out("tuning")

    def train(rate):
        tx = make(rate)

        def step(carry, batch):
            params, state = carry
            updates, state = tx.update(jax.grad(digits.loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), batches)
        return digits.loss(params, held_out)

    return train


def timed(function, *arguments):
    """Seconds to compile, seconds to run, and what came out."""
    started = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    middle = time.perf_counter()
    out = jax.block_until_ready(compiled(*arguments))
    return middle - started, time.perf_counter() - middle, out, compiled


def at_once(train):
    return timed(lambda rates: jax.vmap(train)(rates), jnp.asarray(RATES))[:3]


def one_program(train):
    """The rate is an argument: compiled once, run sixteen times."""
    seconds, _, _, compiled = timed(lambda rate: train(rate), jnp.asarray(RATES[0]))
    started = time.perf_counter()
    losses = [compiled(jnp.asarray(rate)).block_until_ready() for rate in RATES]
    return seconds, time.perf_counter() - started, jnp.stack(losses)


def sixteen_programs(train):
    """The rate is a Python number: compiled sixteen times."""
    runs = [timed(lambda rate=float(rate): train(rate))[:3] for rate in RATES]
    compiling, running, losses = zip(*runs, strict=True)
    return sum(compiling), sum(running), jnp.stack(losses)


WAYS = {
    "one vmap": at_once,
    "16 runs of one program": one_program,
    "16 programs": sixteen_programs,
}


def measure(make, digits):
    """Way → medians of seconds; the losses of all ways must agree."""
    train, seen = trainer(make, digits), {way: [] for way in WAYS}
    for round_ in range(ROUNDS):
        for way, run in WAYS.items():
            if round_ == 0 or run is not sixteen_programs:
                seen[way].append(run(train))
    losses = {way: np.asarray(runs[0][2]) for way, runs in seen.items()}
    rows = {
        way: {
            "compile_seconds": statistics.median(run[0] for run in runs),
            "train_seconds": statistics.median(run[1] for run in runs),
            "seconds": statistics.median(run[0] + run[1] for run in runs),
        }
        for way, runs in seen.items()
    }
    first = rows["one vmap"]["seconds"]
    return {
        "rows": {way: row | {"ratio": row["seconds"] / first} for way, row in rows.items()},
        "best_rate": {way: float(RATES[np.nanargmin(loss)]) for way, loss in losses.items()},
        "losses": {way: [round(float(x), 4) for x in loss] for way, loss in losses.items()},
    }


def table(recipes):
    out = Table(title="16 learning rates; ratio: to one vmap", box=box.SIMPLE_HEAD, title_justify="left")
    for head in ("recipe", "way", "compile s", "train s", "both s", "ratio", "best rate"):
        out.add_column(head, justify="left" if head in ("recipe", "way") else "right")
    for name, found in recipes.items():
        for way, row in found["rows"].items():
            seconds = (row["compile_seconds"], row["train_seconds"], row["seconds"])
            best = f"{found['best_rate'][way]:.2g}"
            out.add_row(name, way, *(f"{x:.2f}" for x in seconds), f"{row['ratio']:.2f}", best)
    return out


def main():
    console, digits = Console(width=110), task()
    recipes = {name: measure(RECIPES[name], digits) for name in track(RECIPES, console=console)}
    about = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "rounds": ROUNDS,
        "steps": STEPS,
        "rates": [float(rate) for rate in RATES],
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "flax")}
        | {"optimorph": om.__version__},
    }
    console.print(table(recipes))
    console.print(about)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(about | {"recipes": recipes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
