"""Floor 1: arrays only, no trees, no state.

How a leaf reads as matrices (`Axes`); the polar factor of a stack of matrices (`NewtonSchulz`, `Exact`) and
the polynomials that it takes (`polar_express`, `Coefficients`); norms and ranks of matrices (`spectral_norm`,
`rms_to_rms_norm`, `stable_rank`, `effective_rank`, `top_energy`, `orthogonality_error`), all of which take a
stack or its `spectrum`.
"""

from optimorph.linalg._axes import Axes
from optimorph.linalg._coefficients import Coefficients
from optimorph.linalg._exact import Exact
from optimorph.linalg._newton_schulz import NewtonSchulz
from optimorph.linalg._polar_express import polar_express
from optimorph.linalg._spectrum import (
    Spectrum,
    effective_rank,
    orthogonality_error,
    rms_to_rms_norm,
    spectral_norm,
    spectrum,
    stable_rank,
    top_energy,
)

__all__ = [
    "Axes",
    "Coefficients",
    "Exact",
    "NewtonSchulz",
    "Spectrum",
    "effective_rank",
    "orthogonality_error",
    "polar_express",
    "rms_to_rms_norm",
    "spectral_norm",
    "spectrum",
    "stable_rank",
    "top_energy",
]
