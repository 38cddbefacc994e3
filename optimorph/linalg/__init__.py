"""Floor 1: arrays only, no trees, no state.

How a leaf reads as matrices (`Axes`), the polar factor of a stack of them (`NewtonSchulz`, `Exact`), and the
polynomials that it takes (`polar_express`, `Coefficients`).
"""

from optimorph.linalg.axes import Axes
from optimorph.linalg.coefficients import Coefficients
from optimorph.linalg.exact import Exact
from optimorph.linalg.newton_schulz import NewtonSchulz
from optimorph.linalg.polar_express import polar_express

__all__ = ["Axes", "Coefficients", "Exact", "NewtonSchulz", "polar_express"]
