"""Moments in 8-bit codes: what they save, what they cost, and whether training notices.

    python benchmarks/state.py [costs] [steps] [peers] [races]

Prints and writes to `benchmarks/results/state.json`, the parts that are named, or all four:

costs: of an update whose gradients and state are donated, bytes of state, of temporaries and of donated
arrays that are not reused, for each parameter; seconds to trace and to compile; milliseconds, and the median
ratio to the bare update in interleaved rounds. Then where the time goes: with float32 in place of each codec,
and nanoseconds a number of each step by itself, slab by slab in one program.
steps: seconds to trace and compile a whole training step of GPT-2 small (`benchmarks/state_step.py`).
peers: 8-bit AdamW of torchao and bitsandbytes on the same machine, as far as they are installed and run
there: bytes, second moments after a fall of the gradients, max |update| (`benchmarks/state_peers.py`).
races: final validation losses of three seeds, float32 and 8 bits at the same learning rates, those of
`optimorph race`; all leaves of two axes and more are in 8 bits. Draws `benchmarks/results/state.png`.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from float32 import Float32
from optimizers import gpt
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from state_peers import peer_tables, peers
from state_races import TASKS, draw, race, race_tables
from state_step import step_tables, steps

import optimorph as om
from optimorph._core.rounding import noise, places
from optimorph._core.target import Target
from optimorph._storage.slabs import slab_shape
from optimorph.codecs import Nonneg8, Signed8

RESULTS = Path(__file__).parent / "results" / "state.json"
ROUNDS, COMPILES = 9, 2
LEAVES = {f"w{k}": (768, 3072) for k in range(12)}
GPT2 = gpt(768, 12) | {"embed": (50257, 768), "position_embed": (1024, 768)}
ADAMW = {
    "om.adamw": lambda: om.adamw(1e-3),
    "moments in bfloat16": lambda: om.adamw(1e-3, mu_dtype="bfloat16", nu_dtype="bfloat16"),
    "state='int8'": lambda: om.adamw(1e-3, state="int8"),
    "8 bits, elementwise, optax.adamw": lambda: om.compress_state(optax.adamw(1e-3), elementwise=True),
    "8 bits, not elementwise": lambda: om.compress_state(om.adamw(1e-3)),
}
MUON = {
    "om.muon": lambda: om.muon(0.02),
    "state='int8'": lambda: om.muon(0.02, state="int8"),
    "8 bits, all at once": lambda: om.compress_state(om.muon(0.02), {"first/*": Signed8(mapping="linear")}),
}
COSTS = {
    "12 leaves of 768 x 3072": (ADAMW, LEAVES, ROUNDS),
    "GPT-2 small": (ADAMW, GPT2, 5),
    "2 layers of GPT-2 small": (MUON, gpt(768, 2), 3),
}
ABLATIONS = {
    "float32, slab by slab": {"*": Float32()},
    "first moment in 8 bits": {"second/*": Float32()},
    "second moment in 8 bits": {"first/*": Float32()},
    "both in 8 bits": {},
}


class Side:
    """A compiled update that keeps its gradients' and its state's memory, and what is known of it."""

    def __init__(self, tx, params):
        """Compile nothing yet."""
        self.tx, self.params, self.compiled = tx, params, None
        self.held = jax.tree.map(lambda p: 0.1 * p, params), jax.jit(tx.init)(params)
        self.traced, self.compiles, self.seconds = [], [], []

    def build(self):
        """Trace and compile from scratch, timed."""
        jax.clear_caches()
        started = time.perf_counter()
        lowered = jax.jit(lambda *args: self.tx.update(*args), donate_argnums=(0, 1)).lower(
            *self.held, self.params
        )
        self.traced.append(time.perf_counter() - started)
        self.compiled = lowered.compile()
        self.compiles.append(time.perf_counter() - started - self.traced[-1])

    def run(self):
        """One update, timed; its updates are the next gradients."""
        started = time.perf_counter()
        self.held = jax.block_until_ready(self.compiled(*self.held, self.params))
        self.seconds.append(time.perf_counter() - started)

    def row(self, bare):
        """The figures, beside those of the bare update."""
        gradients, state = (sum(x.nbytes for x in jax.tree.leaves(held)) for held in self.held)
        memory, size = self.compiled.memory_analysis(), sum(x.size for x in jax.tree.leaves(self.params))
        ratios = [mine / other for mine, other in zip(self.seconds[1:], bare.seconds[1:], strict=True)]
        return {
            "parameters": size,
            "state": state / size,
            "temporaries": memory.temp_size_in_bytes / size,
            "not_reused": (gradients + state - memory.alias_size_in_bytes) / size,
            "trace_seconds": statistics.median(self.traced),
            "compile_seconds": statistics.median(self.compiles),
            "ms": 1e3 * statistics.median(self.seconds[1:]),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }


def cost(ways, shapes, rounds):
    """Name → figures; the first is what the others are set against."""
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [jax.random.normal(key, shape) for key, shape in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(structure, drawn)
    sides = {name: Side(make(), params) for name, make in ways.items()}
    for turn, times in (("build", COMPILES), ("run", rounds + 1)):
        for _ in range(times):  # interleaved: the machine's noise meets all
            for side in sides.values():
                getattr(side, turn)()
    bare = next(iter(sides.values()))
    return {name: side.row(bare) for name, side in sides.items()}


def apart():
    """Nanoseconds a number of each step of a compressed update: all slabs in one program, their sum kept."""
    shape, key = LEAVES["w0"], jax.random.key(0)
    slab = slab_shape(shape, Target("cpu"))
    place, first, second = places(slab), Signed8(), Nonneg8()
    x = jax.random.normal(key, shape)
    held = {first: first.encode(x), second: second.encode(x**2, key)}
    cases = {
        "nothing": (lambda x: x, x),
        "decode the first moment": (first.decode, held[first]),
        "decode the second moment": (second.decode, held[second]),
        "encode the first moment": (first.encode, x),
        "encode the second moment": (lambda x: second.encode(x, key, place), x**2),
        "of which noise": (lambda x: noise(key, place + (x > 9)), x),
    }

    def run(f, arrays):
        slabs = jax.tree.map(lambda x: x.reshape(-1, slab[0], x.shape[-1]), arrays)

        def one(total, some):
            return total + sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(f(some))), None

        return jax.lax.scan(one, 0.0, slabs)[0]

    programs = {name: jax.jit(functools.partial(run, f)).lower(x).compile() for name, (f, x) in cases.items()}
    seconds = {name: [] for name in cases}
    for _ in range(10 * ROUNDS):
        for name, program in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(program(cases[name][1]))
            seconds[name].append(time.perf_counter() - started)
    nothing, *ns = (1e9 * statistics.median(some) / x.size for some in seconds.values())
    return {name: each - nothing for name, each in zip(list(cases)[1:], ns, strict=True)}


def show(console, title, heads, rows):
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for k, head in enumerate(heads):
        table.add_column(head, justify="right" if k else "left")
    for row in rows:
        table.add_row(*(each if isinstance(each, str) else f"{each:,.3g}" for each in row))
    console.print(table)


def cost_tables(found):
    """Of what `costs` finds."""
    heads = ("bytes a parameter", "state", "temporaries", "not reused", "trace s", "compile s", "ms", "ratio")
    keys = ("state", "temporaries", "not_reused", "trace_seconds", "compile_seconds", "ms", "ratio")
    for name, rows in found["updates"].items():
        lines = [(way, *(f"{row[k]:.{1 if k == 'ms' else 2}f}" for k in keys)) for way, row in rows.items()]
        yield name, heads, lines
    yield "a step by itself", ("", "ns a number"), found["steps"].items()


def costs(console):
    def eight(rules):
        return lambda: om.compress_state(om.adamw(1e-3), rules, elementwise=True)

    parts = {"om.adamw": ADAMW["om.adamw"]} | {name: eight(rules) for name, rules in ABLATIONS.items()}
    cases = {"12 leaves, where the time goes": (parts, LEAVES, ROUNDS)} | COSTS
    updates = {name: cost(*case) for name, case in track(cases.items(), total=len(cases), console=console)}
    return {"updates": updates, "steps": apart()}


def races(console):
    found = {name: race(module.task()) for name, module in TASKS.items()}
    draw(found, RESULTS.with_suffix(".png"))
    return found


PARTS = {
    "costs": (costs, cost_tables),
    "steps": (steps, step_tables),
    "peers": (peers, peer_tables),
    "races": (races, race_tables),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all without")
    named = parser.parse_args().parts
    if unknown := set(named) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    console = Console(width=120)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in named or PARTS:
        measure, tables = PARTS[name]
        started = time.perf_counter()
        found[name] = measure(console)
        for table in tables(found[name]):
            show(console, *table)
        found.setdefault("about", {})[name] = {
            "date": datetime.date.today().isoformat(),
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
            "seconds": time.perf_counter() - started,
            "versions": {
                package: importlib.metadata.version(package)
                for package in ("jax", "jaxlib", "optax", "optimorph", "torch", "torchao", "bitsandbytes")
                if importlib.util.find_spec(package) is not None
            },
        }
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
