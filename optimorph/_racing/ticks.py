"""Logarithmic axes with plain labels, such as 0.01, 0.1 and 1, which do not overlap and are not TeX."""

import math

import numpy as np
from matplotlib.scale import LogScale
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

MULTIPLES = ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3))
"""Which multiples of a power of ten are ticks, from the most ticks to the fewest."""


def plain(value: float, position: int | None = None) -> str:
    """A number as one types it: 0.001, 20, 1e-5."""
    mantissa, _, exponent = f"{value:.10g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


class Ticks(LogLocator):
    """Ticks at as many round numbers as the axis has room for, and at least two."""

    def tick_values(self, vmin: float, vmax: float) -> np.ndarray:
        room = max(2, self.axis.get_tick_space() * 2 // 3) if self.axis else 6
        low, high = sorted((vmin, vmax))
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        for multiples in MULTIPLES:
            ticks = np.array([k * 10.0**e for e in range(first, last) for k in multiples])
            if 2 <= np.count_nonzero((low <= ticks) & (ticks <= high)) <= room:
                return ticks
        decades = np.arange(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        if len(decades) < 2:
            return np.asarray(MaxNLocator(max(4, room), steps=[1, 2, 5, 10]).tick_values(low, high))
        stride = math.ceil(len(decades) / room)
        return 10.0 ** np.arange(decades[0], decades[-1] + 1, stride)


class PlainLog(LogScale):
    """Matplotlib's logarithmic scale with plain labels: `axes.set(xscale=PlainLog())`."""

    def __init__(self):
        super().__init__(None)

    def set_default_locators_and_formatters(self, axis) -> None:
        super().set_default_locators_and_formatters(axis)
        axis.set_major_locator(Ticks())
        axis.set_major_formatter(FuncFormatter(plain))
        axis.set_minor_formatter(NullFormatter())
