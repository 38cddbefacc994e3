"""Floor 1: arrays only, no trees, no state.

How a leaf reads as matrices (`Axes`), the polar factor of a stack of them (`NewtonSchulz`, `Exact`), the
polynomials that it takes (`polar_express`, `Coefficients`), and how large matrices are and of what rank:
`spectral_norm`, `rms_to_rms_norm`, `nuclear_norm`, `schatten_norm` and their duals, `stable_rank`,
`effective_rank`, `top_energy`, `orthogonality_error`, all of which take a matrix or its `spectrum`.
"""

from optimorph.linalg.axes import Axes
from optimorph.linalg.coefficients import Coefficients
from optimorph.linalg.exact import Exact
from optimorph.linalg.newton_schulz import NewtonSchulz
from optimorph.linalg.norms import (
    dual_exponent,
    nuclear_norm,
    rms_to_rms_dual_norm,
    rms_to_rms_norm,
    schatten_norm,
    spectral_norm,
)
from optimorph.linalg.polar_express import polar_express
from optimorph.linalg.ranks import effective_rank, orthogonality_error, stable_rank, top_energy
from optimorph.linalg.spectrum import Spectrum, spectrum

__all__ = [
    "Axes",
    "Coefficients",
    "Exact",
    "NewtonSchulz",
    "Spectrum",
    "dual_exponent",
    "effective_rank",
    "nuclear_norm",
    "orthogonality_error",
    "polar_express",
    "rms_to_rms_dual_norm",
    "rms_to_rms_norm",
    "schatten_norm",
    "spectral_norm",
    "spectrum",
    "stable_rank",
    "top_energy",
]
