"""A character GPT on eight plays by Shakespeare."""

import functools
import importlib.resources

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from optimorph._racing.task import Task

LAYERS, HEADS, WIDTH, CONTEXT, BATCH = 4, 4, 128, 64, 12
PIECE = 8192  # characters; of every 20 pieces, one is for tuning and one for validation


class Attention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, rngs: nnx.Rngs):
        make = functools.partial(nnx.Linear, WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.query, self.key, self.value, self.out = make(), make(), make(), make()

    def __call__(self, x: jax.Array) -> jax.Array:
        """(rows, WIDTH) → (rows, WIDTH)."""
        split = (-1, CONTEXT, HEADS, WIDTH // HEADS)
        q, k, v = (f(x).reshape(split) for f in (self.query, self.key, self.value))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.reshape(x.shape))


class Block(nnx.Module):
    """Attention, then an MLP, each on a residual branch that a norm begins."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = Attention(rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(rows, WIDTH) → (rows, WIDTH)."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    """Characters → logits of the next characters. The head has its own weights."""

    def __init__(self, vocabulary: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocabulary, WIDTH, rngs=rngs)
        self.position_embed = nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(batch, CONTEXT) → (batch, CONTEXT, vocabulary)."""
        x = self.embed(tokens) + self.position_embed(jnp.arange(CONTEXT))
        x = x.reshape(-1, WIDTH)  # two axes: gradients of weights are then twice as fast as with three
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).reshape(*tokens.shape, -1)


def task() -> Task:
    """Predict the next character; 0.8 million parameters, about 1 MB of text."""
    parts, vocabulary = load_characters()
    graph = nnx.graphdef(_model(vocabulary, 0))

    def loss(params, batch):
        tokens, following = batch
        logits = nnx.merge(graph, params)(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, following).mean()

    def batches(seed):
        text, rng = parts["train"], np.random.default_rng(seed)
        while True:
            yield _windows(text, rng.integers(0, len(text) - CONTEXT - 1, BATCH))

    def held_out(part):
        starts = np.linspace(0, len(parts[part]) - CONTEXT - 2, 4 * 64).astype(int)
        return [_windows(parts[part], chunk) for chunk in np.split(starts, 4)]

    return Task(
        name="text",
        title=f"character GPT ({LAYERS} layers, width {WIDTH}) on Shakespeare",
        measure="validation loss (nats per character)",
        init=lambda seed: nnx.state(_model(vocabulary, seed), nnx.Param),
        loss=loss,
        batches=batches,
        held_out=held_out,
        steps=250,
    )


def _model(vocabulary: int, seed: int) -> GPT:
    return GPT(vocabulary, nnx.Rngs(seed))


def _windows(text: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    indices = starts[:, None] + np.arange(CONTEXT)
    return text[indices], text[indices + 1]


def load_characters() -> tuple[dict[str, np.ndarray], int]:
    """Part of the data → its characters as integers, and the number of distinct characters."""
    text = importlib.resources.files("optimorph._racing").joinpath("data/shakespeare.txt").read_bytes()
    letters, codes = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    pieces = [codes[k : k + PIECE].astype(np.int32) for k in range(0, len(codes), PIECE)]
    parts = {
        "tuning": pieces[9::20],
        "validation": pieces[19::20],
        "train": [piece for k, piece in enumerate(pieces) if k % 10 != 9],
    }
    return {name: np.concatenate(chunks) for name, chunks in parts.items()}, len(letters)
