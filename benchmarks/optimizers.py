"""AdamW composed from atoms and Muon beside optax's, in one run.

    python benchmarks/optimizers.py [words of the rows to measure again ...]

Prints and writes to `benchmarks/results/optimizers.json`: milliseconds of one jitted update (median of
interleaved rounds, and the ratio of the medians), seconds to compile, bytes of state per parameter, and of
the compiled program the operations and the size. Ratios above 1: optax takes longer, or Muon in rows "beside
muon". AdamW moves 28 bytes a parameter (gradient, weight, two averages, three of them and the update
written), which are set against what a copy moves per second; PyTorch's fused AdamW stands beside it where
PyTorch is installed.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optimorph as om

ROUNDS = 9
COMPILES = 2
RESULTS = Path(__file__).parent / "results" / "optimizers.json"


def gpt(width, layers):
    """The shapes of a GPT's layers."""
    layer = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    layer |= {"up": (width, 4 * width), "down": (4 * width, width), "scale": (width,)}
    return {f"layer{k}": layer for k in range(layers)}


def vit(width, layers):
    """The shapes of a vision transformer's layers, query, key and value in one."""
    layer = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    return {f"layer{k}": layer for k in range(layers)}


GPT2 = gpt(768, 2)
CONVOLUTIONS = {
    f"stage{k}_conv{j}": (9 * inputs, outputs)
    for k, outputs in enumerate((64, 128, 256))
    for j, inputs in enumerate((outputs // 2, outputs, outputs))
}
"""Of 3 x 3 windows, as the matrices that they are."""
SMALL = {f"w{k}": (32, 32) for k in range(400)}
MODELS = {
    "adamw: GPT-2 small, 2 layers": ("adamw", GPT2),
    "adamw: 400 leaves of 32 x 32": ("adamw", SMALL),
    "adamw: 1,000 leaves of 32": ("adamw", {f"b{k}": (32,) for k in range(1000)}),
    "ademamix: GPT-2 small, 2 layers": ("ademamix", GPT2),
    "ademamix: 400 leaves of 32 x 32": ("ademamix", SMALL),
    "mars_adamw / optax.adamw: GPT-2 small, 2 layers": ("mars_adamw", GPT2),
    "mars_adamw / optax.adamw: 400 leaves of 32 x 32": ("mars_adamw", SMALL),
    "lion: GPT-2 small, 2 layers": ("lion", GPT2),
    "laprop / optax.adamw: GPT-2 small, 2 layers": ("laprop", GPT2),
    "adamh / optax.adamw: GPT-2 small, 2 layers": ("adamh", GPT2),
    "adamw, logits clipped / optax.adamw: GPT-2 small, 2 layers": ("qk_clip", GPT2),
    "muon: GPT-2 small, 2 layers": ("muon", GPT2),
    "muon: 4 leaves of 768 x 3072": ("muon", {f"w{k}": (768, 3072) for k in range(4)}),
    "muon: 4 leaves of 512 x 4096": ("muon", {f"w{k}": (512, 4096) for k in range(4)}),
    "muon: ViT-B, 2 layers": ("muon", vit(768, 2)),
    "muon: 9 convolutions of 3 x 3": ("muon", CONVOLUTIONS),
    "muon: GPT, 4 layers of width 256": ("muon", gpt(256, 4)),
    "muon: 400 leaves of 32 x 32": ("muon", SMALL),
}
BESIDE_MUON = ("muonh", "normuon", "adamuon", "muon2", "scion")
MODELS |= {f"{name} beside muon: GPT-2 small, 2 layers": (name, GPT2) for name in BESIDE_MUON}
"""Name → (which pair, shapes)."""


def matrices(params):
    """What optax must be told: which leaves are matrices (two axes; the embedding is none)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: (
            optax.contrib.MuonDimensionNumbers(0, 1)
            if x.ndim == 2 and "embed" not in jax.tree_util.keystr(path)
            else None
        ),
        params,
    )


def clipped():
    """AdamW with the logits of twelve heads in every layer, the same at every step."""
    tx = om.chain(om.adamw(1e-3), om.clip_attention_logits(axes={"*": "i(12o)"}))

    def update(updates, state, params):
        logits = {layer: jnp.linspace(50.0, 150.0, 12) for layer in params}
        return tx.update(updates, state, params, attention_logits=logits)

    return optax.GradientTransformation(tx.init, update)


PAIRS = {
    "adamw": (lambda: om.adamw(1e-3), lambda: optax.adamw(1e-3)),
    "ademamix": (lambda: om.ademamix(1e-3), lambda: optax.contrib.ademamix(1e-3)),
    "mars_adamw": (lambda: om.mars_adamw(1e-3), lambda: optax.adamw(1e-3)),
    "lion": (lambda: om.lion(1e-4), lambda: optax.lion(1e-4)),
    "laprop": (lambda: om.laprop(1e-3), lambda: optax.adamw(1e-3)),
    "adamh": (lambda: om.adamh(1e-3), lambda: optax.adamw(1e-3)),
    "qk_clip": (clipped, lambda: optax.adamw(1e-3)),
    "muon": (
        lambda: om.muon(0.02, orthogonalizer=om.linalg.NewtonSchulz("jordan"), scale="keller"),
        lambda: optax.contrib.muon(0.02, muon_weight_dimension_numbers=matrices),
    ),
}
PAIRS |= {name: (lambda name=name: getattr(om, name)(0.02), lambda: om.muon(0.02)) for name in BESIDE_MUON}
"""Both Muons take five steps of the same quintic, optax's default. Other optimizers of matrices stand
beside this library's Muon."""


class Side:
    """One library's compiled update and what is known of it."""

    def __init__(self, transform, params, gradients):
        """Compile one update."""
        self.transform, state = transform, transform.init(params)
        self.arguments = (gradients, state, params)
        self.compile_times = []
        self.compiled = self.compile()
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        self.hlo_bytes = len(self.compiled.as_text())
        self.flops = self.compiled.cost_analysis().get("flops", float("nan"))
        self.seconds = []

    def compile(self):
        """Trace and compile from scratch, timed."""
        started = time.perf_counter()
        compiled = (
            jax.jit(lambda *arguments: self.transform.update(*arguments)).lower(*self.arguments).compile()
        )
        self.compile_times.append(time.perf_counter() - started)
        return compiled

    def run(self):
        """One update, timed."""
        started = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.arguments))
        self.seconds.append(time.perf_counter() - started)

    @property
    def milliseconds(self):
        """The median of all rounds."""
        return 1e3 * statistics.median(self.seconds)


def copy_bandwidth(size=2**25):
    """Bytes read and written per second by a copy."""
    x = jnp.zeros(size)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()  # in place: no memory is asked for
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        x = jax.block_until_ready(copy(x))
        times.append(time.perf_counter() - started)
    return 2 * x.nbytes / min(times)


def torch_ms(kind, shapes):
    """Milliseconds of PyTorch's own optimizer on the same leaves, None where there is none."""
    if kind not in ("adamw", "muon") or importlib.util.find_spec("torch") is None:
        return None
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    leaves = jax.tree.leaves(shapes, is_leaf=lambda s: isinstance(s, tuple))
    if kind == "muon" and device == "cpu" and sum(map(math.prod, leaves)) > 1e6:
        return None  # in bfloat16 it would take minutes
    leaves = [shape for shape in leaves if kind == "adamw" or len(shape) == 2]  # its Muon takes no others
    params = [torch.nn.Parameter(torch.ones(shape, device=device)) for shape in leaves]
    for param in params:
        param.grad = torch.randn_like(param)
    if kind == "adamw":
        optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
    else:
        optimizer = torch.optim.Muon(params, lr=0.02)
    times = []
    for _ in range(ROUNDS // 3):
        started = time.perf_counter()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def measure(kind, shapes):
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s), jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )
    gradients = jax.tree.map(lambda p: 0.1 * p[::-1], params)
    ours, theirs = (Side(make(), params, gradients) for make in PAIRS[kind])
    for _ in range(COMPILES):
        ours.compile()
        theirs.compile()
    for _ in range(ROUNDS):  # interleaved: the machine's noise meets both
        ours.run()
        theirs.run()
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {
        "parameters": size,
        "ms": [ours.milliseconds, theirs.milliseconds],
        "compile_seconds": [statistics.median(side.compile_times) for side in (ours, theirs)],
        "state_bytes_per_parameter": [ours.state_bytes / size, theirs.state_bytes / size],
        "gigaflops": [ours.flops / 1e9, theirs.flops / 1e9],
        "hlo_kilobytes": [ours.hlo_bytes / 1e3, theirs.hlo_bytes / 1e3],
        "torch_ms": torch_ms(kind, shapes),
        "gigabytes_per_second": 28e-9 * size / (1e-3 * ours.milliseconds) if kind == "adamw" else None,
    }


def table(rows):
    out = Table(
        title="optimorph / optax; ratio: optax over optimorph", box=box.SIMPLE_HEAD, title_justify="left"
    )
    heads = (
        "update of",
        "ms",
        "ratio",
        "compile s",
        "ratio",
        "state\nB/param",
        "GFLOP",
        "HLO kB",
        "torch ms",
        "GB/s",
    )
    for head in heads:
        out.add_column(head, justify="left" if head == "update of" else "right")

    def pair(values, digits):
        return " / ".join(f"{x:.{digits}f}" for x in values)

    for name, row in rows.items():
        ms, seconds = row["ms"], row["compile_seconds"]
        out.add_row(
            name,
            pair(ms, 2),
            f"{ms[1] / ms[0]:.2f}",
            pair(seconds, 2),
            f"{seconds[1] / seconds[0]:.2f}",
            pair(row["state_bytes_per_parameter"], 2),
            pair(row["gigaflops"], 2),
            pair(row["hlo_kilobytes"], 0),
            "-" if row["torch_ms"] is None else f"{row['torch_ms']:.2f}",
            "-" if row["gigabytes_per_second"] is None else f"{row['gigabytes_per_second']:.1f}",
        )
    return out


def main():
    console = Console(width=150)
    words = sys.argv[1:]
    cases = {name: case for name, case in MODELS.items() if not words or any(word in name for word in words)}
    rows = {name: measure(*case) for name, case in track(cases.items(), total=len(cases), console=console)}
    about = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "rounds": ROUNDS,
        "copy_gigabytes_per_second": copy_bandwidth() / 1e9,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "jaxlib", "optax", "optimorph", "torch")
            if importlib.util.find_spec(name) is not None
        },
    }
    console.print(table(rows))
    console.print(about)
    RESULTS.parent.mkdir(exist_ok=True)
    kept = json.loads(RESULTS.read_text())["rows"] if words else {}
    RESULTS.write_text(json.dumps(about | {"rows": kept | rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
