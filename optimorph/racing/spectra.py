"""How many directions an update has: the singular values of every matrix."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from optimorph.core.tree import leaf_paths
from optimorph.core.types import AxesRules
from optimorph.racing.record import Spectrum
from optimorph.routing.reading import reader

LARGEST = 1024  # the shorter side of a matrix beyond which a decomposition takes too long
VALUES = 24  # of a spectrum that are kept


def spectra(name: str, update: Any, axes: AxesRules | None = None) -> Iterator[Spectrum]:
    """The spectrum of every leaf that reads as matrices, the mean over its matrices.

    (1)  s_k = σ_k / σ_1
    (2)  effective rank = exp(-Σ p_k ln p_k),  p_k = σ_k / Σ_j σ_j

    References: Roy & Vetterli 2007, The effective rank: a measure of effective dimensionality.
    """
    read = reader("race", axes)
    for path, leaf in zip(leaf_paths(update), jax.tree.leaves(update), strict=True):
        reading = read(path, leaf.shape)
        if reading.axes is None:
            continue
        for stack in reading.axes.matrices(leaf):
            rows, columns = stack.shape[-2:]
            if min(rows, columns) > LARGEST or not np.all(np.isfinite(stack)) or not np.any(stack):
                continue
            values = np.linalg.svd(_double(stack), compute_uv=False).reshape(-1, min(rows, columns))
            values = values[values[:, 0] > 0]
            shares = values / values.sum(axis=1, keepdims=True)
            entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1.0)), axis=1)
            yield Spectrum(
                optimizer=name,
                path=path,
                rows=rows,
                columns=columns,
                values=_thinned((values / values[:, :1]).mean(axis=0)),  # (1)
                effective_rank=float(np.exp(entropy).mean()),  # (2)
            )


def _double(stack: jax.Array) -> np.ndarray:
    return np.asarray(stack, np.complex128 if np.iscomplexobj(stack) else np.float64)


def _thinned(values: np.ndarray) -> list[float]:
    """Some of the values, evenly spread, the first and the last among them."""
    at = np.unique(np.linspace(0, len(values) - 1, VALUES).round().astype(int))
    return [float(f"{values[k]:.4g}") for k in at]
