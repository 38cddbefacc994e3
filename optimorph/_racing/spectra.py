"""How many directions an update has: the singular values of every matrix."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from optimorph.core.tree import leaf_paths
from optimorph.core.types import AxesRules
from optimorph.linalg import effective_rank, spectrum
from optimorph._racing.record import Spectrum
from optimorph.routing.reading import reader

LARGEST = 1024  # the shorter side of a matrix beyond which a decomposition takes too long
VALUES = 24  # of a spectrum that are kept


def spectra(name: str, update: Any, axes: AxesRules | None = None) -> Iterator[Spectrum]:
    """The spectrum of every leaf that reads as matrices, the mean over those that are not zero."""
    read = reader("race", axes)
    for path, leaf in zip(leaf_paths(update), jax.tree.leaves(update), strict=True):
        reading = read(path, leaf.shape)
        if reading.axes is None:
            continue
        for stack in reading.axes.matrices(leaf):
            rows, columns = stack.shape[-2:]
            if min(rows, columns) > LARGEST or not np.all(np.isfinite(stack)) or not np.any(stack):
                continue
            found = spectrum(stack.reshape(-1, rows, columns))
            values, ranks = np.asarray(found.values), np.asarray(effective_rank(found))
            moved = values[:, 0] > 0
            yield Spectrum(
                optimizer=name,
                path=path,
                rows=rows,
                columns=columns,
                values=_thinned((values[moved] / values[moved, :1]).mean(axis=0)),
                effective_rank=float(ranks[moved].mean()),
            )


def _thinned(values: np.ndarray) -> list[float]:
    """Some of the values, evenly spread, the first and the last among them."""
    at = np.unique(np.linspace(0, len(values) - 1, VALUES).round().astype(int))
    return [float(f"{values[k]:.4g}") for k in at]
