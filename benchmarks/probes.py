"""What it costs to watch: an update with probes around it beside the bare one, in one run.

    python benchmarks/probes.py

For AdamW on two layers of GPT-2 small, prints and writes to `benchmarks/results/probes.json`: milliseconds of
the bare update; of one in which a probe looks and of one in which it does not (medians of interleaved
rounds); what a look costs, in bare updates, and at the probe's period as a share of them. Spectra by products
("spectral_norm", "stable_rank") and by decomposition (all of them) are rows of their own.
"""

import datetime
import importlib.metadata
import json
import os
import statistics
import time
from pathlib import Path

import jax
from optimizers import GPT2
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optimorph as om
from optimorph import probes

ROUNDS = 15
RESULTS = Path(__file__).parent / "results" / "probes.json"
CASES = {
    "cheap": (probes.CHEAP, 25),
    "spectra by products": (("update_spectral_norm", "update_stable_rank"), 1000),
    "spectra by decomposition": (probes.SPECTRAL, 10_000),
}
"""Name → metrics, and the period at which they are meant to be taken."""


def drawn(shapes):
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(key, shape) for key, shape in zip(keys, leaves, strict=True)]
    )


class Step:
    """A compiled update, and what its calls took; with a state whose count decides whether probes look."""

    def __init__(self, transform, params, count=None):
        """Compile one update."""
        state = transform.init(params)
        if count is not None:
            state = state._replace(probe_count=jax.numpy.int32(count))
        self.arguments = (params, state, params)
        self.compiled = jax.jit(transform.update).lower(*self.arguments).compile()
        self.seconds = []

    def run(self):
        """One call, timed."""
        started = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.arguments))
        self.seconds.append(time.perf_counter() - started)

    @property
    def milliseconds(self):
        """The median, without the first."""
        return 1e3 * statistics.median(self.seconds[1:])


def measure(metrics, every):
    params, tx = drawn(GPT2), om.adamw(1e-3)
    watched = probes.probe(tx, metrics, every)
    bare, looking, waiting = Step(tx, params), Step(watched, params, 0), Step(watched, params, 1)
    for _ in range(ROUNDS if every < 10_000 else 4):
        for step in (bare, looking, waiting):
            step.run()
    ms = [step.milliseconds for step in (bare, looking, waiting)]
    look = ms[1] / ms[0] - 1
    return {"every": every, "ms": ms, "look": look, "share": look / every}


def main():
    console = Console(width=110)
    rows = {name: measure(*case) for name, case in track(CASES.items(), console=console)}
    table = Table(
        "AdamW, two layers of GPT-2", "every", "bare ms", "looking ms", "waiting ms", "a look", "share"
    )
    for name, row in rows.items():
        table.add_row(
            name,
            str(row["every"]),
            *(f"{ms:.1f}" for ms in row["ms"]),
            f"{row['look']:.1f} updates",
            f"{100 * row['share']:.1f} %",
        )
    console.print(table)
    about = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optimorph")},
    }
    RESULTS.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
