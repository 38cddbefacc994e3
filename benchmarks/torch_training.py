"""A training in PyTorch and the same in JAX: weights, batches and optimizers alike, losses side by side.

    pip install torch && python benchmarks/torch_training.py

The model is the GPT of `optimorph race`, of nanoGPT's size for CPUs (4 layers, width 128, context 64, batch
12), written once in Flax and once in PyTorch. Both begin from the same weights and see the same batches. The
losses of all steps are written to `benchmarks/results/torch_training.json`.

AdamW is compared in float64, where JAX computes the softmax of attention in float32, and in float32.
PyTorch's Muon iterates in bfloat16 whatever the weights are, and so does ours here. `noise` is how far the
losses of JAX alone move when one weight is changed by a rounding error of float32: differences of that size
are not the optimizer's.
"""

import datetime
import importlib.metadata
import itertools
import json
import os
import re
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import optimorph as om  # noqa: E402
from optimorph._core.paths import leaf_paths  # noqa: E402
from optimorph._racing.tasks import text  # noqa: E402

STEPS, RATE, MUON_RATE, DECAY, BETAS = 200, 1e-3, 0.02, 0.1, (0.9, 0.95)
RESULTS = Path(__file__).parent / "results" / "torch_training.json"
JORDAN = om.linalg.NewtonSchulz("jordan", dtype=jnp.bfloat16)


def our_adamw():
    return om.adamw(RATE, *BETAS, weight_decay=DECAY)


def our_muon():
    return om.muon(MUON_RATE, weight_decay=DECAY, orthogonalizer=JORDAN, scale="keller", others=our_adamw())


def their_adamw(params):
    return [torch.optim.AdamW(params.values(), lr=RATE, betas=BETAS, weight_decay=DECAY)]


def their_muon(params):
    hidden = {name: p for name, p in params.items() if name.startswith("blocks/") and p.ndim == 2}
    others = {name: p for name, p in params.items() if name not in hidden}
    return [torch.optim.Muon(hidden.values(), lr=MUON_RATE, weight_decay=DECAY), *their_adamw(others)]


CASES = {
    "AdamW, float32": (our_adamw, their_adamw, np.float32),
    "Muon, float32": (our_muon, their_muon, np.float32),
    "AdamW, float64": (our_adamw, their_adamw, np.float64),
}


def train_jax(make, task, params, batches):
    """The loss of every step."""
    tx = make()

    @jax.jit
    def step(params, state, batch):
        loss, gradients = jax.value_and_grad(task.loss)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for batch in batches:
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    return losses


def train_torch(make, params, batches):
    """The loss of every step. `params` are by path, kernels as (outputs, inputs)."""
    optimizers, losses = make(params), []
    for tokens, following in batches:
        tokens, following = (torch.tensor(x, dtype=torch.long) for x in (tokens, following))
        loss = F.cross_entropy(logits(params, tokens).flatten(0, 1), following.flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


def logits(p, tokens):
    """`text.GPT` in PyTorch."""
    batch, context = tokens.shape
    x = p["embed/embedding"][tokens] + p["position_embed/embedding"]
    for k in range(text.LAYERS):
        block = f"blocks/{k}"
        y = norm(p, f"{block}/norm1", x)
        q, key, value = (
            F.linear(y, p[f"{block}/attention/{name}/kernel"])
            .reshape(batch, context, -1, text.HEAD)
            .transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = F.scaled_dot_product_attention(q, key, value, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(x.shape)
        x = x + F.linear(mixed, p[f"{block}/attention/out/kernel"])
        up = F.linear(norm(p, f"{block}/norm2", x), p[f"{block}/up/kernel"])
        x = x + F.linear(F.gelu(up, approximate="tanh"), p[f"{block}/down/kernel"])
    return F.linear(norm(p, "norm", x), p["head/kernel"])


def norm(p, name, x):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}/scale"], p[f"{name}/bias"], eps=1e-6)


def to_torch(params):
    arrays = zip(leaf_paths(params), jax.tree.leaves(params), strict=True)
    arrays = {name: np.asarray(x).T if name.endswith("kernel") else np.asarray(x) for name, x in arrays}
    return {name: torch.nn.Parameter(torch.tensor(x)) for name, x in arrays.items()}


def nudged(params):
    """The parameters with one weight changed by a rounding error of float32."""
    leaves, tree = jax.tree.flatten(params)
    leaves[0] = leaves[0].at[0, 0].multiply(1 + 2**-23)
    return jax.tree.unflatten(tree, leaves)


def compare(ours, theirs, dtype):
    task = text.task()
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), task.init(0))
    batches = list(itertools.islice(task.batches(0), STEPS))
    jax_losses = train_jax(ours, task, params, batches)
    torch_losses = train_torch(theirs, to_torch(params), batches)
    noise = train_jax(ours, task, nudged(params), batches)
    apart, by_noise = (np.abs(np.subtract(jax_losses, other)) for other in (torch_losses, noise))
    return {
        "first_step": float(apart[0]),
        "largest_in_20_steps": float(apart[:20].max()),
        "largest": float(apart.max()),
        "noise_in_20_steps": float(by_noise[:20].max()),
        "noise": float(by_noise.max()),
        "last_jax": float(np.mean(jax_losses[-20:])),
        "last_torch": float(np.mean(torch_losses[-20:])),
        "jax": jax_losses,
        "torch": torch_losses,
    }


def main():
    torch.set_num_threads(1)
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "flax", "torch")
    }
    found = {
        "command": "python benchmarks/torch_training.py",
        "date": datetime.date.today().isoformat(),
        "device": "cpu",
        "cores": os.cpu_count(),
        "versions": versions,
        "steps": STEPS,
        "cases": {},
    }
    table = Table(title=f"largest difference of the training loss, torch {torch.__version__}")
    for head in ("", "20 steps", f"{STEPS} steps", "noise, 20", f"noise, {STEPS}", "last 20: jax", "torch"):
        table.add_column(head, justify="right" if head else "left")
    for name, arguments in CASES.items():
        found["cases"][name] = case = compare(*arguments)
        keys = ("largest_in_20_steps", "largest", "noise_in_20_steps", "noise")
        lasts = (f"{case[key]:.5f}" for key in ("last_jax", "last_torch"))
        table.add_row(name, *(f"{case[key]:.1e}" for key in keys), *lasts)
        text = json.dumps(found, indent=1)
        RESULTS.write_text(re.sub(r"\[[^][]*\]", lambda match: " ".join(match[0].split()), text) + "\n")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
