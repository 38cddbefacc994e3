"""The polar factor beside its alternatives: time, accuracy, and the share of the machine's own peak.

    python benchmarks/polar.py [--out FILE]

At the same number of steps with the same coefficients: ours (the iteration of fewer operations, and the
standard one; in float32 on CPUs, in float16 on GPUs), optax's, and where they are installed the same written
out in PyTorch, and gram-newton-schulz's, with its kernels on GPUs. Milliseconds are medians of interleaved
rounds; the ratio is optax's over ours. Peak is the fastest large product of two matrices seen in the same
run. Written to `benchmarks/results/polar.json`, or to FILE.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib._muon import orthogonalize_via_newton_schulz
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from optimorph.linalg import Exact, NewtonSchulz
from optimorph.linalg._newton_schulz import operations

ROUNDS = 5
RESULTS = Path(__file__).parent / "results" / "polar.json"
ACCELERATED = jax.default_backend() != "cpu"
HALF_ON_CPUS = 5e8
"""Multiplications beyond which gram-newton-schulz, which is float16 always, would take minutes on a CPU."""

CASES = {  # name → (matrices, n, m); the large ones only where there is an accelerator
    "GPT-2 small: attention": (4, 768, 768),
    "GPT-2 small: perceptron": (2, 768, 3072),
    "ViT-B: fused qkv, whole": (2, 768, 2304),
    "convolutions 3 x 3": (4, 256, 2304),
    "wide, 1:8": (2, 512, 4096),
    "many small": (400, 32, 32),
    "one huge row": (1, 1, 65536),
}
LARGE = {
    "Llama-3-8B: query, out": (2, 4096, 4096),
    "Llama-3-8B: key, value": (2, 1024, 4096),
    "Llama-3-8B: perceptron": (3, 4096, 14336),
}


def spectra(n):
    """Singular values by which accuracy is judged."""
    rng = np.random.default_rng(0)
    return {
        "gaussian": None,
        "uniform": np.linspace(0.01, 1, n),
        "power law": np.arange(1, n + 1.0) ** -1,
        "exponential": np.exp(-8.0 * np.arange(n) / n),
        "heavy tail": np.abs(rng.standard_cauchy(n)),
    }


def accuracy(polar, n=128, m=256):
    """Worst cosine with the true factor, and worst |σ - 1| of the larger half, over the spectra."""
    rng = np.random.default_rng(1)
    u, _ = np.linalg.qr(rng.standard_normal((n, n)))
    v, _ = np.linalg.qr(rng.standard_normal((m, n)))
    cosines, errors = [], []
    for values in spectra(n).values():
        g = rng.standard_normal((n, m)) if values is None else (u * values) @ v.T
        g = jnp.asarray(g, jnp.float32)
        found, true = np.asarray(polar(g), np.float64), np.asarray(Exact()(g), np.float64)
        cosines.append(float(np.sum(found * true) / np.linalg.norm(found) / np.linalg.norm(true)))
        errors.append(float(np.abs(np.linalg.svd(found, compute_uv=False)[: n // 2] - 1).max()))
    return {"cosine": min(cosines), "error": max(errors)}


def optax_polar(rows):
    coefficients = jnp.asarray(rows, jnp.float32)

    def one(x):
        return orthogonalize_via_newton_schulz(x, coefficients)

    return lambda x: jax.vmap(one)(x) if x.ndim == 3 else one(x)


def torch_sides():
    """PyTorch's own functions on stacks, each timed as it is: eagerly."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    rows = NewtonSchulz().table.rows
    sides = {}

    def plain(x):
        x = x / torch.linalg.matrix_norm(x, keepdim=True)
        for a, b, c in rows:
            r = x @ x.mT
            x = a * x + (b * r + c * r @ r) @ x
        return x

    sides["torch, written out in float32"] = plain
    if importlib.util.find_spec("gram_newton_schulz") is not None:
        from gram_newton_schulz import GramNewtonSchulz

        sides["gram-newton-schulz"] = GramNewtonSchulz(
            ns_use_kernels=ACCELERATED,
            ns_coefficients=[list(row) for row in rows],
            gram_newton_schulz_reset_iterations=[2],
            compile_kwargs=None,
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def wrapped(f):
        def run(x):
            with torch.no_grad():
                out = f(x)
            if device == "cuda":
                torch.cuda.synchronize()
            return out

        return run

    return {
        name: (wrapped(f), lambda x: torch.as_tensor(np.array(x), device=device)) for name, f in sides.items()
    }


def peak(size=2048):
    """Multiplications per second of a large product."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((size, size)), jnp.float32)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision="highest")).lower(x).compile()
    return size**3 / min(timed(product, x) for _ in range(ROUNDS))


def timed(f, *arguments):
    started = time.perf_counter()
    jax.block_until_ready(f(*arguments))
    return time.perf_counter() - started


def measure(shape):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    auto = NewtonSchulz()
    rows = auto.table.rows
    sides = {
        "optimorph": auto,
        "optimorph, standard": NewtonSchulz(iteration="standard"),
        "optax": optax_polar(rows),
    }
    calls = {name: (jax.jit(f).lower(x).compile(), x) for name, f in sides.items()}
    light = ACCELERATED or shape[0] * operations(shape, rows, None, False) < HALF_ON_CPUS
    calls |= {
        name: (f, convert(x))
        for name, (f, convert) in torch_sides().items()
        if light or name != "gram-newton-schulz"
    }
    seconds = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):  # interleaved: the machine's noise meets all
        for name, (f, argument) in calls.items():
            seconds[name].append(timed(f, argument))
    counts = {
        name: shape[0]
        * min(operations(shape, rows, None, False), operations(shape, rows, auto.table.restarts(), False))
        if name == "optimorph"
        else shape[0] * operations(shape, rows, None, False)
        for name in ("optimorph", "optax")
    }
    return {
        "ms": {name: 1e3 * statistics.median(times[1:]) for name, times in seconds.items()},
        "multiplications": counts["optimorph"],
        "temporary_bytes_per_byte": calls["optimorph"][0].memory_analysis().temp_size_in_bytes / x.nbytes,
    }


def table(rows, top):
    names = list(dict.fromkeys(name for row in rows.values() for name in row["ms"]))
    out = Table(title="milliseconds", box=box.SIMPLE_HEAD, title_justify="left")
    for head in ("stack", *names, "optax / ours", "of peak", "temporaries"):
        out.add_column(head, justify="left" if head == "stack" else "right")
    for name, row in rows.items():
        ms = row["ms"]
        share = row["multiplications"] / (1e-3 * ms["optimorph"]) / top
        cells = [f"{ms[side]:.1f}" if side in ms else "-" for side in names]
        ratio = f"{ms['optax'] / ms['optimorph']:.2f}"
        out.add_row(name, *cells, ratio, f"{share:.0%}", f"{row['temporary_bytes_per_byte']:.1f}x")
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args().out
    console = Console(width=150)
    top = peak()
    cases = CASES | (LARGE if ACCELERATED else {})
    rows = {
        f"{name}, {shape[0]} of {shape[1]} x {shape[2]}": measure(shape)
        for name, shape in track(list(cases.items()), console=console)
    }
    coefficients = NewtonSchulz().table.rows
    accurate = {
        "optimorph": accuracy(NewtonSchulz(dtype=jnp.float32)),
        "optimorph, standard": accuracy(NewtonSchulz(dtype=jnp.float32, iteration="standard")),
        "optimorph, float16": accuracy(NewtonSchulz(dtype=jnp.float16)),
        "optimorph, bfloat16": accuracy(NewtonSchulz(dtype=jnp.bfloat16)),
        "optax": accuracy(optax_polar(coefficients)),
    }
    about = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "rounds": ROUNDS,
        "peak_gigaflops": 2 * top / 1e9,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "jaxlib", "optax", "optimorph", "torch", "gram-newton-schulz")
            if importlib.util.find_spec(name.replace("-", "_")) is not None
        },
    }
    console.print(table(rows, top))
    for name, found in accurate.items():
        console.print(f"{name:<22} worst cosine {found['cosine']:.5f}, worst |1 - σ| {found['error']:.4f}")
    console.print(about)
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(about | {"rows": rows, "accuracy": accurate}, indent=1) + "\n")


if __name__ == "__main__":
    main()
