"""Logarithmic axes as they are drawn: labels in plain text, two at least, none on another."""

import matplotlib as mpl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from optimorph._racing.plot import SETTINGS
from optimorph._racing.ticks import PlainLog, plain

RANGES = {
    "a twentieth of a decade": (2.2, 2.5),
    "half a decade": (0.8, 2.5),
    "half a decade around 7": (6.5, 20.0),
    "a decade": (0.1, 1.0),
    "a decade and its ends": (0.09, 1.1),
    "three decades": (3e-4, 0.4),
    "twelve decades": (1e-9, 1e3),
    "forty decades": (1e-38, 1e2),
}


def boxes(axis):
    """The boxes of the labels that are seen, by their text."""
    low, high = axis.get_view_interval()
    renderer = axis.figure.canvas.get_renderer()
    return {
        label.get_text(): label.get_window_extent(renderer)
        for label, value in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
        if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)
    }


@pytest.mark.parametrize("size", [(10, 4.2), (5, 3.8), (2.4, 2)], ids=str)
@pytest.mark.parametrize("ends", RANGES.values(), ids=RANGES)
def test_labels(ends, size):
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure).draw()
        axes = figure.subplots()
        axes.plot(ends, ends)
        axes.set(xscale=PlainLog(), yscale=PlainLog())
        figure.canvas.draw()
    for axis in (axes.xaxis, axes.yaxis):
        found = boxes(axis)
        assert len(found) >= 2
        assert not [text for text in found if "$" in text or "\\" in text or float(text) <= 0]
        spread = list(found.values())
        assert not any(a.overlaps(b) for k, a in enumerate(spread) for b in spread[:k]), list(found)
        assert not any(label.get_text() for label in axis.get_ticklabels(minor=True))


def test_plain_numbers():
    numbers = {1e-5: "1e-5", 3e-4: "0.0003", 0.01: "0.01", 0.2: "0.2", 1.0: "1", 1e3: "1000", 2e20: "2e20"}
    assert {value: plain(value) for value in numbers} == numbers
