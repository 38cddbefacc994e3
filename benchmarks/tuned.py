"""Every optimizer of `optimorph race`, tuned alike: as many candidates, the same data and seeds for each.

    python benchmarks/tuned.py [--steps N] [--lanes N] [--after FILE] [--out FILE] [optimizer ...]

A candidate is a learning rate, a second one for leaves that are not matrices, and a third number such as the
weight decay. Every optimizer has 45 candidates. All of them train for a quarter of the steps, the better
third for half of the steps, and the better third of those to the end (successive halving; Jamieson &
Talwalkar, 2016, arXiv:1502.07943). The two of the lowest loss on the tuning data train again with two more
seeds, which choose the best one. Three more seeds of it give the reported losses, on the validation data,
which nothing was chosen by. The candidate is an argument of the compiled program. With `--lanes 45,15,5` a
program trains so many candidates at once, which is faster on GPUs and slower on CPUs. With `--after FILE` the
candidates are the best ones of another record, `--best` many. Products of the models have float32 precision,
also on GPUs.

Writes `benchmarks/results/tuned/text-N.json`, after each optimizer. Optimizers that the file has are not
trained again. On one CPU core an optimizer takes about ten minutes for 250 steps.
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
from optimorph._racing.tasks import text

CANDIDATES, EVALUATIONS = 45, 10
RUNGS = (0.25, 0.5)  # shares of the steps after which only the better third goes on
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
      lowest: the lowest learning rate, as a power of two.
      others: rates of leaves that are not matrices; (0,) if the optimizer has one rate.
      third: values of the third number.
      varied: its name.
    """

    make: Callable[..., Any]
    lowest: float
    others: Sequence[float] = (0.0,)
    third: Sequence[float] = (0.0,)
    varied: str = ""

    def candidates(self) -> list[Candidate]:
        """45, on a grid, whose learning rates span four to nine factors of two."""
        count = CANDIDATES // (len(self.others) * len(self.third))
        rates = [2.0 ** (self.lowest + k * min(1, 9 / count)) for k in range(count)]
        return [Candidate(*values) for values in itertools.product(rates, self.others, self.third)]


def alone(recipe, varied, **arguments):
    """A recipe of all leaves, whose third number is the argument of that name."""
    return lambda rate, others, third, task: recipe(rate, **{varied: third}, **arguments)


OTHERS = (2.0**-6, 2.0**-4, 2.0**-2)  # learning rates of the leaves that are not matrices
SMALL, FAST = (2.0**-10, 2.0**-8, 2.0**-6), (2.0**-4, 2.0**-3, 2.0**-2)
DECAYS, LARGE_DECAYS = (0.1, 0.4, 1.6), (0.4, 1.6, 6.4)


def matrices(make, lowest, others=OTHERS, decays=DECAYS):
    """The study of an optimizer of the race with two rates and weight decay: 5 x 3 x 3."""

    def decayed(rate, others, decay, task):
        return make(rate, others, dataclasses.replace(task, weight_decay=decay))

    return Study(decayed, lowest, others, decays, "weight_decay")


def of_constant_norm(make, lowest, others):
    """The study of an optimizer of the race that keeps norms, without weight decay: 9 rates x 5."""
    return Study(lambda rate, second, third, task: make(rate, second, task), lowest, others)


B2S, MOMENTA = (0.9, 0.95, 0.99), (0.6, 0.8, 0.9)
STUDIES: Mapping[str, Study] = {
    "sgd": Study(lambda rate, others, third, task: om.sgd(rate), -7),
    "momentum": Study(alone(om.sgd, "momentum"), -8, third=MOMENTA, varied="momentum"),
    "nesterov": Study(alone(om.sgd, "momentum", nesterov=True), -8, third=MOMENTA, varied="momentum"),
    "adagrad": Study(lambda rate, others, third, task: om.adagrad(rate), -8),
    "rmsprop": Study(alone(om.rmsprop, "decay"), -14, third=(0.9, 0.99, 0.999), varied="decay"),
    "adam": Study(alone(om.adam, "b2"), -14, third=B2S, varied="b2"),
    "nadam": Study(alone(om.nadam, "b2"), -14, third=B2S, varied="b2"),
    "adamw": matrices(OPTIMIZERS["adamw"].make, -12, FAST, LARGE_DECAYS),
    "nadamw": matrices(OPTIMIZERS["nadamw"].make, -12, FAST, LARGE_DECAYS),
    "laprop": matrices(OPTIMIZERS["laprop"].make, -13, FAST, LARGE_DECAYS),
    "lion": matrices(OPTIMIZERS["lion"].make, -15, FAST, LARGE_DECAYS),
    "ademamix": matrices(OPTIMIZERS["ademamix"].make, -14, FAST, LARGE_DECAYS),
    "mars_adamw": matrices(OPTIMIZERS["mars_adamw"].make, -12, FAST, LARGE_DECAYS),
    "muon": matrices(OPTIMIZERS["muon"].make, -6),
    "normuon": matrices(OPTIMIZERS["normuon"].make, -6),
    "adamuon": matrices(OPTIMIZERS["adamuon"].make, -10),
    "muon2": matrices(OPTIMIZERS["muon2"].make, -6),
    "muonh": of_constant_norm(OPTIMIZERS["muonh"].make, -8, tuple(2.0**k for k in range(-7, -2))),
    "adamh": of_constant_norm(OPTIMIZERS["adamh"].make, -12, tuple(2.0**k for k in range(-6, -1))),
    "scion": Study(alone(om.scion, "momentum"), -16, third=MOMENTA, varied="momentum"),
    "soap": matrices(OPTIMIZERS["soap"].make, -8, SMALL, LARGE_DECAYS),
    "klsoap": matrices(OPTIMIZERS["klsoap"].make, -9, SMALL, LARGE_DECAYS),
    "shampoo": matrices(OPTIMIZERS["shampoo"].make, -9, SMALL, LARGE_DECAYS),
    "soap_muon": matrices(OPTIMIZERS["soap_muon"].make, -6),
}


class Program:
    """The compiled functions of an optimizer on a task, with a new first axis for the trainings."""

    def __init__(self, study: Study, task: Task, steps: int, lanes: Sequence[int]):
        """Compile nothing yet.

        Args:
          study: makes the optimizer of a candidate.
          task: has the model and the data.
          steps: of the schedules.
          lanes: numbers of trainings that a program may have; the largest one first.
        """

        def optimizer(candidate):
            rates = (task.schedule(rate, steps) for rate in candidate[:2])
            return study.make(*rates, candidate.third, task)

        def advance(params, state, candidate, batch):
            gradients = jax.grad(task.loss)(params, batch)
            updates, state = optimizer(candidate).update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        def init(candidate, params):
            return optimizer(candidate).init(params)

        state = jax.eval_shape(init, Candidate(0.0, 0.0, 0.0), jax.eval_shape(lambda: task.init(0)))
        axes = jax.tree.map(lambda x: None if jnp.issubdtype(x.dtype, jnp.integer) else 0, state)
        self.task, self.lanes, self.axes = task, lanes, axes
        self.held_out = {part: list(task.held_out(part)) for part in ("tuning", "validation")}
        self.init = jax.jit(jax.vmap(init, out_axes=axes))
        mapped = jax.vmap(advance, (0, axes, 0, 0), (0, axes))  # one count of steps for all trainings
        self.advance = jax.jit(mapped, donate_argnums=(0, 1))
        self.loss = jax.jit(jax.vmap(task.loss, (0, None)))

    def groups(self, trainings: Sequence[tuple[Candidate, int]]) -> list["Group"]:
        """Trainings of candidates and seeds, as many in each group as fit into a program."""
        return [
            Group(self, trainings[k : k + self.lanes[0]]) for k in range(0, len(trainings), self.lanes[0])
        ]


class Group:
    """Trainings that go on side by side in one program, and the step that they have reached."""

    def __init__(self, program: Program, trainings: Sequence[tuple[Candidate, int]]):
        """Take no step yet."""
        self.program, self.trainings, self.step = program, list(trainings), 0
        filled = [trainings[k] for k in self._filled(range(len(trainings)))]
        inits = {seed: program.task.init(seed) for _, seed in filled}
        self.batches = {seed: program.task.batches(seed) for seed in inits}
        self.candidates = stacked([jax.tree.map(np.float32, candidate) for candidate, _ in filled])
        self.params = stacked([inits[seed] for _, seed in filled])
        self.state = program.init(self.candidates, self.params)

    def _filled(self, indices: Sequence[int]) -> list[int]:
        """The last one is repeated until there are as many as a program has."""
        size = min(lanes for lanes in self.program.lanes if lanes >= len(indices))
        return [*indices, *[indices[-1]] * (size - len(indices))]

    def train(self, steps: int) -> "Group":
        """Go on until so many steps are taken."""
        for _ in range(steps - self.step):
            batches = {seed: next(each) for seed, each in self.batches.items()}
            batch = stacked([batches[self.trainings[k][1]] for k in self._filled(range(len(self.trainings)))])
            self.params, self.state = self.program.advance(self.params, self.state, self.candidates, batch)
        self.step = steps
        return self

    def losses(self, part: str) -> list[tuple[float, Candidate]]:
        """The loss of every training on held-out data, infinite if it is not finite, and its candidate."""
        batches = self.program.held_out[part]
        losses = np.mean([self.program.loss(self.params, batch) for batch in batches], 0).tolist()
        return [
            (loss if math.isfinite(loss) else math.inf, candidate)
            for loss, (candidate, _) in zip(losses, self.trainings, strict=False)
        ]

    def keep(self, candidates: Sequence[Candidate]) -> "Group":
        """End the trainings of all other candidates."""
        kept = [k for k, (candidate, _) in enumerate(self.trainings) if candidate in candidates]
        indices = np.array(self._filled(kept))
        self.trainings = [self.trainings[k] for k in kept]
        self.candidates, self.params = jax.tree.map(lambda x: x[indices], (self.candidates, self.params))
        self.state = jax.tree.map(
            lambda axis, x: x if axis is None else x[indices],
            self.program.axes,
            self.state,
            is_leaf=lambda x: x is None,
        )
        return self


def stacked(trees):
    return jax.tree.map(lambda *x: jnp.stack(x) if isinstance(x[0], jax.Array) else np.stack(x), *trees)


def losses_of(groups: Sequence[Group], steps: int, part: str) -> list[tuple[float, Candidate]]:
    return [each for group in groups for each in group.train(steps).losses(part)]


def tuned(
    study: Study, candidates: Sequence[Candidate], task: Task, steps: int, lanes: Sequence[int]
) -> dict[str, Any]:
    """The losses of all candidates, the best candidate, and its validation losses."""
    began = time.perf_counter()
    program = Program(study, task, steps, lanes)
    groups = program.groups([(candidate, CHOICE_SEEDS[0]) for candidate in candidates])
    tried = []
    for share in RUNGS:
        step = round(share * steps)
        reached = sorted(losses_of(groups, step, "tuning"))
        third = -(-len(reached) // 3)
        kept = [candidate for _, candidate in reached[:third]]
        tried = _tried(reached[third:], step) + tried
        alive = [group for group in groups if any(candidate in kept for candidate, _ in group.trainings)]
        groups = [group.keep(kept) for group in alive]
    reached = sorted(losses_of(groups, steps, "tuning"))
    tried = _tried(reached, steps) + tried
    finals = {candidate: [loss] for loss, candidate in reached[:2]}
    seeds = CHOICE_SEEDS[1:] if len(finals) > 1 else ()
    again = program.groups([(candidate, seed) for candidate in finals for seed in seeds])
    for loss, candidate in losses_of(again, steps, "tuning"):
        finals[candidate].append(loss)
    best = min(finals, key=lambda candidate: statistics.mean(finals[candidate]))
    at = [*range(steps // EVALUATIONS, steps + 1, steps // EVALUATIONS)]
    reported = program.groups([(best, seed) for seed in REPORT_SEEDS])
    curves = [[_number(loss) for loss, _ in losses_of(reported, step, "validation")] for step in at]
    return {
        "varied": study.varied,
        "candidates": tried,
        "finalists": [[*candidate, *map(_number, losses)] for candidate, losses in finals.items()],
        "best": best._asdict(),
        "steps": at,
        "curves": [list(curve) for curve in zip(*curves, strict=True)],
        "seconds": round(time.perf_counter() - began),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "lanes": list(lanes),
    }


def _tried(reached: Sequence[tuple[float, Candidate]], step: int) -> list[list[Any]]:
    """As rows of the record: those that ended after so many steps."""
    return [[*candidate, step, _number(loss)] for loss, candidate in reached]


def _number(x):
    return round(float(x), 4) if math.isfinite(x) else None


def best_of(record: Path, name: str, count: int) -> list[Candidate]:
    """The best candidates of another record: the chosen one, and those that trained for the most steps."""
    row = json.loads(record.read_text())["optimizers"][name]
    tried = [Candidate(**row["best"]), *(Candidate(*each[:3]) for each in row["candidates"])]
    return list(dict.fromkeys(tried))[:count]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("optimizers", nargs="*", help=f"of {', '.join(STUDIES)}; all without")
    parser.add_argument("--steps", type=int, default=250, help=f"a multiple of {EVALUATIONS}")
    parser.add_argument(
        "--lanes", default="1", help="trainings in a program, the largest number first: 45,15,5"
    )
    parser.add_argument("--after", type=Path, help="the JSON file of another record, for its best candidates")
    parser.add_argument("--best", type=int, default=9, help="how many of them")
    parser.add_argument("--out", type=Path, help=f"a JSON file; in {RESULTS} without")
    args = parser.parse_args()
    if unknown := set(args.optimizers) - set(STUDIES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}. Type some of {', '.join(STUDIES)}.")
    steps, lanes = args.steps, [int(each) for each in args.lanes.split(",")]
    if steps % EVALUATIONS:
        parser.error(f"--steps {steps} is not a multiple of {EVALUATIONS}")
    out = args.out or RESULTS / f"text-{steps}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(out.read_text()) if out.exists() else {}
    record |= {"command": f"python benchmarks/tuned.py --steps {steps}", "steps": steps}
    rows = record.setdefault("optimizers", {})
    for name in args.optimizers or STUDIES:
        if name not in rows:
            study, after = STUDIES[name], args.after
            candidates = best_of(after, name, args.best) if after else study.candidates()
            with jax.default_matmul_precision("float32"):
                rows[name] = tuned(study, candidates, text.task(), steps, lanes)
            last = [curve[-1] for curve in rows[name]["curves"]]
            print(name, rows[name]["best"], last, rows[name]["seconds"], "s", flush=True)
            write(record | machine(), out)


if __name__ == "__main__":
    main()
