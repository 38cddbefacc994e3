"""Where Muon's lead over AdamW ends: small and large batches, weight decay, and the other's checkpoint.

    python benchmarks/lead.py           # train what `results/lead.json` does not have yet, and draw
    python benchmarks/lead.py --draw    # draw only

The model is the GPT of `optimorph race`, 32 wide. Every case has a rate of its own, as in `transfer.py`: by
factors of two, until the best one has a tried rate on each side. From a checkpoint, the rates of matrices and
of the other leaves change by the same factor, as both may be too large for a trained model.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import transfer
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

import optimorph as om
from optimorph._racing.palette import LIGHT
from optimorph._racing.palette import OPTIMIZERS as STYLES
from optimorph._racing.plot import SETTINGS
from optimorph._racing.tasks import text

WIDTH, STEPS, CHECKPOINT_STEPS = 32, 128, 512
COMEDIES = 834_570  # the character where six tragedies end and two comedies begin
RESULTS = Path(__file__).parent / "results" / "lead.json"
FIRST = {"adamw": -8, "muon": -5}
COLORS = {name: STYLES[name].color for name in FIRST}


class Case(NamedTuple):
    """What is trained. `after` is the optimizer of the checkpoint that training begins from."""

    optimizer: str
    batch: int = 12
    steps: int = STEPS
    decay: float = 0.0
    after: str | None = None


BATCHES = (8, 16, 32, 64, 128)
DECAYS = (0.0, 0.1, 0.4)
CASES = (
    {f"{steps} steps, decay {d:g}": Case("muon", 12, steps, d) for steps in (128, 512) for d in DECAYS}
    | {f"{old}, then {new}": Case(new, after=old) for old in FIRST for new in FIRST}
    | {f"batch {batch}, {name}": Case(name, batch) for batch in BATCHES for name in FIRST}
)


def make(case: Case):
    """A function (rate, transform of the other leaves) → optimizer."""
    if case.optimizer == "adamw":
        return transfer.adamw
    return lambda rate, others: om.muon(rate, weight_decay=case.decay, others=others)


def checkpoint(name):
    """Every seed's parameters after training on the tragedies."""
    task = text.task(WIDTH, plays=slice(0, COMEDIES))
    run = transfer.trainer(make(Case(name)), task, CHECKPOINT_STEPS)
    _, params = run(2.0 ** FIRST[name])
    return params


def runner(case: Case):
    """A function exponent → the losses of all seeds."""
    if case.after is None:
        run = transfer.trainer(make(case), text.task(WIDTH, case.batch), case.steps)
        return lambda exponent: run(2.0**exponent)[0]
    task = text.task(WIDTH, plays=slice(COMEDIES, None))
    run = transfer.trainer(make(case), task, case.steps, checkpoint(case.after))
    return lambda exponent: run(2.0**exponent, transfer.OTHERS * 2.0 ** (exponent - FIRST[case.optimizer]))[0]


def train(record):
    """Train every case, beginning at the best rate of the last one; write the record after each rate."""
    firsts = dict(FIRST)
    for name, case in CASES.items():
        entry = record["cases"].setdefault(name, {"losses": {}})
        losses, run = transfer.unpacked(entry["losses"]), None
        while (exponent := transfer.next_exponent(losses, firsts[case.optimizer], reach=1)) is not None:
            run = run or runner(case)
            losses[exponent] = run(exponent)
            entry["losses"] = transfer.packed(losses)
            print(f"{name:<24} rate 2^{exponent:<4} loss {transfer.mean(losses[exponent]):.4f}", flush=True)
            transfer.write(record | transfer.machine(), RESULTS)
        firsts[case.optimizer] = min(losses, key=lambda k: transfer.mean(losses[k]))


def best_of(record):
    """Case → its best rate as a power of 2, the losses with it; of finished cases."""
    found = {}
    for name, entry in record["cases"].items():
        losses = transfer.unpacked(entry["losses"])
        if transfer.next_exponent(losses, 0, reach=1) is None:
            exponent = min(losses, key=lambda k: transfer.mean(losses[k]))
            found[name] = {
                "exponent": exponent,
                "factor": exponent - FIRST[CASES[name].optimizer],
                "losses": losses[exponent],
            }
    return found


def draw(record):
    """Three panels: losses over batches, what decay changes, and losses over the factor of the rates."""
    best = record["best"]
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        batches, decays, checkpoints = figure.subplots(1, 3)
        for name in FIRST:
            each = {batch: best.get(f"batch {batch}, {name}") for batch in BATCHES}
            each = {batch: found["losses"] for batch, found in each.items() if found}
            _bars(batches, [*each], [*each.values()], COLORS[name], name)
        batches.set(title="batch", xlabel="windows in a batch", ylabel="loss (nats per character)")
        batches.set_xscale("log")
        batches.set_xticks(BATCHES, map(str, BATCHES), minor=False)
        batches.minorticks_off()
        for steps, color in zip((128, 512), (LIGHT[2], LIGHT[0]), strict=True):
            each = [np.array(best[f"{steps} steps, decay {decay:g}"]["losses"]) for decay in DECAYS]
            _bars(decays, DECAYS, [losses - each[0] for losses in each], color, f"{steps} steps")
        decays.set(title="decay of Muon", xlabel="weight decay", ylabel="change of the loss")
        for name, case in CASES.items():
            if case.after and name in best:
                losses = transfer.unpacked(record["cases"][name]["losses"])
                factors = [k - FIRST[case.optimizer] for k in losses]
                line = "-" if case.after == case.optimizer else "--"
                means = [transfer.mean(each) for each in losses.values()]
                label = name.replace(", then ", " → ")
                checkpoints.plot(factors, means, "o" + line, color=COLORS[case.optimizer], label=label)
        checkpoints.set(title="from a checkpoint", xlabel="factor of rates", ylabel="loss on the comedies")
        checkpoints.xaxis.set_major_locator(MaxNLocator(integer=True))
        checkpoints.xaxis.set_major_formatter(FuncFormatter(lambda exponent, _: f"2^{exponent:.0f}"))
        for axes in (batches, decays, checkpoints):
            axes.grid()
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, fontsize="small")
        figure.savefig(RESULTS.with_suffix(".png"), dpi=130)


def _bars(axes, x, losses, color, label):
    """The means of the seeds, with their standard deviations."""
    means, spreads = np.mean(losses, axis=1), np.std(losses, axis=1, ddof=1)
    axes.errorbar(x, means, spreads, fmt="o-", color=color, label=label, capsize=3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="draw the picture of the recorded losses only")
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cases": {}}
    record["command"] = "python benchmarks/lead.py"
    if not parser.parse_args().draw:
        train(record)
    record = json.loads(RESULTS.read_text())
    record["best"] = best_of(record)
    transfer.write(record, RESULTS)
    draw(record)


if __name__ == "__main__":
    main()
