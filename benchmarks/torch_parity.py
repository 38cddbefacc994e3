"""Every `Equals:` line that names PyTorch, against PyTorch itself.

    pip install torch==2.14.1 && python benchmarks/torch_parity.py

The tests compare with transcriptions of PyTorch's documented algorithms in float64; this compares with its
code, 100 steps in float64 (Muon's iteration in bfloat16, which PyTorch forces), and prints the largest
difference of any weight.
"""

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import optimorph as om  # noqa: E402

STEPS = 100
JORDAN = om.linalg.NewtonSchulz("jordan", dtype=jnp.bfloat16)


def muon(scale):
    return om.muon(0.02, weight_decay=0.1, orthogonalizer=JORDAN, scale=scale, axes={"*": "oi"})


PAIRS = {
    "SGD": (om.sgd(0.1), torch.optim.SGD, {"lr": 0.1}),
    "SGD momentum L2": (
        om.sgd(0.1, 0.9, weight_decay=0.1),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    ),
    "SGD dampening": (
        om.sgd(0.1, 0.9, dampening=0.3),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    ),
    "SGD Nesterov": (
        om.sgd(0.1, 0.9, True),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    ),
    "Adagrad L2": (
        om.adagrad(0.1, 0.2, 1e-10, eps_in_sqrt=False, weight_decay=0.1),
        torch.optim.Adagrad,
        {"lr": 0.1, "initial_accumulator_value": 0.2, "weight_decay": 0.1},
    ),
    "RMSprop L2": (
        om.rmsprop(0.01, 0.99, 1e-8, eps_in_sqrt=False, weight_decay=0.1),
        torch.optim.RMSprop,
        {"lr": 0.01, "weight_decay": 0.1},
    ),
    "RMSprop centered momentum": (
        om.rmsprop(0.01, 0.9, 1e-3, eps_in_sqrt=False, centered=True, momentum=0.9),
        torch.optim.RMSprop,
        {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "centered": True, "momentum": 0.9},
    ),
    "Adam L2": (om.adam(0.01, weight_decay=0.1), torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW": (om.adamw(0.01, weight_decay=0.1), torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "Muon original": (muon("keller"), torch.optim.Muon, {"lr": 0.02, "adjust_lr_fn": "original"}),
    "Muon match_rms_adamw": (
        muon("adamw_rms"),
        torch.optim.Muon,
        {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw"},
    ),
}


def deviation(transform, kind, arguments):
    rng = np.random.default_rng(0)
    start = rng.standard_normal((6, 4))
    ours, theirs = {"w": jnp.asarray(start)}, torch.nn.Parameter(torch.tensor(start))
    state, optimizer = transform.init(ours), kind([theirs], **arguments)
    update, worst = jax.jit(transform.update), 0.0
    for _ in range(STEPS):
        gradient = rng.standard_normal(start.shape)
        updates, state = update({"w": jnp.asarray(gradient)}, state, ours)
        ours = optax.apply_updates(ours, updates)
        theirs.grad = torch.tensor(gradient)
        optimizer.step()
        worst = max(worst, float(np.max(np.abs(np.asarray(ours["w"]) - theirs.detach().numpy()))))
    return worst


def main():
    table = Table(title=f"largest difference of a weight in {STEPS} steps, torch {torch.__version__}")
    table.add_column("torch.optim")
    table.add_column("difference", justify="right")
    for name, (transform, kind, arguments) in PAIRS.items():
        table.add_row(name, f"{deviation(transform, kind, arguments):.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
