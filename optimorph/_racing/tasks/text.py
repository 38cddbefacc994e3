"""A character GPT on eight plays by Shakespeare."""

import functools
import importlib.resources

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optimorph._racing.task import Task
from optimorph._racing.tasks.classification import classification

LAYERS, WIDTH, HEAD, CONTEXT, BATCH = 4, 128, 32, 64, 12  # HEAD: the width of one attention head
PIECE = 8192  # characters; of every 20 pieces, one is for tuning and one for validation


class Attention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        make = functools.partial(nnx.Linear, width, width, use_bias=False, rngs=rngs)
        self.query, self.key, self.value, self.out = make(), make(), make(), make()

    def __call__(self, x: jax.Array) -> jax.Array:
        heads = (-1, CONTEXT, x.shape[-1] // HEAD, HEAD)
        q, k, v = (f(x).reshape(heads) for f in (self.query, self.key, self.value))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.reshape(x.shape))


class Block(nnx.Module):
    """Attention, then an MLP, each on a residual branch that a norm begins."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    """Characters → logits of the next characters. The head has its own weights."""

    def __init__(self, vocabulary: int, rngs: nnx.Rngs, width: int = WIDTH):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.position_embed = nnx.Embed(CONTEXT, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(batch, CONTEXT) → (batch, CONTEXT, vocabulary)."""
        x = self.embed(tokens) + self.position_embed(jnp.arange(CONTEXT))
        x = x.reshape(-1, x.shape[-1])  # two axes: gradients of weights are then twice as fast as with three
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).reshape(*tokens.shape, -1)


def task(width: int = WIDTH, batch: int = BATCH, plays: slice = slice(None)) -> Task:
    """Predict the next character; 0.8 million parameters at width 128, about 1 MB of text.

    Args:
      width: of the embeddings and the residual stream, a multiple of `HEAD`.
      batch: windows of `CONTEXT` characters in one batch.
      plays: the characters of the text that are used, for training and for evaluation.
    """
    parts, vocabulary = load_characters(plays)

    def batches(seed):
        text, rng = parts["train"], np.random.default_rng(seed)
        while True:
            yield _windows(text, rng.integers(0, len(text) - CONTEXT - 1, batch))

    def held_out(part):
        starts = np.linspace(0, len(parts[part]) - CONTEXT - 2, 4 * 64).astype(int)
        return [_windows(parts[part], chunk) for chunk in np.split(starts, 4)]

    return classification(
        functools.partial(GPT, vocabulary, width=width),
        name="text",
        title=f"character GPT ({LAYERS} layers, width {width}) on Shakespeare",
        measure="validation loss (nats per character)",
        batches=batches,
        held_out=held_out,
        steps=250,
    )


def _windows(text: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    indices = starts[:, None] + np.arange(CONTEXT)
    return text[indices], text[indices + 1]


def load_characters(plays: slice = slice(None)) -> tuple[dict[str, np.ndarray], int]:
    """Part of the data → its characters as integers, and the number of distinct characters."""
    text = importlib.resources.files("optimorph._racing").joinpath("data/shakespeare.txt").read_bytes()
    letters, codes = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    codes = codes[plays].astype(np.int32)
    pieces = [codes[k : k + PIECE] for k in range(0, len(codes), PIECE)]
    parts = {
        "tuning": pieces[9::20],
        "validation": pieces[19::20],
        "train": [piece for k, piece in enumerate(pieces) if k % 10 != 9],
    }
    return {name: np.concatenate(chunks) for name, chunks in parts.items()}, len(letters)
