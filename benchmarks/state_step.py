"""Compilation of a whole training step of GPT-2 small, float32 and 8 bits: a part of `state.py`."""

import statistics
import time

import jax
import jax.numpy as jnp
import optax
from optimizers import gpt

import optimorph as om

COMPILES = 2
SHAPES = gpt(768, 12) | {"embed": (50257, 768), "position_embed": (1024, 768)}
TOKENS = jax.ShapeDtypeStruct((4, 256), jnp.int32)
WAYS = {
    "om.adamw": lambda: om.adamw(1e-3),
    "om.adamw, state='int8'": lambda: om.adamw(1e-3, state="int8"),
    "om.muon": lambda: om.muon(0.02),
    "om.muon, state='int8'": lambda: om.muon(0.02, state="int8"),
}


def norm(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def loss(params, tokens):
    """Of the next tokens; the layers one after the other, as most people write them."""
    x = params["embed"][tokens] + params["position_embed"][: tokens.shape[-1]]
    for layer in (params[name] for name in params if name.startswith("layer")):
        y = norm(x) * layer["scale"]
        heads = ((y @ layer[name]).reshape(*y.shape[:-1], 12, 64) for name in ("query", "key", "value"))
        x += jax.nn.dot_product_attention(*heads, is_causal=True).reshape(x.shape) @ layer["out"]
        x += jax.nn.gelu(norm(x) @ layer["up"]) @ layer["down"]
    logits = norm(x[:, :-1]) @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def seconds(tx):
    """To trace and compile gradients, update and new parameters."""
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )

    def step(params, state, tokens):
        updates, state = tx.update(jax.grad(loss)(params, tokens), state, params)
        return optax.apply_updates(params, updates), state

    jax.clear_caches()
    started = time.perf_counter()
    jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), TOKENS).compile()
    return time.perf_counter() - started


def steps(console):
    """Way → median seconds, interleaved."""
    found = {name: [] for name in WAYS}
    for _ in range(COMPILES):
        for name, make in WAYS.items():
            found[name].append(seconds(make()))
    return {name: statistics.median(each) for name, each in found.items()}


def step_tables(found):
    """Of what `steps` finds."""
    yield "tracing and compiling a whole training step of GPT-2 small", ("", "seconds"), found.items()
