"""The tables of README and documentation: `python benchmarks/tables.py` writes them from recorded results.

A table stands below its mark, such as `<!-- table: race -->`, and ends at an empty line. So does the sentence
that says when and where a file of results was recorded, below a mark such as `<!-- recorded: race -->`.
"""

import dataclasses
import json
import math
import re
import statistics
import tomllib
from pathlib import Path

from optimorph._racing.comparisons import TARGET, losses_at_equal_seconds, steps_to_target
from optimorph._racing.race_data import Curve, RaceData

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))
_MARKED = re.compile(r"<!-- (table|recorded): ([\w/-]+) -->\n+(?:(?:\||Recorded ).*\n)*\n*")


def recorded(name):
    """The results in a file, such as "digits/race", or the conditions of a part, such as "state/costs"."""
    path = RESULTS / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    file, part = name.split("/")
    return recorded(file)["about"][part]


def filled(text):
    """The text with everything below a mark as it should be."""

    def below(mark):
        kind, name = mark.groups()
        content = _markdown(TABLES[name]()) if kind == "table" else _conditions(recorded(name))
        return f"<!-- {kind}: {name} -->\n\n{content}\n"

    return _MARKED.sub(below, text)


def _conditions(results):
    """When, on what and with which versions."""
    versions, device = results["versions"], results.get("device", results.get("devices"))
    if device == "cpu":
        device = f"{results['cores']} CPU cores"
    place = (
        ""
        if device is None
        else f" on {device}".replace("NVIDIA", "one NVIDIA").replace(" forced", " CPU devices")
    )
    shown = [
        f"{name} {versions[name]}" for name in ("jax", "optax", "flax", "libtpu", "torch") if name in versions
    ]
    return f"Recorded {results['date']}{place}, with {', '.join(shown)}.\n"


def _markdown(rows):
    """The first row has the titles."""
    titles, *_ = rows = list(rows)
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(titles), *lines[1:]]) + "\n"


def _pair(numbers, digits):
    return " / ".join(f"{number:.{digits}f}" for number in numbers)


def _loss(row, digits):
    return f"{row['loss']:.{digits}f} ± {row['spread']:.{digits}f}"


def _rates(row):
    """Of hidden matrices and, if it has one of its own, of all other leaves."""
    rates = (row[kind] for kind in ("learning_rate", "others_learning_rate"))
    return " / ".join(f"{rate:.3g}" for rate in rates if rate is not None)


def race():
    """The optimizers of the race on text."""
    yield (
        "optimizer",
        "validation loss, nats per character",
        "the same at equal seconds",
        f"steps to the loss of {TARGET}",
        "optimizer ms/step",
        "state B/param",
        "learning rate",
    )
    found = RaceData.read(RESULTS / "race.json")
    equal_seconds, to_target = losses_at_equal_seconds(found), steps_to_target(found)
    for row in recorded("race")["rows"]:
        yield (
            row["name"],
            _loss(row, 3),
            f"{equal_seconds[row['name']]:.3f}",
            to_target.get(row["name"], "-"),
            f"{row['optimizer_ms']:.1f}",
            f"{row['state_bytes_per_parameter']:.2f}",
            _rates(row),
        )


def others():
    """The optimizers that race by `--optimizers` only."""
    yield "optimizer", "validation loss", "state B/param", "learning rate"
    for row in recorded("others/text")["rows"]:
        yield row["name"], _loss(row, 3), f"{row['state_bytes_per_parameter']:.2f}", _rates(row)


def choice():
    """Optimizers on text, digits and flights."""
    yield "optimizer", "text: nats per character", "digits: nats per picture", "flights: nats per flight"
    files = {
        ("race", "others/text", "soap/text"): 3,
        ("digits/race", "soap/digits"): 4,
        ("flights/race", "soap/flights"): 3,
    }
    races = [
        {row["name"]: _loss(row, places) for name in names for row in recorded(name)["rows"]}
        for names, places in files.items()
    ]
    for name in dict.fromkeys(name for race in races for name in race):
        yield name, *(race.get(name, "-") for race in races)


def longer():
    """The race on text over more steps, most with the rates that were tuned for 250."""
    yield "steps", "optimizer", "learning rate", "seeds", "validation loss", f"steps to the loss of {TARGET}"
    races = [RaceData.read(path) for path in sorted((RESULTS / "longer").glob("*.json"))]
    for race in sorted(races, key=lambda race: (race.steps, -race.seeds)):
        to_target = steps_to_target(race)
        for row in race.rows:
            loss = _loss(vars(row), 3) if row.seeds > 1 else f"{row.loss:.3f}"
            steps = to_target.get(row.name, "-")
            yield f"{row.steps:,}", row.name, _rates(vars(row)), row.seeds, loss, steps


def rates():
    """The learning rates of these races."""
    tasks = ("text", "digits", "flights")
    yield "optimizer", *tasks
    rates = tomllib.loads((ROOT / "optimorph" / "_racing" / "learning_rates.toml").read_text())
    for name in rates["text"]:
        yield name, *(" / ".join(f"{x:g}" for x in rates[task][name].values()) for task in tasks)


def tuned():
    """Optimizers with as many candidates each, the lowest loss first."""
    yield (
        "optimizer",
        "learning rate",
        "third number",
        "validation loss",
        "the same at equal seconds",
        f"steps to the loss of {TARGET}",
        "optimizer ms/step",
        "state B/param",
    )
    found, studies = tuned_race(250), recorded("tuned/text-250")["optimizers"]
    equal_seconds, to_target = losses_at_equal_seconds(found), steps_to_target(found)
    for row in found.rows:
        study = studies[row.name]
        yield (
            row.name,
            _rates(vars(row)),
            f"{study['varied']} {study['best']['third']:g}" if study["varied"] else "-",
            _loss(vars(row), 3),
            f"{equal_seconds[row.name]:.3f}",
            to_target.get(row.name, "-"),
            f"{row.optimizer_ms:.1f}",
            f"{row.state_bytes_per_parameter:.2f}",
        )


def tuned_longer():
    """The optimizers that were tuned for more steps too; a star marks those with fewer candidates."""
    races = {steps: tuned_race(steps) for steps in (250, 1000, 4000)}
    yield "optimizer", *(f"{steps:,} steps: learning rate, loss, steps to {TARGET}" for steps in races)
    most = len(recorded("tuned/text-250")["optimizers"][TARGET]["candidates"])

    def cell(steps, name):
        row = next((row for row in races[steps].rows if row.name == name), None)
        if row is None:
            return "-"
        star = "" if len(recorded(f"tuned/text-{steps}")["optimizers"][name]["candidates"]) == most else " *"
        reached = steps_to_target(races[steps]).get(name, "-")
        return f"{_rates(vars(row))}, {_loss(vars(row), 3)}, {reached}{star}"

    for row in races[1000].rows:
        yield row.name, *(cell(steps, row.name) for steps in races)


def tuned_race(steps):
    """A study of `tuned.py` as a race, with the costs of another race."""
    study, costs = recorded(f"tuned/text-{steps}"), RaceData.read(RESULTS / "costs" / "race.json")
    rows, curves = [], []
    for row in costs.rows:
        if row.name in study["optimizers"]:
            found = study["optimizers"][row.name]
            last = [curve[-1] for curve in found["curves"]]
            rates = {"learning_rate": found["best"]["learning_rate"]}
            rates["others_learning_rate"] = found["best"]["others"] or None
            means = {"loss": statistics.fmean(last), "spread": statistics.stdev(last)}
            rows.append(dataclasses.replace(row, seeds=len(last), steps=steps, **means, **rates))
            curves += [Curve(row.name, k, found["steps"], [], each) for k, each in enumerate(found["curves"])]
    rows.sort(key=lambda row: row.loss)
    return dataclasses.replace(costs, steps=steps, rows=rows, curves=curves)


def widths():
    """The best learning rates of hidden matrices, as powers of two."""
    best = recorded("transfer")["best"]
    columns = sorted({width for each in best.values() for width in each}, key=int)
    yield "optimizer", *(f"width {width}" for width in columns), "steps of the grid, first to last"
    for name, each in best.items():
        grid = [each[width]["on_grid"] for width in columns if width in each]
        cells = [each.get(width) for width in columns]
        yield (
            name,
            *(f"{x['exponent']:.1f} ± {x['spread']:.1f}" if x else "-" for x in cells),
            f"{grid[-1] - grid[0]:+d}" if len(grid) > 1 else "-",
        )


def batches():
    """How far Muon ends below AdamW, for several batches."""
    yield "windows in a batch", "adamw", "muon", "adamw less muon"
    for batch, adamw, muon in _groups("batch (.+), adamw", "batch {}, adamw", "batch {}, muon"):
        leads = [a - b for a, b in zip(adamw["losses"], muon["losses"], strict=True)]
        yield batch, _spread(adamw["losses"]), _spread(muon["losses"]), _spread(leads)


def decays():
    """Muon with weight decay."""
    titles = [f"decay {decay}" for decay in ("0", "0.1", "0.4")]
    yield "steps", *titles
    for steps, *each in _groups("(.+) steps, decay 0", *(f"{{}} steps, {title}" for title in titles)):
        yield steps, *(_spread(found["losses"]) for found in each)


def checkpoints():
    """Trained with one optimizer, continued with another."""
    yield "checkpoint of", "continued with adamw", "continued with muon"
    for old, *each in _groups("(.+), then muon", "{}, then adamw", "{}, then muon"):
        yield old, *(f"{_spread(found['losses'])}, rates x 2^{found['factor']}" for found in each)


def _groups(pattern, *names):
    """For each case of `lead.py` of the first name: what the pattern finds in it, and other cases."""
    best = recorded("lead")["best"]
    for match in filter(None, (re.fullmatch(pattern, case) for case in best)):
        cases = [best.get(name.format(match[1])) for name in names]
        if None not in cases:
            yield match[1], *cases


def _spread(losses):
    return f"{statistics.fmean(losses):.3f} ± {statistics.stdev(losses):.3f}"


def pytorch():
    """A training in PyTorch and in JAX."""
    yield (
        "optimizer",
        "largest difference, 20 steps",
        "200 steps",
        "by one rounding error: 20 steps",
        "200 steps",
        "loss of the last 20 steps, JAX / PyTorch",
    )
    for name, row in recorded("torch_training")["cases"].items():
        keys = ("largest_in_20_steps", "largest", "noise_in_20_steps", "noise")
        yield name, *(f"{row[key]:.1e}" for key in keys), _pair((row["last_jax"], row["last_torch"]), 4)


def updates():
    """One update beside optax's, on a CPU."""
    yield (
        "update",
        "ms, optimorph / optax",
        "optax's time / ours",
        "compile s",
        "state B/param",
        "PyTorch ms",
    )
    for name, row in recorded("optimizers")["rows"].items():
        yield (
            name,
            _pair(row["ms"], 2),
            f"{row['ms'][1] / row['ms'][0]:.2f}",
            _pair(row["compile_seconds"], 2),
            _pair(row["state_bytes_per_parameter"], 2),
            f"{row['torch_ms']:.2f}" if row.get("torch_ms") else "-",
        )


def polar():
    """The polar factor alone, on a CPU."""
    yield (
        "stack of matrices",
        "ms, optimorph / optax",
        "optax's time / ours",
        "share of peak",
        "temporary B / B of the stack",
    )
    results = recorded("polar")
    for name, row in results["rows"].items():
        ours, theirs = row["ms"]["optimorph"], row["ms"]["optax"]
        yield (
            name,
            _pair((ours, theirs), 1),
            f"{theirs / ours:.2f}",
            f"{2e-4 * row['multiplications'] / ours / results['peak_gigaflops']:.0f}%",
            f"{row['temporary_bytes_per_byte']:.1f}",
        )


def polar_gpu():
    """The polar factor on a GPU."""
    yield "stack of matrices", "optimorph", "the standard iteration", "gram-newton-schulz", "optax, float32"
    for name, row in recorded("polar_gpu")["rows"].items():
        sides = ("optimorph", "optimorph, standard", "gram-newton-schulz", "optax")
        yield name, *(f"{row['ms'][side]:.1f}" if side in row["ms"] else "-" for side in sides)


def gpu():
    """One update on a GPU."""
    yield "update", "ms", "ms in a loop", "ms estimated", "compile s", "state B/param", "temporary B/param"
    for row in recorded("accelerator")["rows"]:
        row["estimate"] = 4e-3 * row.get("kernels", math.nan) + row.get("traffic_bytes", 0) / 3.35e9
        digits = {"looped_milliseconds": 2, "estimate": 2, "compile_seconds": 1}
        digits |= {"state_bytes": 2, "temporary_bytes": 2}
        known = {key for key in digits if math.isfinite(row.get(key, math.nan))}
        yield (
            row["name"] + (", stacked layers" if row["stacked"] else ""),
            f"{row['milliseconds']:.2f}",
            *(f"{row[key]:.{places}f}" if key in known else "-" for key, places in digits.items()),
        )


def state_costs():
    """Updates with state in fewer bytes."""
    yield "update", "state B/param", "temporary B/param", "time / that of float32", "compile s"
    for case, rows in recorded("state")["costs"]["updates"].items():
        for way, row in rows.items() if "where" not in case else ():
            numbers = (row[key] for key in ("state", "temporaries", "ratio", "compile_seconds"))
            yield f"{case}: {way}", *(f"{number:.2f}" for number in numbers)


def state_races():
    """Losses with float32 and with 8-bit state."""
    yield "task: optimizer", "loss, float32 state", "loss, 8-bit state", "state B/param"
    for task, names in recorded("state")["races"].items():
        for name, row in names.items():
            wide, small = row["float32"], row["8 bits"]
            yield (
                f"{task}: {name}",
                _loss(wide, 4),
                _loss(small, 4),
                _pair((wide["bytes"], small["bytes"]), 2),
            )


def state_peers():
    """8-bit AdamW of three libraries."""
    yield (
        "AdamW",
        "state B/param",
        "v / true v",
        *(f"largest update: {kind}" for kind in ("sparse", "log-normal", "its square")),
    )
    for name, row in recorded("state")["peers"].items():
        largest = (f"{x:.3g}" for x in row["largest"].values())
        yield name, f"{row['bytes']:.2f}", f"{row['v']:.3g}", *largest


def sharding():
    """Muon over 8 CPU devices beside optax's."""
    yield "layout", "Gflop", "least", "collectives", "MB sent", "least", "MB temporary", "compile s"
    for layout, row in recorded("sharding")["rows"].items():
        both, least = (row["optimorph"], row["optax"]), row["least"]
        yield (
            layout,
            _pair((x["flops"] / 1e9 for x in both), 0),
            f"{least['flops'] / 1e9:.0f}",
            " / ".join(str(sum(x["collectives"].values())) for x in both),
            _pair((x["sent"] / 1e6 for x in both), 1),
            f"{least['sent'] / 1e6:.1f}",
            _pair((x["temporary"] / 1e6 for x in both), 0),
            _pair((x["compile_seconds"] for x in both), 1),
        )


def planned():
    """Plans for large models, with matrices whole and divided."""
    yield "model", "matrices", "divided", "worst / mean", "GB sent", "inside", "ms of products + sending"
    rows = recorded("sharding")["planned"]
    for name, whole in rows.items():
        if ", divided" in name or "alone" in name:
            continue
        both = (whole, rows[f"{name}, divided"])
        yield (
            name,
            f"{whole['matrices']:,}",
            f"{both[1]['divided']:,}",
            _pair((x["worst_over_mean"] for x in both), 2),
            _pair((x["sent"] / 1e9 for x in both), 2),
            _pair((x["sent_inside"] / 1e9 for x in both), 2),
            " / ".join(" + ".join(f"{part:.0f}" for part in x["milliseconds"]) for x in both),
        )


def large():
    """Llama-3-8B compiled for 64 v5p, beside what the plan expects."""
    yield (
        "matrices",
        "Gflop",
        "planned",
        "MB sent",
        "planned",
        "collectives",
        "M cycles",
        "ms planned",
    )
    for way, row in recorded("accelerators")["large"].items():
        expected, cycles = row["expected"], row["mcycles"]
        yield (
            way,
            f"{row['gflop']:,.0f}",
            f"{expected['gflop']:,.0f}",
            f"{row['sent'] / 1e6:,.0f}",
            f"{expected['sent'] / 1e6:,.0f}",
            sum(row["collectives"].values()),
            f"{cycles['products']:.1f} + {cycles['rest']:.1f}",
            f"{expected['milliseconds'][0]:.1f}",
        )


def eigenbasis_mesh():
    """SOAP over 8 CPU devices, beside a port leaf by leaf."""
    yield (
        "layout",
        "Gflop of a refresh's QR",
        "Gflop of products",
        "collectives",
        "MB sent",
        "MB of state",
        "MB temporary",
        "compile s",
    )
    for layout, ways in recorded("eigenbasis")["mesh"].items():
        both = ways["soap"], ways["leaf by leaf"]
        yield (
            layout,
            _pair((x["qr_flops"] / 1e9 for x in both), 0),
            _pair((x["flops"] / 1e9 for x in both), 0),
            " / ".join(str(sum(x["collectives"].values())) for x in both),
            _pair((x["sent"] / 1e6 for x in both), 0),
            _pair((x["state"] / 1e6 for x in both), 0),
            _pair((x["temporary"] / 1e6 for x in both), 0),
            _pair((x["compile_seconds"] for x in both), 0),
        )


def eigenbasis_balance():
    """QR of the busiest device, over the mean."""
    yield "model", "devices", "at the owners", "balanced", "at best", "spread", "at best"
    names = ("owners", "balanced", "at_best", "spread", "spread_at_best")
    for model, rows in recorded("eigenbasis")["balance"].items():
        for devices, row in rows.items():
            yield model, devices, *(f"{row[name]:.2f}" for name in names)


def eigenbasis_first():
    """Losses on text, by how often the first steps refresh the bases."""
    yield "optimizer", "seed 0", "seed 1", "seed 2"
    race = RaceData.read(RESULTS / "soap" / "text.json")
    rows = {
        name: {str(c.seed): c.losses[-1] for c in race.curves if c.optimizer == name}
        for name in ("soap", "muon")
    }
    for name, losses in (rows | recorded("eigenbasis")["first"]).items():
        yield name, *(f"{losses[seed]:.3f}" if seed in losses else "-" for seed in "012")


def eigenbasis_steps():
    """Updates in an eigenbasis on a CPU, beside AdamW and Muon."""
    yield "model", "optimizer", "ms", "ms of a refresh", "ms of the first", "compile s", "state B/param"
    for model, rows in recorded("eigenbasis")["steps"].items():
        for name, row in rows.items():
            ms, stored = row["ms"], f"{row['state']:.2f}"
            if "soap" not in name:
                yield model, name, f"{ms['step']:.1f}", "-", "-", f"{row['compile_seconds']:.1f}", stored
                continue
            numbers = (f"{ms[kind]:.1f}" for kind in ("step", "refresh", "first"))
            yield model, name, *numbers, f"{row['compile_seconds']:.1f}", stored


def _work(row):
    return f"{sum(row['mcycles'].values()):.2f}" if row["mcycles"] else str(row["kernels"])


def meshes():
    """Muon compiled for meshes of accelerators."""
    yield "devices", "layout", "collectives", "Gflop", "MB temporary", "work"
    for mesh in ("v5p 2x2x2", "v5p 4x4x4", "H100 x 8"):
        for layout, ways in recorded("accelerators")["mesh"][mesh].items():
            rows = [ways.get(way) for way in ("found", "given", "explicit", "optax", "MaxText")]
            cells = (
                lambda row: sum(row["collectives"].values()),
                lambda row: f"{row['gflop']:.0f}",
                lambda row: f"{row['temporary'] / 1e6:.0f}",
                _work,
            )
            yield (
                mesh,
                layout,
                *(" / ".join("-" if row is None else str(cell(row)) for row in rows) for cell in cells),
            )


def recipes():
    """Muon, AdamW and their relatives compiled for meshes of accelerators."""
    yield (
        "optimizer",
        *(f"{devices}: collectives, MB sent, MB temporary, work" for devices in ("v5p 2x2x2", "H100 x 8")),
    )
    found = recorded("accelerators")["recipes"]
    for name in found["v5p 2x2x2"]:
        rows = (found[devices][name] for devices in ("v5p 2x2x2", "H100 x 8"))
        cells = (
            (sum(x["collectives"].values()), x["sent"] / 1e6, x["temporary"] / 1e6, _work(x)) for x in rows
        )
        yield name, *(f"{count}, {sent:.0f}, {held:.0f}, {work}" for count, sent, held, work in cells)


def chips():
    """Updates of GPT-2 small compiled for one chip."""
    yield "update", "v5p: M cycles, MB temporary, compile s", "H100: kernels, MB temporary, compile s"
    chip = recorded("accelerators")["chip"]
    for name in chip["v5p"]:
        rows = (chip[kind][name] for kind in ("v5p", "H100"))
        yield (
            name,
            *(f"{_work(x)}, {x['temporary'] / 1e6:.0f}, {x['compile_seconds']:.1f}" for x in rows),
        )


def probes():
    """What a measurement of probes costs."""
    yield "metrics", "updates", "default or usual period", "share of the updates"
    for name, row in recorded("probes")["rows"].items():
        yield name, f"{row['look']:.1f}", f"{row['every']:,} steps", f"{100 * row['share']:.1f} %"


def sweeps():
    """Many learning rates, in three ways."""
    yield "way", "compile s", "train s", "total s", "time / that of one vmap"
    for name, row in recorded("vmap")["recipes"]["adamw"]["rows"].items():
        seconds = (row[key] for key in ("compile_seconds", "train_seconds", "seconds"))
        yield name, *(f"{number:.1f}" for number in seconds), f"{row['ratio']:.2f}"


TABLES = {
    table.__name__: table
    for table in (
        race,
        others,
        choice,
        longer,
        rates,
        tuned,
        tuned_longer,
        widths,
        batches,
        decays,
        checkpoints,
        pytorch,
        updates,
        polar,
        polar_gpu,
        gpu,
        state_costs,
        state_races,
        state_peers,
        sharding,
        planned,
        eigenbasis_mesh,
        eigenbasis_balance,
        eigenbasis_first,
        eigenbasis_steps,
        large,
        meshes,
        recipes,
        chips,
        probes,
        sweeps,
    )
}

if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
