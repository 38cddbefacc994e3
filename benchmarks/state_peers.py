"""8-bit AdamW of torchao and bitsandbytes beside `compress_state`, on the CPU: a part of `state.py`.

Unit gradients, then half of every block at 1 % for 3,800 steps: what the second moment of that half is, over
what it should be. And max |update| at a learning rate of 1 for three kinds of gradients, of 1,000 steps each.

The code book of both libraries has a zero. bitsandbytes's kernel for CPUs looks codes up in a coarse table,
which makes 1.6e-5 of the block's largest of all that is below that, and so never arrives at it.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np

import optimorph as om
from optimorph._core.moments import moments_of
from optimorph.codecs import Encoded, Nonneg8

WHOLE = (768, 3072)
"""Of what bytes are counted."""
UNIT, FALLEN, PLACES = 2000, 3800, (8, 512)


def gradients():
    """What Adam is given, step by step: name → (steps, rows, columns)."""
    rng = np.random.default_rng(0)
    shape = (1000, *PLACES)
    normal, wild = rng.standard_normal(shape), rng.standard_normal(shape)
    fall = np.ones((UNIT + FALLEN, *PLACES))
    fall[UNIT:, :, ::2] = 0.01
    found = {"fall": fall, "sparse": normal * (rng.random(shape) < 0.05)}
    found |= {"log-normal": normal * np.exp(wild), "log-normal, squared": normal * np.exp(2 * wild)}
    return {name: x.astype(np.float32) for name, x in found.items()}


def ours(make):
    """(gradients → (max |update|, second moment)) of a transformation, and its bytes a parameter."""

    def run(gs):
        tx, params = make(), {"kernel": jnp.zeros(PLACES)}

        def step(state, g):
            updates, state = tx.update({"kernel": g}, state, params)
            return state, jnp.max(jnp.abs(updates["kernel"]))

        state, largest = jax.jit(lambda gs: jax.lax.scan(step, tx.init(params), gs))(gs)
        scales = getattr(state, "scales", None)
        moments = moments_of(getattr(state, "inner", state))
        (k,) = [k for k, (kind, _) in enumerate(moments) if kind == "second"]
        v = moments[k][1]["kernel"]
        if v.dtype == jnp.uint8:
            v = Nonneg8().decode(Encoded(v, scales[k]["kernel"]))
        return float(largest.max()), np.asarray(v, np.float64)

    tx, params = make(), {"kernel": jnp.zeros(WHOLE)}
    state = jax.eval_shape(tx.init, params)
    bytes_ = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / params["kernel"].size
    return run, bytes_


def theirs(make, second):
    """The same of a PyTorch optimizer; `second` reads its second moment."""
    import torch

    torch.set_num_threads(1)  # for 4,096 numbers the second is in the way

    def run(gs):
        weight, largest = torch.nn.Parameter(torch.zeros(PLACES)), 0.0
        optimizer = make([weight])
        for g in gs:
            weight.data.zero_()  # what stands there afterwards is the update
            weight.grad = torch.from_numpy(g)
            optimizer.step()
            largest = max(largest, weight.detach().abs().max().item())
        return largest, second(optimizer.state[weight]).double().numpy().reshape(PLACES)

    def nbytes(x):
        parts = [getattr(x, part) for part in ("codes", "scale", "qmap") if hasattr(x, part)] or [x]
        return sum(part.nbytes for part in parts if torch.is_tensor(part))

    weight = torch.nn.Parameter(torch.zeros(WHOLE))
    weight.grad = torch.ones_like(weight)
    optimizer = make([weight])
    optimizer.step()
    return run, sum(map(nbytes, optimizer.state[weight].values())) / weight.numel()


def torchao(name):
    optim = __import__("torchao.optim").optim
    make = functools.partial(getattr(optim, name), lr=1.0, weight_decay=0.0)
    return theirs(make, lambda state: state["exp_avg_sq"].dequantize())


def bitsandbytes():
    make = functools.partial(__import__("bitsandbytes").optim.AdamW8bit, lr=1.0, weight_decay=0.0)

    def second(state):
        values = state["qmap2"][state["state2"].long()].reshape(len(state["absmax2"]), -1)
        return values * state["absmax2"][:, None]

    return theirs(make, second)


def adamw(**arguments):
    return om.adamw(1.0, weight_decay=0.0, **arguments)


PEERS = {
    "om.adamw": lambda: ours(adamw),
    "moments in bfloat16": lambda: ours(lambda: adamw(mu_dtype="bfloat16", nu_dtype="bfloat16")),
    "om.compress_state": lambda: ours(lambda: om.compress_state(adamw(), elementwise=True)),
    "torchao AdamW8bit": lambda: torchao("AdamW8bit"),
    "torchao AdamWFp8": lambda: torchao("AdamWFp8"),
    "bitsandbytes AdamW8bit": bitsandbytes,
}


def peers(console):
    exact = 0.999**FALLEN * (1 - 0.999**UNIT) + (1 - 0.999**FALLEN) * 1e-4
    rows = {}
    for name, make in PEERS.items():
        library = name.split()[0]
        if library in ("torchao", "bitsandbytes") and not all(
            importlib.util.find_spec(each) for each in ("torch", library)
        ):
            console.print(f"{name}: skipped, as PyTorch or {library} is not installed")
            continue
        try:
            run, size = make()
            found = {kind: run(gs) for kind, gs in gradients().items()}
        except Exception as error:  # whatever a library says of a machine that it is not made for
            console.print(f"{name}: does not run here: {str(error)[:200]}")
            continue
        v = found.pop("fall")[1][:, ::2].mean() / exact
        rows[name] = {"bytes": size, "v": v, "largest": {kind: each[0] for kind, each in found.items()}}
    return rows


def peer_tables(rows):
    """Of what `peers` finds."""
    heads = ("AdamW", "bytes", "v after the fall", *next(iter(rows.values()))["largest"])
    lines = [(name, f"{row['bytes']:.2f}", row["v"], *row["largest"].values()) for name, row in rows.items()]
    yield "v over what it should be, and max |update|", heads, lines
