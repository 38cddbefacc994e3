"""Races of float32 and 8 bits at the learning rates of `optimorph race`: a part of `state.py`."""

import statistics
import threading

import jax
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import optimorph as om
from optimorph._core.moments import moments_of
from optimorph._racing.palette import OPTIMIZERS
from optimorph._racing.plot import SETTINGS
from optimorph._racing.registry import make_optimizer, tuned_learning_rates
from optimorph._racing.tasks import digits, text
from optimorph._racing.ticks import PlainLog
from optimorph._racing.training import Entry, train_all
from optimorph._routing.resolve import leaf_axes
from optimorph.codecs import Nonneg8, Signed8

SEEDS = 3
TASKS = {"text": text, "digits": digits}


def narrow(name):
    """All leaves of two axes and more in 8 bits; what Muon orthogonalizes linearly."""
    spec = leaf_axes(name, None)

    def rules(path, shape):
        kind, leaf = path.split("/", 1)
        if len(shape) < 2:
            return None
        linear = name == "muon" and spec(leaf, shape) is not None
        return {"first": Signed8(mapping="linear" if linear else "softsign"), "second": Nonneg8()}[kind]

    return rules


def race(task):
    """Optimizer → both ways, their losses by seed and their curves."""
    entries = []
    for name in ("adamw", "muon"):
        rates = tuned_learning_rates(task)[name]
        tx = make_optimizer(name, task, rates, task.steps)
        eight = om.compress_state(tx, narrow(name), elementwise=name == "adamw")
        entries += [Entry((name, "float32"), tx), Entry((name, "8 bits"), eight)]
    train_all(task, entries, task.steps, SEEDS, lambda entry: None, threading.Event())
    rows = {}
    for entry in entries:
        losses = [run.losses[-1] for run in entry.runs]
        held = jax.tree.leaves(entry.runs[0].state)
        codes = sum(x.size for x in held if x.dtype.itemsize == 1)
        moments = sum(
            x.size
            for _, tree in moments_of(getattr(entry.runs[0].state, "inner", entry.runs[0].state))
            for x in jax.tree.leaves(tree)
        )
        rows.setdefault(entry.name[0], {})[entry.name[1]] = {
            "losses": losses,
            "loss": statistics.fmean(losses),
            "spread": statistics.stdev(losses),
            "bytes": entry.runs[0].state_bytes_per_parameter,
            "share": codes / moments,
            "steps": entry.runs[0].steps,
            "curves": [run.losses for run in entry.runs],
        }
    for row in rows.values():
        wide, eight = row["float32"], row["8 bits"]
        row["difference"] = eight["loss"] - wide["loss"]
        row["noise"] = np.hypot(wide["spread"], eight["spread"]) / 2**0.5
    return rows


def draw(races, path):
    """Both losses of each optimizer above, and below what 8 bits change, within the spread of float32."""
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        grid = figure.subplots(2, 2, sharex="col", height_ratios=(2, 1))
        for (name, rows), (above, below) in zip(races.items(), grid.T, strict=True):
            for optimizer, row in rows.items():
                wide, eight = (np.array(row[kind]["curves"]) for kind in ("float32", "8 bits"))
                steps, color = row["float32"]["steps"], OPTIMIZERS[optimizer].color
                above.plot(steps, wide.mean(0), color=color, alpha=0.35, lw=6, label=f"{optimizer}, float32")
                above.plot(steps, eight.mean(0), color=color, ls="--", label=f"{optimizer}, 8 bits")
                spread = wide.std(0, ddof=1)
                below.fill_between(steps, -spread, spread, color=color, alpha=0.15, lw=0)
                below.plot(steps, (eight - wide).mean(0), color=color, ls="--")
            above.set(title=name, yscale=PlainLog() if name == "digits" else "linear")
            below.set(xlabel="steps")
            above.grid()
            below.grid()
        grid[0, 0].set(ylabel="validation loss (nats)")
        grid[1, 0].set(ylabel="8 bits - float32\n(shaded: spread)")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
        figure.savefig(path, dpi=130)


def race_tables(found):
    """Of the races of all tasks."""
    heads = ("final validation loss", "float32", "8 bits", "difference", "over noise", "in 8 bits", "bytes")
    lines = [
        (
            f"{name}, {optimizer}",
            *(f"{row[kind]['loss']:.4f} ± {row[kind]['spread']:.4f}" for kind in ("float32", "8 bits")),
            f"{row['difference']:+.4f}",
            f"{row['difference'] / row['noise']:+.2f}",
            f"{100 * row['8 bits']['share']:.1f} %",
            f"{row['float32']['bytes']:.2f} / {row['8 bits']['bytes']:.2f}",
        )
        for name, rows in found.items()
        for optimizer, row in rows.items()
    ]
    yield f"{SEEDS} seeds", heads, lines
