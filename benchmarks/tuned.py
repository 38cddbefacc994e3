"""Every optimizer of `optimorph race`, tuned alike: as many candidates, the same data and seeds for each.

    python benchmarks/tuned.py [--task TASK] [--steps N] [--after FILE] [--out FILE] [optimizer ...]

A candidate is a learning rate, a second one for leaves that are not matrices, and a third number such as the
weight decay. Every optimizer has 45 candidates. All of them train for a quarter of the steps, the better
third for half of the steps, and the better third of those to the end (successive halving; Jamieson &
Talwalkar, 2016, arXiv:1502.07943). The two of the lowest loss on the tuning data train again with two more
seeds, which choose the best one. Three more seeds of it give the reported losses, on the validation data,
which nothing was chosen by. An optimizer is compiled once, with the candidate as an argument. With
`--after FILE`, the candidates are the nine best ones of a shorter training. Products of the models have
float32 precision, also on GPUs.

Writes `benchmarks/results/tuned/TASK-N.json`, after each optimizer. Optimizers that the file has are not
trained again. On one CPU core an optimizer takes about ten minutes.
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from transfer import machine, write

import optimorph as om
from optimorph._racing.registry import OPTIMIZERS
from optimorph._racing.task import Task
from optimorph._racing.tasks import digits, flights, text

TASKS = {"text": text.task, "digits": digits.task, "flights": flights.task}
CANDIDATES, KEPT, EVALUATIONS = 45, 9, 10
RUNGS = (0.25, 0.5, 1.0)  # shares of the steps after which only the better third goes on
CHOICE_SEEDS, REPORT_SEEDS = (1000, 1001, 1002), (0, 1, 2)
RESULTS = Path(__file__).parent / "results" / "tuned"


class Candidate(NamedTuple):
    """Peak learning rates, and the number that `Study.varied` names."""

    learning_rate: Any
    others: Any
    third: Any


class Study(NamedTuple):
    """How an optimizer is tuned.

    Attributes:
      make: function (schedule, schedule of other leaves, third number, task) → optimizer.
      first: the lowest learning rate, as a power of two.
      others: rates of leaves that are not matrices; (0,) if the optimizer has one rate.
      third: values of the third number.
      varied: its name.
    """

    make: Callable[..., Any]
    first: float
    others: Sequence[float] = (0.0,)
    third: Sequence[float] = (0.0,)
    varied: str = ""

    def candidates(self) -> list[Candidate]:
        """45, on a grid, whose learning rates span four to nine factors of two."""
        count = CANDIDATES // (len(self.others) * len(self.third))
        factor = 2 ** min(1, 9 / count)
        rates = [2.0**self.first * factor**k for k in range(count)]
        return [Candidate(*values) for values in itertools.product(rates, self.others, self.third)]


def alone(recipe, varied, **arguments):
    """A recipe of all leaves, whose third number is the argument of that name."""
    return lambda rate, others, third, task: recipe(rate, **{varied: third}, **arguments)


def matrices(make, first, others=(2.0**-8, 2.0**-6, 2.0**-4)):
    """The study of an optimizer of the race with two rates and weight decay: 5 x 3 x 3."""

    def decayed(rate, others, decay, task):
        return make(rate, others, dataclasses.replace(task, weight_decay=decay))

    return Study(decayed, first, others, (0.1, 0.4, 1.6), "weight_decay")


def of_constant_norm(make, first, others):
    """The study of an optimizer of the race that keeps norms, without weight decay: 9 rates x 5."""
    return Study(lambda rate, second, third, task: make(rate, second, task), first, others)


B2S, MOMENTA = (0.95, 0.99, 0.999), (0.8, 0.9, 0.95)
FAST = (2.0**-5, 2.0**-3, 2.0**-1)  # learning rates of other leaves
STUDIES: Mapping[str, Study] = {
    "sgd": Study(lambda rate, others, third, task: om.sgd(rate), -7),
    "momentum": Study(alone(om.sgd, "momentum"), -8, third=MOMENTA, varied="momentum"),
    "nesterov": Study(alone(om.sgd, "momentum", nesterov=True), -8, third=MOMENTA, varied="momentum"),
    "adagrad": Study(lambda rate, others, third, task: om.adagrad(rate), -8),
    "rmsprop": Study(alone(om.rmsprop, "decay"), -14, third=(0.9, 0.99, 0.999), varied="decay"),
    "adam": Study(alone(om.adam, "b2"), -14, third=B2S, varied="b2"),
    "nadam": Study(alone(om.nadam, "b2"), -14, third=B2S, varied="b2"),
    "adamw": matrices(OPTIMIZERS["adamw"], -12, FAST),
    "nadamw": matrices(OPTIMIZERS["nadamw"], -12, FAST),
    "laprop": matrices(OPTIMIZERS["laprop"], -12, FAST),
    "lion": matrices(OPTIMIZERS["lion"], -15, FAST),
    "ademamix": matrices(OPTIMIZERS["ademamix"], -15, FAST),
    "mars_adamw": matrices(OPTIMIZERS["mars_adamw"], -13, FAST),
    "muon": matrices(OPTIMIZERS["muon"], -6),
    "normuon": matrices(OPTIMIZERS["normuon"], -6),
    "adamuon": matrices(OPTIMIZERS["adamuon"], -10),
    "muon2": matrices(OPTIMIZERS["muon2"], -6),
    "muonh": of_constant_norm(OPTIMIZERS["muonh"], -8, tuple(2.0**k for k in range(-7, -2))),
    "adamh": of_constant_norm(OPTIMIZERS["adamh"], -12, tuple(2.0**k for k in range(-6, -1))),
    "scion": Study(alone(om.scion, "momentum"), -16, third=(0.8, 0.9, 0.95), varied="momentum"),
    "soap": matrices(OPTIMIZERS["soap"], -10),
    "klsoap": matrices(OPTIMIZERS["klsoap"], -10),
    "shampoo": matrices(OPTIMIZERS["shampoo"], -10),
    "soap_muon": matrices(OPTIMIZERS["soap_muon"], -6),
}


class Training:
    """One candidate and one seed: parameters, state, and the step they have reached."""

    def __init__(self, program: "Program", candidate: Candidate, seed: int):
        """Draw the batches of the seed, and take no step yet."""
        self.program, self.candidate, self.step = program, candidate, 0
        self.batches = program.task.batches(seed)
        self.rates = jax.tree.map(jnp.float32, candidate)
        self.params = jax.tree.map(jnp.copy, program.task.init(seed))  # `advance` donates them
        self.state = program.init(self.rates, self.params)

    def train(self, steps: int) -> "Training":
        """Go on until so many steps are taken."""
        for batch in itertools.islice(self.batches, steps - self.step):
            self.params, self.state = self.program.advance(self.params, self.state, self.rates, batch)
        self.step = steps
        return self

    def loss(self, part: str) -> float:
        """The loss on held-out data, infinite if it is not finite."""
        loss = float(np.mean([self.program.loss(self.params, each) for each in self.program.held_out[part]]))
        return loss if math.isfinite(loss) else math.inf


class Program:
    """The compiled functions of all trainings of an optimizer on a task."""

    def __init__(self, study: Study, task: Task, steps: int):
        """Compile nothing yet."""

        def optimizer(candidate):
            rates = (task.schedule(rate, steps) for rate in candidate[:2])
            return study.make(*rates, candidate.third, task)

        def advance(params, state, candidate, batch):
            gradients = jax.grad(task.loss)(params, batch)
            updates, state = optimizer(candidate).update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.task = task
        self.held_out = {part: list(task.held_out(part)) for part in ("tuning", "validation")}
        self.init = jax.jit(lambda candidate, params: optimizer(candidate).init(params))
        self.advance = jax.jit(advance, donate_argnums=(0, 1))
        self.loss = jax.jit(task.loss)


def tuned(study: Study, candidates: Sequence[Candidate], task: Task, steps: int) -> dict[str, Any]:
    """The losses of all candidates, the best candidate, and its validation losses."""
    began = time.perf_counter()
    program = Program(study, task, steps)
    going = [Training(program, candidate, CHOICE_SEEDS[0]) for candidate in candidates]
    tried = []
    for share in RUNGS:
        reached = [(run.train(round(share * steps)).loss("tuning"), run) for run in going]
        reached.sort(key=lambda pair: pair[0])
        remain = 2 if share == 1.0 else -(-len(reached) // 3)
        going = [run for _, run in reached[:remain]]
        left = reached if share == 1.0 else reached[remain:]
        tried = [[*run.candidate, run.step, _number(loss)] for loss, run in left] + tried
    finalists = [(run.candidate, [run.loss("tuning"), *_losses(program, run, steps)]) for run in going]
    best, _ = min(finalists, key=lambda pair: statistics.mean(pair[1]))
    at, curves = [*range(steps // EVALUATIONS, steps + 1, steps // EVALUATIONS)], []
    for run in [Training(program, best, seed) for seed in REPORT_SEEDS]:
        curves.append([_number(run.train(step).loss("validation")) for step in at])
    return {
        "varied": study.varied,
        "candidates": tried,
        "finalists": [[*candidate, *map(_number, losses)] for candidate, losses in finalists],
        "best": best._asdict(),
        "steps": at,
        "curves": curves,
        "seconds": round(time.perf_counter() - began),
    }


def _losses(program, run, steps):
    """Those of the same candidate, with the other seeds of the choice."""
    trainings = [Training(program, run.candidate, seed) for seed in CHOICE_SEEDS[1:]]
    return [training.train(steps).loss("tuning") for training in trainings]


def _number(x):
    return round(float(x), 4) if math.isfinite(x) else None


def kept(record: Path, name: str) -> list[Candidate]:
    """The `KEPT` best candidates of another record: those that trained for the most steps come first."""
    tried = json.loads(record.read_text())["optimizers"][name]["candidates"]
    return [Candidate(*row[:3]) for row in tried[:KEPT]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("optimizers", nargs="*", help=f"of {', '.join(STUDIES)}; all without")
    parser.add_argument("--task", choices=TASKS, default="text")
    parser.add_argument("--steps", type=int, help=f"a multiple of {EVALUATIONS}; the task's own without")
    parser.add_argument("--after", type=Path, help="the JSON file of a shorter training")
    parser.add_argument("--out", type=Path, help=f"a JSON file; in {RESULTS} without")
    args = parser.parse_args()
    if unknown := set(args.optimizers) - set(STUDIES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}. Type some of {', '.join(STUDIES)}.")
    task = TASKS[args.task]()
    steps = args.steps or task.steps
    if steps % EVALUATIONS:
        parser.error(f"--steps {steps} is not a multiple of {EVALUATIONS}")
    out = args.out or RESULTS / f"{args.task}-{steps}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(out.read_text()) if out.exists() else {}
    after = f" --after {args.after.name}" if args.after else ""
    record |= {
        "command": f"python benchmarks/tuned.py --task {args.task} --steps {steps}{after}",
        "steps": steps,
    }
    rows = record.setdefault("optimizers", {})
    for name in args.optimizers or STUDIES:
        if name not in rows:
            candidates = kept(args.after, name) if args.after else STUDIES[name].candidates()
            with jax.default_matmul_precision("float32"):
                rows[name] = tuned(STUDIES[name], candidates, task, steps)
            last = [curve[-1] for curve in rows[name]["curves"]]
            print(name, rows[name]["best"], last, rows[name]["seconds"], "s", flush=True)
            write(record | machine(), out)


if __name__ == "__main__":
    main()
