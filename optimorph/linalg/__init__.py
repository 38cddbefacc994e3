"""Functions of arrays for matrices: polar factors, norms and ranks.

`Axes` says how an array reads as matrices. `NewtonSchulz` and `Exact` compute the polar factors of a stack of
matrices. `polar_express` makes a table of `Coefficients` for `NewtonSchulz`. `spectral_norm`,
`rms_to_rms_norm`, `stable_rank`, `effective_rank`, `top_energy` and `orthogonality_error` take a stack of
matrices or its `spectrum`.

Floor 1 (see CONTRIBUTING.md): arrays only, no trees and no state.
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
__dir__ = __all__.copy  # dir() shows the public names alone
