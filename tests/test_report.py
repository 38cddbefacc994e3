"""The HTML report of a race: a valid document, rendered by a browser in light and in dark."""

import contextlib
import html
import html.parser
import json
import math
import os
import re
import shutil
import subprocess

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from optimorph._racing import palette, plot
from optimorph._racing.comparisons import leaders, noise, verdict
from optimorph._racing.race_data import Curve, Row, Spectrum, Trial
from optimorph._racing.registry import OPTIMIZERS
from optimorph._racing.result import RaceResult

NAMES = ("sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw", "<muon> & co")
WIDTHS = (1100, 375)  # of a desk and of a phone
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VOID = {"meta", "link", "br", "img", "input", "hr"}


def result_of(names=NAMES, **changed):
    """A race in which the loss of each optimizer falls faster than that of the one before."""
    steps = list(range(0, 110, 10))
    speeds = {name: 0.01 * (k + 1) for k, name in enumerate(names)}
    curves = [
        Curve(
            name,
            seed,
            steps,
            [0.02 * s for s in steps],
            [2 * math.exp(-v * s) + 0.03 * seed + 0.1 for s in steps],
        )
        for name, v in speeds.items()
        for seed in (0, 1)
    ]
    rows = [
        Row(name, 2, 100, 2 * math.exp(-100 * v) + 0.115, 0.02, 50.0, 1.0, 4.0, 0.5, 0.1, None)
        for name, v in reversed(speeds.items())
    ]
    trials = [
        Trial(n, r, None, abs(math.log10(r / v)) + v, 100)
        for n, v in speeds.items()
        for r in (1e-3, 0.1, 10.0)
    ]
    spectra = [
        Spectrum(n, f"layers/{k}/kernel", 64, 32, [math.exp(-j / (1 + 200 * v)) for j in range(24)], 300 * v)
        for n, v in speeds.items()
        for k in range(30)
    ]
    machine = {"date": "2026-01-01", "device": "cpu", "cores": 2, "versions": {"jax": "0"}}
    given = {
        "task": "custom",
        "title": "five & six",
        "measure": "loss",
        "steps": 100,
        "seeds": 2,
        "finished": True,
    }
    given |= {"machine": machine, "rows": rows, "curves": curves, "trials": trials, "spectra": spectra}
    return RaceResult(**(given | changed))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "race.html"
    result_of().report(path)
    return path


class Reader(html.parser.HTMLParser):
    """Elements in order, as (tag, attributes, text), and whether all that open are closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.wrong = [], [], []
        self.feed(text)
        self.wrong += self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        assert len(dict(attributes)) == len(attributes), f"{tag} says something twice"
        if tag not in VOID:
            self.open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_endtag(self, tag):
        if not self.open or self.open.pop()[0] != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        for _, at in self.open:
            self.elements[at][2] += data

    def all(self, tag):
        return [(attributes, text) for name, attributes, text in self.elements if name == tag]


def test_document(written):
    text = written.read_text(encoding="utf-8")
    read = Reader(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not read.wrong
    assert read.all("html")[0][0]["lang"] == "en"
    assert read.all("title")[0][1] == read.all("h1")[0][1] == "five & six"
    ids = [attributes["id"] for _, attributes, _ in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 30
    for attributes, _ in read.all("section"):
        assert attributes["aria-labelledby"] in ids
    pictures = [attributes for attributes, _ in read.all("svg") if "aria-hidden" not in attributes]
    assert len(pictures) == 2 + 1 + 8  # losses, rates, layers
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 20
    assert len({attributes["aria-label"] for attributes in pictures}) == len(pictures)
    assert len(read.all("caption")) == len(read.all("table")) == 3
    assert all(attributes["scope"] in ("col", "row") for attributes, _ in read.all("th"))
    assert len(text) < 2e6


def test_nothing_is_fetched(written):
    text = written.read_text(encoding="utf-8")
    read = Reader(text)
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _, _ in read.elements}
    for _, attributes, _ in read.elements:
        for key in ("src", "href", "xlink:href", "data"):
            assert attributes.get(key, "#").startswith("#")
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    ids = {attributes["id"] for _, attributes, _ in read.elements if "id" in attributes}
    used = set(re.findall(r"url\(#([^)]*)\)", text)) | set(re.findall(r'href="#([^"]*)"', text))
    assert used
    assert used <= ids


def test_every_table_and_legend_has_all_optimizers_in_one_order(written):
    text = written.read_text(encoding="utf-8")
    read = Reader(text)
    best_first = list(reversed(NAMES))
    assert [text for attributes, text in read.all("th") if attributes["scope"] == "row"] == 3 * best_first
    assert [text for _, text in read.all("li")] == 3 * best_first
    words = [text for _, text in read.all("text")]
    assert "layers/0/kernel" in words
    assert "layers/29/kernel" in words
    assert "8 of 30 layers" in "".join(text for _, text in read.all("figcaption"))
    assert not [color for color in (*palette.LIGHT, palette.INK[0]) if f"stroke: {color}" in text]


def test_a_legend_names_only_the_optimizers_in_its_plot(tmp_path):
    tried = [trial for trial in result_of().trials if trial.optimizer in NAMES[:2]]
    result_of(trials=tried).report(tmp_path / "race.html")
    found = [text for _, text in Reader((tmp_path / "race.html").read_text(encoding="utf-8")).all("li")]
    assert found == [*reversed(NAMES), "momentum", "sgd", *reversed(NAMES)]


def test_the_order_is_that_of_the_picture_too():
    with drawn(plot.plot_losses, result_of()) as figure:
        assert [text.get_text() for text in figure.legends[0].get_texts()] == list(reversed(NAMES))


def test_without_a_race_the_order_is_that_of_the_losses_tried():
    record = result_of(rows=[], curves=[], spectra=[])
    lowest = {name: min(trial.loss for trial in record.trials if trial.optimizer == name) for name in NAMES}
    assert record.names == sorted(NAMES, key=lowest.__getitem__)


def row(name, loss, spread=0.0, seeds=3):
    return Row(name, seeds, 250, loss, spread, 50.0, 1.0, 4.0, 0.5, 0.1, None)


CLEAR = [row("muon", 2.2, 0.02), row("adamw", 2.4, 0.02), row("sgd", 2.9, 0.4)]
CLOSE = [row("muon", 2.21, 0.02), row("adamw", 2.22, 0.02), row("adam", 2.4, 0.02), row("sgd", 2.41, 0.8)]
VERDICTS = {
    "clear": (CLEAR, "muon ends lowest, at 2.2, before adamw at 2.4. Loss, 250 steps."),
    "close": (
        CLOSE,
        "muon and adamw end lowest, at 2.21 and 2.22; the seeds do not tell them apart. Loss, 250 steps.",
    ),
    "all close": (
        CLOSE[:2],
        "muon and adamw end lowest, at 2.21 and 2.22; the seeds do not tell them apart. Loss, 250 steps.",
    ),
    "one seed": (
        [row("muon", 2.2, seeds=1), row("adamw", 2.4, seeds=1)],
        "muon ends lowest, at 2.2, before adamw at 2.4; one seed cannot rank close losses. Loss, 250 steps.",
    ),
    "alone": ([row("muon", 2.2, seeds=1)], "muon ends lowest, at 2.2. Loss, 250 steps."),
    "blown up": ([row("sgd", float("nan"))], "Every run diverged."),
    "one stands": ([*CLEAR[:1], row("sgd", float("nan"))], "muon ends lowest, at 2.2. Loss, 250 steps."),
    "a sweep": ([], "24 learning rates were tried."),
}


@pytest.mark.parametrize(("rows", "expected"), VERDICTS.values(), ids=VERDICTS)
def test_verdict(rows, expected):
    """No optimizer is called the lowest if another is within the noise of the seeds."""
    assert verdict(result_of(rows=rows)) == expected
    assert verdict(result_of(rows=rows, finished=False)) == f"Stopped early. {expected}"


def test_no_number_of_the_lead_breaks_at_its_sign(tmp_path):
    result_of(rows=[row("adam", 2.5e-21), row("sgd", 1.0)]).report(tmp_path / "race.html")
    read = Reader((tmp_path / "race.html").read_text(encoding="utf-8"))
    assert not read.wrong
    assert [text for _, text in read.all("span")] == ["2.5e-21"]
    assert ".lead span { white-space: nowrap; }" in (tmp_path / "race.html").read_text(encoding="utf-8")


def test_noise_is_two_standard_errors_of_the_difference():
    a, b = row("a", 1.0, 0.3, seeds=9), row("b", 1.0, 0.8, seeds=4)
    assert noise(a, b) == pytest.approx(2 * np.sqrt(0.3**2 / 9 + 0.8**2 / 4))
    a, b, c = (row(name, loss, 0.1, seeds=4) for name, loss in (("a", 1.0), ("b", 1.14), ("c", 1.15)))
    assert leaders([a, b, c]) == [a, b]  # 2 √(2 · 0.1² / 4) = 0.1414


def test_best_of_the_other_rates(tmp_path):
    trials = [
        Trial("muon", 0.1, 0.5, 2.0, 1),
        Trial("muon", 0.1, 0.1, 1.0, 1),
        Trial("muon", 0.01, 0.1, np.nan, 1),
    ]
    assert plot.best_losses(trials) == {0.01: np.inf, 0.1: 1.0}
    for some, cells in ((trials, ["0.1", "1", "1 of 2"]), (trials[2:], ["none", "diverged", "0 of 1"])):
        result_of(rows=[], curves=[], spectra=[], trials=some).report(tmp_path / "race.html")
        read = Reader((tmp_path / "race.html").read_text(encoding="utf-8"))
        assert [text for _, text in read.all("td")] == cells


@pytest.mark.parametrize("changed", [{"rows": [], "curves": []}, {"trials": []}, {"spectra": []}], ids=str)
def test_parts_that_are_missing_leave_no_hole(changed, tmp_path):
    result_of(**changed).report(tmp_path / "race.html")
    read = Reader((tmp_path / "race.html").read_text(encoding="utf-8"))
    assert not read.wrong
    assert len(read.all("section")) == 2


@contextlib.contextmanager
def drawn(picture, record, **given):
    """A picture as it is drawn on a canvas."""
    with mpl.rc_context(plot.SETTINGS):
        figure = picture(record, **given)
        FigureCanvasAgg(figure).draw()
        yield figure


def falling(*ends, start=2.0):
    """One optimizer for each of these ends, with losses from the start to the end."""
    names = [f"racer {k}" for k in range(len(ends))]
    curves = [
        Curve(n, 0, [0, 5, 10], [0.0, 1.0, 2.0], [start, start, e]) for n, e in zip(names, ends, strict=True)
    ]
    return result_of(names, seeds=1, curves=curves, trials=[], spectra=[])


SCALES = {
    "near the start": (falling(1.5, 0.9), "linear"),
    "below a tenth of it": (falling(1.5, 0.1), "log"),
    "zero": (falling(1.5, 0.0), "log"),
    "negative": (falling(1.5, -3.0), "linear"),
    "a loss that diverges": (falling(1.5, 1e30), "linear"),
    "a loss that is not finite": (falling(1.5, float("nan")), "linear"),
    "as the user says": (RaceResult(**vars(falling(1.5, 0.9)) | {"log_loss": True}), "log"),
}


@pytest.mark.parametrize(("record", "scale"), SCALES.values(), ids=SCALES)
def test_the_range_of_losses_decides_whether_the_axis_is_logarithmic(record, scale):
    with drawn(plot.plot_losses, record) as figure:
        assert [axes.get_yscale() for axes in figure.axes] == [scale, scale]
        assert figure.axes[0].get_ylim()[1] < 10  # a diverging loss does not flatten the others


def inside(box, outer):
    return box.x0 >= outer.x0 and box.y0 >= outer.y0 and box.x1 <= outer.x1 and box.y1 <= outer.y1


PICTURES = {
    "eight": result_of(),
    "two": result_of(("adam", "sgd")),
    "losses near zero": falling(1e-9, 0.02),
    "thirty": result_of([f"racer {k}" for k in range(30)]),
    "long names": result_of(
        ["a name that goes on " * 3, "adam"], title="a title that goes on " * 9, measure="a loss " * 12
    ),
}


@pytest.mark.parametrize("record", PICTURES.values(), ids=PICTURES)
def test_nothing_is_cut_and_nothing_overlaps_in_the_picture(record):
    with drawn(plot.plot_losses, record) as figure:
        renderer, whole = figure.canvas.get_renderer(), figure.bbox
        title, legend = figure.texts[0].get_window_extent(renderer), figure.legends[0].get_window_extent()
        plots = [axes.get_tightbbox(renderer) for axes in figure.axes]
        parts = [title, legend, *plots]
        assert all(inside(box, whole) for box in parts)
        assert not any(a.overlaps(b) for k, a in enumerate(parts) for b in parts[:k])
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            seen = [label for label in axis.get_ticklabels() if label.get_visible() and label.get_text()]
            spread = [label.get_window_extent(renderer) for label in seen]
            assert not any(a.overlaps(b) for k, a in enumerate(spread) for b in spread[:k])
            assert not [label for label in seen if "$" in label.get_text()]
        assert min(axes.get_window_extent(renderer).width for axes in figure.axes) > 0.2 * whole.width


CONFUSIONS = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.3039],
    ],
}
"""What is seen of linear light: Machado, Oliveira & Fernandes 2009, at severity 1."""


def linear(color):
    value = np.array([int(color[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def oklab(light):
    """Ottosson 2020."""
    cones = [
        [0.41222147, 0.53633254, 0.05144599],
        [0.2119035, 0.6806995, 0.10739696],
        [0.08830246, 0.28171884, 0.6299787],
    ]
    lab = [
        [0.21045426, 0.79361779, -0.00407205],
        [1.9779985, -2.4285922, 0.4505937],
        [0.0259040, 0.78277177, -0.80867577],
    ]
    return np.array(lab) @ np.cbrt(np.clip(np.array(cones) @ light, 0, None))


def contrast(a, b):
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_stay_apart_for_all_eyes(scheme):
    colors, paper = (palette.LIGHT, palette.DARK)[scheme], palette.PAPER[scheme]
    assert min(contrast(color, paper) for color in colors) >= 3
    assert contrast(palette.INK[scheme], paper) >= 7
    for matrix in CONFUSIONS.values():
        seen = [oklab(np.clip(np.array(matrix) @ linear(color), 0, 1)) for color in colors]
        apart = [np.linalg.norm(a - b) for k, a in enumerate(seen) for b in seen[:k]]
        assert min(apart) > 0.11


def test_a_known_optimizer_has_the_same_style_in_every_race():
    assert set(palette.OPTIMIZERS) == set(OPTIMIZERS)
    assert len({style.color for style in palette.OPTIMIZERS.values()}) == 8
    for names in (["sgd", "muon"], ["mine", "muon", "sgd"], list(OPTIMIZERS)):
        found = palette.styles(names)
        assert found["muon"] == palette.OPTIMIZERS["muon"]
        assert found["sgd"] == palette.OPTIMIZERS["sgd"]


def test_other_names_get_the_remaining_styles():
    names = [str(k) for k in range(24)]
    found = palette.styles([*OPTIMIZERS, *names])
    assert len(set(found.values())) == 32
    found = palette.styles(["muon", *names[:7]])
    assert len({style.color for style in found.values()}) == 8
    assert not {found[name] for name in names[:7]} & set(palette.OPTIMIZERS.values())


def browser():
    """The path of a browser; None if there is none and none is required."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found or not os.environ.get("OPTIMORPH_BROWSER"), f"none of {', '.join(BROWSERS)} is installed"
    return found


def browse(program, page, folder, scheme):
    """The document as a browser has made it; `scheme` is 0 for light and 1 for dark."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={1 - scheme}"]
    done = subprocess.run(
        [program, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ASKED = """<script>
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const style = (e, name, pseudo) => getComputedStyle(e, pseudo).getPropertyValue(name);
parent.document.body.dataset[`at${innerWidth}`] = JSON.stringify({
  wanted: document.documentElement.scrollWidth,
  boxes: all("h1, h2, p, li, figcaption, caption, th, td, svg, svg text").map(e => [e.textContent, box(e)]),
  scrolled: all("main *:not(svg, svg *)").filter(e => 0 < e.clientWidth && e.clientWidth < e.scrollWidth - 1)
    .map(e => e.tagName),
  pictures: all(".plots > svg").map(e => ({
    box: box(e), texts: all("text", e).map(t => [t.textContent, box(t)]),
    strokes: all("path", e).map(p => style(p, "stroke")),
  })),
  swatches: all("li line, th line").map(e => style(e, "stroke")),
  tables: all("table").map(box),
  heads: all("thead").map(e => style(e, "display")),
  ownHeads: all("td").map(e => style(e, "content", "::before")),
  paper: style(document.body, "background-color"), ink: style(document.querySelector("h1"), "color"),
})</script>"""


@pytest.fixture(scope="module", params=[0, 1], ids=["light", "dark"])
def seen(request, written, tmp_path_factory):
    """The scheme, and what the page looks like at each width; None where there is no browser."""
    program, folder = browser(), tmp_path_factory.mktemp("seen")
    if program is None:
        return request.param, {}  # the document itself is read above
    asking = html.escape(written.read_text(encoding="utf-8").replace("</body>", ASKED + "</body>"))
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{asking}"></iframe>' for width in WIDTHS)
    (folder / "page.html").write_text(
        "<!DOCTYPE html><html><head><meta charset='utf-8'><style>:root { color-scheme: light dark } "
        f"iframe {{ border: 0 }}</style></head><body>{frames}</body></html>",
        encoding="utf-8",
    )
    body = Reader(browse(program, folder / "page.html", folder, request.param)).all("body")[0][0]
    return request.param, {width: json.loads(body[f"data-at{width}"]) for width in WIDTHS}


def within(box, outer):
    return all(a >= b - 1 for a, b in zip(box[:2], outer[:2], strict=True)) and all(
        a <= b + 1 for a, b in zip(box[2:], outer[2:], strict=True)
    )


def apart(a, b):
    return a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 1 or b[3] <= a[1] + 1


def test_nothing_is_cut_on_any_screen(seen):
    for width, looked in seen[1].items():
        assert looked["wanted"] <= width
        assert [text for text, box in looked["boxes"] if not within(box, (0, 0, width, 1e6))] == []
        assert looked["scrolled"] == []
        for box in looked["tables"]:
            assert box[2] - box[0] > 200


def test_no_words_overlap_in_a_picture(seen):
    for looked in seen[1].values():
        for picture in looked["pictures"]:
            texts = picture["texts"]
            assert len(texts) >= 6
            assert [text for text, box in texts if not within(box, picture["box"])] == []
            assert [
                (a, b) for k, (a, one) in enumerate(texts) for b, two in texts[:k] if not apart(one, two)
            ] == []
            assert not [text for text, _ in texts if "$" in text or "mathdefault" in text]


def test_pictures_stand_side_by_side_where_there_is_room(seen):
    for width, looked in seen[1].items():
        (steps, seconds), layers = [each["box"] for each in looked["pictures"][:2]], looked["pictures"][3:]
        assert (steps[1] == seconds[1]) == (width == 1100)
        assert (steps[3] <= seconds[1]) == (width == 375)
        assert len({each["box"][0] for each in layers}) == (4 if width == 1100 else 2)


def test_cells_have_their_heads_on_any_screen(seen):
    for width, looked in seen[1].items():
        narrow = width == 375
        assert all((display == "none") == narrow for display in looked["heads"])
        assert all((content not in ("none", "normal", '""')) == narrow for content in looked["ownHeads"])


def rgb(color):
    return "rgb({}, {}, {})".format(*(int(color[k : k + 2], 16) for k in (1, 3, 5)))


def test_colours_are_those_of_the_scheme(seen):
    scheme, pages = seen
    colors = dict(zip(palette.LIGHT, map(rgb, (palette.LIGHT, palette.DARK)[scheme]), strict=True))
    styles = result_of().styles
    expected = [colors[styles[name].color] for name in reversed(NAMES)]
    for looked in pages.values():
        assert looked["paper"] == rgb(palette.PAPER[scheme])
        assert looked["ink"] == rgb(palette.INK[scheme])
        assert looked["swatches"] == 6 * expected
        for picture in looked["pictures"]:
            assert set(expected) <= set(picture["strokes"])
