"""The page that a race leaves: a sound document, seen through a browser in light and in dark."""

import html.parser
import json
import os
import re
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest

from optimorph.racing import page, palette, plot
from optimorph.racing.record import Curve, Row, Spectrum, Trial
from optimorph.racing.result import Result

NAMES = ("sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw", "<muon> & co")
WIDTH, HEIGHT = 1100, 2400
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VOID = {"meta", "link", "br", "img", "input", "hr"}


def result_of(names=NAMES, **changed):
    """A race in which each falls a little faster than the one before."""
    steps = list(range(0, 110, 10))
    speeds = {name: 0.01 * (k + 1) for k, name in enumerate(names)}
    curves = [
        Curve(
            name,
            seed,
            steps,
            [0.02 * s for s in steps],
            [2 * np.exp(-v * s) + 0.03 * seed + 0.1 for s in steps],
        )
        for name, v in speeds.items()
        for seed in (0, 1)
    ]
    rows = [
        Row(name, 2, 100, 2 * np.exp(-100 * v) + 0.115, 0.02, 50.0, 1.0, 4.0, 0.5, 0.1, None)
        for name, v in reversed(speeds.items())
    ]
    trials = [
        Trial(n, r, None, abs(np.log10(r / v)) + v, 100) for n, v in speeds.items() for r in (1e-3, 0.1, 10.0)
    ]
    spectra = [
        Spectrum(name, f"layers/{k}/kernel", 64, 32, [np.exp(-j / (1 + 200 * v)) for j in range(24)], 300 * v)
        for name, v in speeds.items()
        for k in range(30)
    ]
    machine = {"date": "2026-01-01", "device": "cpu", "cores": 2, "versions": {"jax": "0"}}
    given = {
        "task": "own",
        "title": "five & six",
        "measure": "loss",
        "steps": 100,
        "seeds": 2,
        "finished": True,
    }
    given |= {"machine": machine, "rows": rows, "curves": curves, "trials": trials, "spectra": spectra}
    return Result(**(given | changed))


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
    assert len(ids) == len(set(ids)) > 50
    for attributes, _ in read.all("section"):
        assert attributes["aria-labelledby"] in ids
    pictures = [attributes for attributes, _ in read.all("svg") if "aria-hidden" not in attributes]
    assert len(pictures) == 3
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 20
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


def test_table_and_figures_have_everybody(written):
    read = Reader(written.read_text(encoding="utf-8"))
    heads = [text for attributes, text in read.all("th") if attributes["scope"] == "row"]
    assert heads[:8] == list(reversed(NAMES))  # best first
    assert sorted(heads) == sorted(NAMES * 3)
    words = [text for _, text in read.all("text")]
    for name in NAMES:
        assert words.count(name) == 3  # the three legends, in letters
    assert "layers/0/kernel" in words
    assert "layers/29/kernel" in words
    assert "24 of 30 layers" in "".join(text for _, text in read.all("figcaption"))
    shown = written.read_text(encoding="utf-8")
    assert not [color for color in (*palette.LIGHT, palette.INK[0]) if f"stroke: {color}" in shown]


def test_lead_says_who_won():
    assert "<muon> & co ends lowest, at 0.1157, before adamw at 0.1168; loss, 100 steps." in page.lead(
        result_of()
    )
    assert page.lead(result_of(finished=False)).startswith("Stopped early. ")
    blown = [Row("sgd", 1, 9, float("nan"), 0.0, 1.0, 1.0, 0.0, 1.0, 0.1, None)]
    assert page.lead(result_of(rows=blown)) == "Every training blew up."
    assert page.lead(result_of(rows=[])) == "24 learning rates were tried."


def test_best_of_the_other_rates():
    trials = [
        Trial("muon", 0.1, 0.5, 2.0, 1),
        Trial("muon", 0.1, 0.1, 1.0, 1),
        Trial("muon", 0.01, 0.1, np.nan, 1),
    ]
    assert plot.envelope(trials) == {0.01: np.inf, 0.1: 1.0}
    assert page._best(trials) == ("0.1", "1", "1 of 2")
    assert page._best(trials[2:]) == ("none", "diverged", "0 of 1")


@pytest.mark.parametrize(
    "changed", [{"rows": [], "curves": []}, {"trials": []}, {"spectra": []}, {"log_loss": True}], ids=str
)
def test_parts_that_are_missing_leave_no_hole(changed, tmp_path):
    result_of(**changed).report(tmp_path / "race.html")
    read = Reader((tmp_path / "race.html").read_text(encoding="utf-8"))
    assert not read.wrong
    assert len(read.all("section")) == (3 if "log_loss" in changed else 2)


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


def test_a_style_of_its_own_for_thirty_two():
    names = [str(k) for k in range(32)]
    assert len(set(palette.styles(names).values())) == 32
    assert palette.styles(["sgd", "muon"])["muon"] == palette.Style(palette.LIGHT[-1], "-")


def browser():
    """Where a browser is; None only where nobody has asked for one."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found or not os.environ.get("OPTIMORPH_BROWSER"), f"none of {', '.join(BROWSERS)} is installed"
    return found


def browse(program, page, folder, scheme, *arguments):
    """Run it headless; `scheme` is 1 for light and 0 for dark, as the browser counts."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    flags += ["--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}", "--force-device-scale-factor=1"]
    flags += [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}"]
    done = subprocess.run(
        [program, *flags, *arguments, page.as_uri()], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BOXES = """<script>document.body.dataset.boxes = JSON.stringify(
[...document.querySelectorAll("figure > svg, table, tbody th > svg")].map(e => e.getBoundingClientRect())
)</script>"""


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_seen_in_a_browser(scheme, written, tmp_path):
    """Curves and table are where the browser says they are, in the colours of the scheme."""
    program = browser()
    if program is None:
        return  # the document itself is read above; where this is set, nobody may lack a browser
    measured = tmp_path / "measured.html"
    measured.write_text(
        written.read_text(encoding="utf-8").replace("</body>", BOXES + "</body>"), encoding="utf-8"
    )
    dumped = Reader(browse(program, measured, tmp_path, 1 - scheme, "--dump-dom"))
    boxes = json.loads(dumped.all("body")[0][0]["data-boxes"])
    picture = tmp_path / "picture.png"
    browse(program, written, tmp_path, 1 - scheme, f"--screenshot={picture}")
    pixels = np.round(255 * matplotlib.image.imread(picture)[..., :3]).astype(int)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    curves, table = boxes[0], boxes[1]
    colors = (palette.LIGHT, palette.DARK)[scheme]
    assert tuple(pixels[5, 5]) == rgb(palette.PAPER[scheme])
    plotted = part(pixels, curves)[:, : int(0.8 * curves["width"])]  # beside the legend
    for color in colors:
        assert count(plotted, color) > 100, color
        assert count(part(pixels, table), color) > 20, color
    assert curves["width"] > 800
    assert table["top"] > curves["bottom"]
    swatches = [box for box in boxes[2:] if box["width"] < 60 and box["top"] < table["bottom"]]
    assert len(swatches) == 8
    for box, color in zip(swatches, reversed(colors), strict=True):
        assert count(part(pixels, box), color) > 20
        line = part(pixels, {**table, "top": box["top"], "bottom": box["bottom"]})[:, 60:]
        assert count(line, palette.INK[scheme]) > 20  # the row's words and figures


def part(pixels, box):
    return pixels[int(box["top"]) : int(box["bottom"]), int(box["left"]) : int(box["right"])]


def rgb(color):
    return tuple(int(color[k : k + 2], 16) for k in (1, 3, 5))


def count(pixels, color):
    """How many have this colour."""
    return int(np.all(np.abs(pixels - rgb(color)) <= 2, axis=-1).sum())
