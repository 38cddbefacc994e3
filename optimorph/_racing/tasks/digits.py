"""A small convolutional network on scikit-learn's handwritten digits."""

import jax
import numpy as np
from flax import nnx

from optimorph._racing.task import Task
from optimorph._racing.tasks.classification import classification, examples

BATCH = 64
SPLIT = {"train": slice(0, 1200), "tuning": slice(1200, 1500), "validation": slice(1500, 1797)}


class CNN(nnx.Module):
    """Two convolutions and two dense layers on images of 8 x 8 pixels; about 14,000 parameters."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.dense = nnx.Linear(2 * 2 * 32, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, 8, 8, 1) → (batch, 10)."""
        for conv in (self.conv1, self.conv2):
            x = nnx.max_pool(jax.nn.relu(conv(x)), (2, 2), strides=(2, 2))
        return self.head(jax.nn.relu(self.dense(x.reshape(x.shape[0], -1))))


def task() -> Task:
    """Classify images of digits; 1,200 are trained on."""
    from sklearn.datasets import load_digits

    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(labels))
    images = (pixels[order] / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = labels[order].astype(np.int32)
    parts = {part: (images[rows], labels[rows]) for part, rows in SPLIT.items()}
    return classification(
        CNN,
        **examples(lambda: parts, BATCH),
        name="digits",
        title="small CNN on scikit-learn's digits",
        measure="validation loss (nats per picture)",
        steps=300,
    )
