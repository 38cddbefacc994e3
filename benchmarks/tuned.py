"""Every optimizer of `optimorph race`, tuned alike: as many candidates, the same data and seeds for each.

    python benchmarks/tuned.py [--task TASK] [--steps N] [--after FILE] [--out FILE] [optimizer ...]

A candidate is a learning rate, a second one for leaves that are not matrices, and a third number such as the
weight decay. Every optimizer has 72 candidates. They train together, as the lanes of one vmapped program,
with one seed. The twelve of the lowest loss on the tuning data train again in the same program, with three
seeds for the choice of the best and three others for the report: its loss on the validation data, which
nothing was chosen by. With `--after FILE`, the candidates are the 18 best ones of a shorter training, and
three of them train again. Products of the models have float32 precision, also on GPUs.

Writes `benchmarks/results/tuned/TASK-N.json`, after each optimizer. Optimizers that the file has are not
trained again. All lanes are in memory at once: on GPUs the study takes minutes, on CPUs hours.
"""

import argparse
import dataclasses
import itertools
import json
import math
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
from optimorph._racing.registry import B2, OPTIMIZERS, beside_adamw, for_matrices
from optimorph._racing.task import Task
from optimorph._racing.tasks import digits, flights, text

TASKS = {"text": text.task, "digits": digits.task, "flights": flights.task}
CANDIDATES, KEPT, EVALUATIONS = 72, 18, 25
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
        """72, on a grid, whose learning rates span some six to nine factors of two."""
        count = CANDIDATES // (len(self.others) * len(self.third))
        factor = 2 ** min(1, 9 / count)
        rates = [2.0**self.first * factor**k for k in range(count)]
        return [Candidate(*values) for values in itertools.product(rates, self.others, self.third)]


def alone(recipe, varied, **arguments):
    """A recipe of all leaves, whose third number is the argument of that name."""
    return lambda rate, others, third, task: recipe(rate, **{varied: third}, **arguments)


def matrices(make, first, others=(2.0**-9, 2.0**-7, 2.0**-5, 2.0**-3)):
    """The study of an optimizer of the race with two rates and weight decay: 6 x 4 x 3."""

    def decayed(rate, others, decay, task):
        return make(rate, others, dataclasses.replace(task, weight_decay=decay))

    return Study(decayed, first, others, (0.1, 0.4, 1.6), "weight_decay")


B2S, MOMENTA = (0.95, 0.99, 0.999), (0.8, 0.9, 0.95)
FAST = (2.0**-7, 2.0**-5, 2.0**-3, 2.0**-1)  # learning rates of other leaves
STUDIES: Mapping[str, Study] = {
    "sgd": Study(lambda rate, others, third, task: om.sgd(rate), -7),
    "momentum": Study(alone(om.sgd, "momentum"), -8, third=MOMENTA, varied="momentum"),
    "nesterov": Study(alone(om.sgd, "momentum", nesterov=True), -8, third=MOMENTA, varied="momentum"),
    "adagrad": Study(lambda rate, others, third, task: om.adagrad(rate), -8),
    "rmsprop": Study(alone(om.rmsprop, "decay"), -14, third=(0.9, 0.99, 0.999), varied="decay"),
    "adam": Study(alone(om.adam, "b2"), -14, third=B2S, varied="b2"),
    "nadam": Study(alone(om.nadam, "b2"), -14, third=B2S, varied="b2"),
    "laprop": Study(alone(om.laprop, "b2"), -14, third=B2S, varied="b2"),
    "lion": Study(alone(om.lion, "weight_decay", b2=B2), -16, third=(0.0, 0.1, 1.0), varied="weight_decay"),
    "adamh": Study(alone(om.adamh, "b2"), -10, third=B2S, varied="b2"),
    "adamw": matrices(OPTIMIZERS["adamw"], -12, FAST),
    "nadamw": matrices(beside_adamw(om.nadamw, b2=B2), -12, FAST),
    "ademamix": matrices(OPTIMIZERS["ademamix"], -15, FAST),
    "mars_adamw": matrices(OPTIMIZERS["mars_adamw"], -12, FAST),
    "muon": matrices(OPTIMIZERS["muon"], -7),
    "normuon": matrices(OPTIMIZERS["normuon"], -7),
    "adamuon": matrices(OPTIMIZERS["adamuon"], -12),
    "muon2": matrices(OPTIMIZERS["muon2"], -7),
    "muonh": Study(
        lambda rate, others, third, task: OPTIMIZERS["muonh"](rate, others, task),
        -9,
        tuple(2.0**k for k in range(-9, -1)),
    ),
    "scion": Study(alone(om.scion, "momentum"), -16, third=(0.8, 0.9, 0.95), varied="momentum"),
    "soap": matrices(OPTIMIZERS["soap"], -10),
    "klsoap": matrices(for_matrices(om.klsoap), -10),
    "shampoo": matrices(for_matrices(om.shampoo), -10),
    "soap_muon": matrices(for_matrices(om.soap_muon, every=10), -8),
}


class Lanes:
    """Copies of a model that train in one program, each with its own candidate and seed.

    Attributes:
      compile_seconds, run_seconds: what all calls of `train` took so far.
    """

    def __init__(self, study: Study, task: Task, steps: int):
        """Draw the batches of all seeds, and compile nothing yet."""
        self.task, self.steps, self.stride = task, steps, steps // EVALUATIONS
        self.seeds = (*CHOICE_SEEDS, *REPORT_SEEDS)
        streams = [list(itertools.islice(task.batches(seed), steps)) for seed in self.seeds]
        self.batches = jax.device_put(_stacked([_stacked(stream) for stream in streams]))
        self.starts = jax.device_put(_stacked([task.init(seed) for seed in self.seeds]))
        self.held_out = [_stacked(list(task.held_out(part))) for part in ("tuning", "validation")]

        def optimizer(candidate):
            rates = (task.schedule(rate, steps) for rate in candidate[:2])
            return study.make(*rates, candidate.third, task)

        def advance(params, state, candidate, seed, batches, first):
            tx = optimizer(candidate)

            def step(k, carry):
                params, state = carry
                gradients = jax.grad(task.loss)(params, jax.tree.map(lambda x: x[seed, k], batches))
                updates, state = tx.update(gradients, state, params)
                return optax.apply_updates(params, updates), state

            return jax.lax.fori_loop(first, first + self.stride, step, (params, state))

        def loss(params, held_out):
            return jnp.mean(jax.lax.map(lambda batch: task.loss(params, batch), held_out))

        self._init = jax.jit(jax.vmap(lambda candidate, params: optimizer(candidate).init(params)))
        self._advance = jax.jit(jax.vmap(advance, (0, 0, 0, 0, None, None)), donate_argnums=(0, 1))
        self._loss = jax.jit(jax.vmap(loss, (0, None)))
        self._compiled = None
        self.compile_seconds = self.run_seconds = 0.0

    def train(self, lanes: Sequence[tuple[Candidate, int]]) -> tuple[np.ndarray, np.ndarray]:
        """The last loss on the tuning data, by lane; those on the validation data, (evaluations, lanes).

        Args:
          lanes: pairs of candidate and seed, as many in every call.
        """
        candidates = jax.tree.map(lambda *x: jnp.asarray(x, jnp.float32), *(lane[0] for lane in lanes))
        seed = jnp.asarray([self.seeds.index(lane[1]) for lane in lanes])
        began = time.perf_counter()
        if self._compiled is None:
            with jax.default_matmul_precision("float32"):
                self._compiled = self._compile(candidates, seed)
            self.compile_seconds = time.perf_counter() - began
        return self._run(candidates, seed)

    def _compile(self, candidates, seed):
        params = jax.tree.map(lambda x: x[seed], self.starts)
        state = jax.eval_shape(self._init, candidates, params)
        advance = self._advance.lower(params, state, candidates, seed, self.batches, jnp.int32(0)).compile()
        return advance, *(self._loss.lower(params, held_out).compile() for held_out in self.held_out)

    def _run(self, candidates, seed):
        began, losses = time.perf_counter(), []
        advance, tuning, validation = self._compiled
        params = jax.tree.map(lambda x: x[seed], self.starts)
        state = self._init(candidates, params)
        for first in range(0, self.steps, self.stride):
            params, state = advance(params, state, candidates, seed, self.batches, jnp.int32(first))
            losses.append(validation(params, self.held_out[1]))
        last, losses = np.asarray(tuning(params, self.held_out[0])), np.stack(losses)
        self.run_seconds += time.perf_counter() - began
        return last, losses


def _stacked(trees):
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def tuned(study: Study, candidates: Sequence[Candidate], task: Task, steps: int) -> dict[str, Any]:
    """Losses of all candidates, the best one, and its validation losses."""
    lanes = Lanes(study, task, steps)
    first, _ = lanes.train([(each, CHOICE_SEEDS[0]) for each in candidates])
    finalists = np.argsort(_finite_or_inf(first))[: len(candidates) // len(lanes.seeds)]
    pairs = [(candidates[k], seed) for k in finalists for seed in lanes.seeds]
    tuning, validation = (x.reshape(*x.shape[:-1], -1, len(lanes.seeds)) for x in lanes.train(pairs))
    choice = _finite_or_inf(np.mean(tuning[:, : len(CHOICE_SEEDS)], axis=1))
    best = int(np.argmin(choice))
    return {
        "varied": study.varied,
        "candidates": [[*each, _number(loss)] for each, loss in zip(candidates, first, strict=True)],
        "finalists": [[*candidates[k], _number(loss)] for k, loss in zip(finalists, choice, strict=True)],
        "best": candidates[finalists[best]]._asdict(),
        "steps": [*range(lanes.stride, steps + 1, lanes.stride)],
        "curves": [[_number(x) for x in curve] for curve in validation[:, best, len(CHOICE_SEEDS) :].T],
        "compile_seconds": round(lanes.compile_seconds, 1),
        "run_seconds": round(lanes.run_seconds, 1),
    }


def _number(x):
    return round(float(x), 4) if math.isfinite(x) else None


def _finite_or_inf(x):
    return np.where(np.isfinite(x), x, np.inf)


def kept(record: Path, name: str) -> list[Candidate]:
    """The `KEPT` candidates of the lowest loss in another record."""
    tried = json.loads(record.read_text())["optimizers"][name]["candidates"]
    order = sorted(tried, key=lambda row: math.inf if row[-1] is None else row[-1])
    return [Candidate(*row[:-1]) for row in order[:KEPT]]


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
            rows[name] = tuned(STUDIES[name], candidates, task, steps)
            last = [curve[-1] for curve in rows[name]["curves"]]
            print(name, rows[name]["best"], last, rows[name]["run_seconds"], "s", flush=True)
            write(record | machine(), out)


if __name__ == "__main__":
    main()
