"""The singular values of an update: how evenly it moves each matrix in all directions."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from optimorph._core.paths import leaf_paths
from optimorph._core.types import AxesRules
from optimorph._racing.race_data import Spectrum
from optimorph._routing.resolve import resolve_leaves
from optimorph.linalg import effective_rank, spectrum

MAX_SIDE = 1024  # matrices whose shorter side is longer are skipped, because they take too long
MAX_VALUES = 24  # singular values kept of each spectrum


def spectra(name: str, update: Any, axes: AxesRules | None = None) -> Iterator[Spectrum]:
    """The spectrum of every leaf whose axes make it a matrix or a stack of matrices.

    The spectrum of a stack is the mean over its matrices that are not zero.
    """
    paths, leaves = leaf_paths(update), jax.tree.leaves(update)
    specs = resolve_leaves("race", axes)(paths, [leaf.shape for leaf in leaves])
    for path, leaf, (spec, *_) in zip(paths, leaves, specs, strict=True):
        if spec is None:
            continue
        for stack in spec.matrices(leaf):
            rows, columns = stack.shape[-2:]
            if min(rows, columns) > MAX_SIDE or not np.all(np.isfinite(stack)) or not np.any(stack):
                continue
            result = spectrum(stack.reshape(-1, rows, columns))
            values, ranks = np.asarray(result.values), np.asarray(effective_rank(result))
            nonzero = values[:, 0] > 0
            mean = (values[nonzero] / values[nonzero, :1]).mean(axis=0)
            indices = np.unique(np.linspace(0, len(mean) - 1, MAX_VALUES).round().astype(int))
            yield Spectrum(
                optimizer=name,
                path=path,
                rows=rows,
                columns=columns,
                values=[float(f"{mean[k]:.4g}") for k in indices],
                effective_rank=float(ranks[nonzero].mean()),
            )
