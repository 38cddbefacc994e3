"""Floor 1: arrays only, no trees, no state.

How a leaf reads as matrices (`Axes`) and the polar factor of a stack of them (`NewtonSchulz`, `Exact`).
"""

from optimorph.linalg.axes import Axes
from optimorph.linalg.polar import Exact, NewtonSchulz

__all__ = ["Axes", "Exact", "NewtonSchulz"]
