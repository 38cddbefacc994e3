"""Which learning rate is best at which width: the text model of `optimorph race` from 32 to 512 wide.

    python benchmarks/transfer.py           # train what `results/transfer.json` does not have yet, and draw
    python benchmarks/transfer.py --draw    # draw only

The rate that is varied is that of the hidden matrices, by factors of two, until the best one has two tried
rates on each side. Embeddings, head and norms have AdamW with one fixed rate at every width, so that a
change of the best rate is one of the matrices. All seeds of a rate train at once, in one program for each
optimizer and width that has the rate as an argument. Nothing decays. Every trained rate is written at once:
what was trained is kept when the command is stopped. Products of the models have float32 precision, also on
GPUs. There the study takes minutes, on CPUs many hours.
"""

import argparse
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import re
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.console import Console
from rich.table import Table

import optimorph as om
from optimorph._racing.plot import SETTINGS
from optimorph._racing.registry import B2
from optimorph._racing.task import warmup_cosine
from optimorph._racing.tasks import text
from optimorph._routing.resolve import leaf_axes

STEPS, SEEDS, OTHERS = 128, 3, 0.02
WIDTHS, COLUMNS = (32, 64, 128, 256, 512), 4
COLORS = mpl.colormaps["viridis_r"](np.linspace(0.15, 1, len(WIDTHS)))
RESULTS = Path(__file__).parent / "results" / "transfer.json"


def adamw(rate, others):
    """AdamW with a rate of its own for the leaves that `muon` takes for matrices."""
    matrix = leaf_axes("adamw", None)
    return om.partition(
        lambda path, shape: "other" if matrix(path, shape) is None else "matrix",
        {"matrix": om.adamw(rate, b2=B2), "other": others},
    )


OPTIMIZERS = {
    "adamw": (adamw, -9),
    "muon, rms_to_rms": (lambda rate, others: om.muon(rate, others=others), -5),
    "muonh": (lambda rate, others: om.muonh(rate, others=others), -3),
    "muon, adamw_rms": (lambda rate, others: om.muon(rate, scale="adamw_rms", others=others), -5),
    "muon, keller": (lambda rate, others: om.muon(rate, scale="keller", others=others), -5),
    "normuon": (lambda rate, others: om.normuon(rate, others=others), -5),
    "soap": (lambda rate, others: om.soap(rate, weight_decay=0.0, others=others), -7),
}
"""Name → function (rate, transform of the other leaves) → optimizer; the power of 2 that is tried first."""


Losses = dict[int, list[float]]
"""Exponent of the rate, which is a power of 2 → the loss of every seed."""


def trainer(make, task, steps=STEPS, start=None):
    """A compiled function (rate, rate of the others): losses on the tuning text and parameters, by seed.

    Args:
      make: as in `OPTIMIZERS`.
      task: of `optimorph race`.
      steps: of the schedule, which has a warm-up and a cosine.
      start: the parameters of every seed, stacked; the task's own if None.
    """
    if start is None:
        start = jax.tree.map(lambda *x: jnp.stack(x), *map(task.init, range(SEEDS)))
    streams = [itertools.islice(task.batches(seed), steps) for seed in range(SEEDS)]
    batches = jax.tree.map(
        lambda *x: np.stack(x), *[jax.tree.map(lambda *x: np.stack(x), *s) for s in streams]
    )
    held_out = jax.tree.map(lambda *x: np.stack(x), *task.held_out("tuning"))

    def train(rate, others, params, batches):
        tx = make(warmup_cosine(rate, steps), om.adamw(warmup_cosine(others, steps), b2=B2))

        def step(carry, batch):
            params, state = carry
            updates, state = tx.update(jax.grad(task.loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
        return jnp.mean(jax.lax.map(lambda batch: task.loss(params, batch), held_out)), params

    zero = jnp.float32(0)
    with jax.default_matmul_precision("float32"):
        program = jax.jit(jax.vmap(train, (None, None, 0, 0))).lower(zero, zero, start, batches).compile()

    def run(rate, others=OTHERS):
        losses, params = program(jnp.float32(rate), jnp.float32(others), start, batches)
        return np.asarray(losses).tolist(), params

    return run


def next_exponent(losses: Losses, first: int, reach: int) -> int | None:
    """The nearest rate that the best one still lacks, of `reach` on each side; None if it lacks none."""
    if not losses:
        return first
    best = min(losses, key=lambda exponent: mean(losses[exponent]))
    wanted = [best + sign * k for k in range(1, reach + 1) for sign in (-1, 1)]
    return next((exponent for exponent in wanted if exponent not in losses), None)


def mean(losses: list[float]) -> float:
    """Of the seeds; infinity if any of them diverged."""
    return float(np.mean(losses)) if np.all(np.isfinite(losses)) else math.inf


def train(record):
    """Train every optimizer at every width, the narrow ones first; write the record after each rate.

    The neighbours of the best rates first, and the rates beside these when all have their neighbours.
    """
    firsts = {name: first for name, (_, first) in OPTIMIZERS.items()}
    for reach, name, width in itertools.product((1, 2), OPTIMIZERS, WIDTHS):
        curve = record["curves"].setdefault(name, {}).setdefault(str(width), {"losses": {}})
        losses = unpacked(curve["losses"])
        run = None
        while (exponent := next_exponent(losses, firsts[name], reach)) is not None:
            began = time.perf_counter()
            run = run or trainer(OPTIMIZERS[name][0], text.task(width))
            losses[exponent], _ = run(2.0**exponent)
            curve["losses"] = packed(losses)
            curve["seconds"] = round(curve.get("seconds", 0) + time.perf_counter() - began, 2)
            print(
                f"{name:<18} width {width:<4} rate 2^{exponent:<4} loss {mean(losses[exponent]):.4f}",
                flush=True,
            )
            write(record | machine(), RESULTS)
        firsts[name] = min(losses, key=lambda exponent: mean(losses[exponent]))


def write(record, path):
    """Every list on one line."""
    text = json.dumps(record, indent=1)
    path.write_text(re.sub(r"\[[^][]*\]", lambda match: " ".join(match[0].split()), text) + "\n")


def packed(losses: Losses) -> dict[str, list[float | None]]:
    """For a JSON file, which has no NaN."""
    return {str(k): [round(x, 5) if math.isfinite(x) else None for x in losses[k]] for k in sorted(losses)}


def unpacked(losses: dict[str, list[float | None]]) -> Losses:
    return {int(k): [math.nan if x is None else x for x in each] for k, each in losses.items()}


def machine():
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "flax")}
        | {"optimorph": om.__version__},
    }


def vertex(losses: dict[int, float]) -> float:
    """The exponent of the best rate by a parabola through the lowest loss and its neighbours."""
    best = min(losses, key=losses.__getitem__)
    if best - 1 not in losses or best + 1 not in losses:
        return best
    left, middle, right = (losses[best + k] for k in (-1, 0, 1))
    return best + (left - right) / (2 * (left - 2 * middle + right))


def summary(losses: Losses) -> dict[str, float]:
    """The best rate, as a power of two: of the mean loss on the grid, and by each seed's own parabola."""
    finite = {exponent: each for exponent, each in losses.items() if np.all(np.isfinite(each))}
    found = [vertex({exponent: each[seed] for exponent, each in finite.items()}) for seed in range(SEEDS)]
    best = min(finite, key=lambda exponent: mean(finite[exponent]))
    return {
        "on_grid": best,
        "exponent": statistics.fmean(found),
        "spread": statistics.stdev(found),
        "loss": mean(finite[best]),
    }


def curves_of(record) -> dict[str, dict[int, Losses]]:
    """Optimizer → width → losses, of the curves that are complete."""
    found = {}
    for name, widths in record["curves"].items():
        for width, curve in widths.items():
            losses = unpacked(curve["losses"])
            if next_exponent(losses, 0, reach=1) is None:
                found.setdefault(name, {})[int(width)] = losses
    return found


def draw(record):
    """One panel for each optimizer with a curve for each width, its best rate marked by a larger dot."""
    curves = curves_of(record)
    best = [min(map(mean, losses.values())) for widths in curves.values() for losses in widths.values()]
    with mpl.rc_context(SETTINGS):
        rows = math.ceil(len(curves) / COLUMNS)
        figure = Figure(figsize=(2.5 * COLUMNS, 3.1 * rows + 0.4), layout="constrained")
        panels = figure.subplots(rows, COLUMNS, sharey=True, squeeze=False).flat
        for axes in panels[len(curves) :]:
            axes.set_axis_off()
        for axes, (name, widths) in zip(panels, curves.items(), strict=False):
            for (width, losses), color in zip(widths.items(), COLORS, strict=False):
                exponents = sorted(losses)
                means = [mean(losses[exponent]) for exponent in exponents]
                axes.plot(exponents, means, "o-", color=color, markersize=3, label=f"width {width}")
                found = summary(losses)
                axes.plot(found["on_grid"], found["loss"], "o", color=color, markersize=9)
                axes.axvline(found["exponent"], color=color, linewidth=1, linestyle=":")
            axes.set(title=name, xlabel="learning rate", ylim=(min(best) - 0.02, max(best) + 0.1))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda exponent, _: f"2^{exponent:.0f}"))
            axes.grid()
        for axes in panels[::COLUMNS]:
            axes.set(ylabel=f"loss after {STEPS} steps\n(nats per character)")
        labels = max((axes.get_legend_handles_labels() for axes in panels), key=lambda found: len(found[1]))
        figure.legend(*labels, loc="outside upper right", ncols=len(WIDTHS))
        figure.savefig(RESULTS.with_suffix(".png"), dpi=130)


def show(best):
    """The best rates, as powers of two."""
    widths = sorted({width for each in best.values() for width in each}, key=int)
    table = Table(title="best rate, as a power of 2: mean of the seeds ± standard deviation")
    for head in ("optimizer", *widths):
        table.add_column(head, justify="left" if head == "optimizer" else "right")
    for name, each in best.items():
        cells = (each.get(width) for width in widths)
        table.add_row(name, *(f"{x['exponent']:.2f} ± {x['spread']:.2f}" if x else "-" for x in cells))
    Console(width=110).print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="draw the picture of the recorded losses only")
    only_draw = parser.parse_args().draw
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"curves": {}}
    setting = {"command": "python benchmarks/transfer.py", "steps": STEPS, "seeds": SEEDS, "others": OTHERS}
    if changed := [key for key in setting if record.get(key, setting[key]) != setting[key]]:
        parser.error(f"{RESULTS} was trained with other {', '.join(changed)}; move it away")
    record |= setting
    if not only_draw:
        train(record)
    record = json.loads(RESULTS.read_text())
    record["best"] = {
        name: {str(width): summary(losses) for width, losses in widths.items()}
        for name, widths in curves_of(record).items()
    }
    write(record, RESULTS)
    show(record["best"])
    draw(record)


if __name__ == "__main__":
    main()
