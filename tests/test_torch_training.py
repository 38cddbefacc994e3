"""The first steps of a training are those of PyTorch, whose losses are recorded, in float64.

`python tests/fixtures/torch_training.py` records them with PyTorch's own AdamW and Muon.
"""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding

import optimorph as om
from optimorph._racing.tasks import text

FIXTURE = Path(__file__).parent / "fixtures" / "torch_training.json"
STEPS, RATE, MUON_RATE, DECAY, BETAS = 8, 1e-3, 0.02, 0.1, (0.9, 0.95)
ADAMW = om.adamw(RATE, *BETAS, weight_decay=DECAY)
OPTIMIZERS = {
    "AdamW": ADAMW,
    "Muon": om.muon(
        MUON_RATE,
        weight_decay=DECAY,
        orthogonalizer=om.linalg.NewtonSchulz("jordan", dtype=None),
        scale="keller",
        others=ADAMW,
    ),
}


def start():
    """The GPT of `optimorph race`, 32 wide: the task, weights from NumPy and batches."""
    task, draw = text.task(width=32), np.random.default_rng(0)

    def weights(x):
        spread = 1 if x.ndim == 1 else x.shape[0] ** -0.5
        return (x.ndim == 1) + spread * 0.5 * draw.standard_normal(x.shape)

    params = jax.tree.map(weights, jax.eval_shape(lambda: task.init(0)))
    return task, params, list(itertools.islice(task.batches(0), STEPS))


def attention(q, k, v, is_causal):
    """`jax.nn.dot_product_attention`, which computes the softmax in float32, in float64."""
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / q.shape[-1] ** 0.5
    seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen, logits, -jnp.inf)), v)


@pytest.mark.parametrize("name", OPTIMIZERS)
@jax.numpy_dtype_promotion("standard")  # Flax mixes dtypes
@rounding.in_float64
def test_losses_of_pytorch(name, monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    (task, params, batches), tx = start(), OPTIMIZERS[name]

    @jax.jit
    def step(params, state, batch):
        loss, gradients = jax.value_and_grad(task.loss)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.tree.map(jnp.asarray, params)
    state, losses = tx.init(params), []
    for batch in batches:
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    recorded = json.loads(FIXTURE.read_text())["losses"][name]
    np.testing.assert_allclose(losses, recorded, rtol=1e-8)  # Flax rounds embeddings to float32
