"""`optimorph.race`: the user's own loss, parameters and batches."""

import itertools
import math
import signal
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimorph as om
from optimorph._racing.custom_task import make_task
from optimorph._racing.registry import LearningRates
from optimorph._racing.result import RaceResult
from optimorph._racing.spectra import spectra
from optimorph._racing.sweep import bytes_per_rate
from optimorph._racing.training import CompiledTask, Run


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Matplotlib and Equinox are not written for strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


RNG = np.random.default_rng(0)
X = RNG.standard_normal((40, 6)).astype(np.float32)
Y = (X @ RNG.standard_normal((6, 3))).astype(np.float32)
BATCHES = [(X[k : k + 8], Y[k : k + 8]) for k in range(0, 32, 8)]
HELD_OUT = [(X[32:36], Y[32:36]), (X[36:], Y[36:])]


def loss(params, batch):
    x, y = batch
    return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)


def start(seed=0):
    kernel = np.random.default_rng(seed).standard_normal((6, 3)).astype(np.float32) / 3
    return {"kernel": kernel, "bias": np.zeros(3, np.float32)}


def race(optimizers, **changed):
    given = {"loss": loss, "params": start(), "batches": BATCHES, "held_out": HELD_OUT, "steps": 12}
    return om.race(**(given | {"optimizers": optimizers, "progress": False} | changed))


def by_hand(tx, params, batches, steps):
    """The plain loop; the held-out loss at its end."""
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    for k in range(steps):
        updates, state = tx.update(jax.grad(loss)(params, batches[k % len(batches)]), state, params)
        params = optax.apply_updates(params, updates)
    return np.mean([loss(params, batch) for batch in HELD_OUT])


@pytest.mark.slow
def test_rows_are_those_of_the_plain_loop():
    params = jax.tree.map(jnp.asarray, start())
    optimizers = {"adam": om.adam(0.05), "muon": om.muon(0.1), "theirs": optax.sgd(0.1)}
    result = race(optimizers, params=params)
    for row in result.rows:
        expected = by_hand(optimizers[row.name], start(), BATCHES, 12)
        assert row.loss == pytest.approx(expected, rel=1e-4)
        assert (row.steps, row.seeds, row.learning_rate) == (12, 1, None)
    assert [row.loss for row in result.rows] == sorted(row.loss for row in result.rows)
    assert result.finished
    np.testing.assert_array_equal(params["kernel"], start()["kernel"])  # neither donated nor changed


def test_prints_as_a_table():
    shown = str(race({"adam": om.adam(0.05), "sgd": om.sgd(0.1)}, title="six to three", measure="error"))
    for word in ("six to three: error", "adam", "sgd", "update", "12"):
        assert word in shown
    assert "others" not in shown


def test_a_loss_may_be_in_bfloat16():
    def rounded(params, batch):
        return loss(params, batch).astype(jnp.bfloat16)

    result = race({"sgd": om.sgd(0.1)}, loss=rounded)
    assert result.rows[0].loss == pytest.approx(race({"sgd": om.sgd(0.1)}).rows[0].loss, rel=0.05)


def test_seeds_make_parameters_and_batches():
    def batches(seed):  # ends after an epoch, and is asked again
        return iter(BATCHES[seed:] + BATCHES[:seed])

    result = race({"adam": om.adam(0.05)}, params=start, batches=batches, seeds=2)
    for curve in result.curves:
        expected = by_hand(om.adam(0.05), start(curve.seed), list(batches(curve.seed)), 12)
        assert curve.losses[-1] == pytest.approx(expected, rel=1e-4)
    assert result.rows[0].loss == pytest.approx(np.mean([curve.losses[-1] for curve in result.curves]))


def test_a_model_that_can_be_called_is_parameters():
    whole = eqx.nn.Linear(6, 3, key=jax.random.key(0))
    arrays, rest = eqx.partition(whole, eqx.is_inexact_array)

    def error(arrays, batch):
        x, y = batch
        return jnp.mean((jax.vmap(eqx.combine(arrays, rest))(x) - y) ** 2)

    result = race({"muon": om.muon(0.1)}, params=arrays, loss=error)
    assert result.curves[0].losses[-1] < result.curves[0].losses[0]
    assert [(spectrum.path, spectrum.rows, spectrum.columns) for spectrum in result.spectra] == [
        ("weight", 6, 3)
    ]


POINTS = [0.01, 0.1, 0.3]
SWEPT = {
    "adam": om.adam,
    "muon": lambda rate: om.muon(lambda count: rate / (1 + count)),
    "decides": lambda rate: om.adam(optax.warmup_cosine_decay_schedule(0.0, rate, 2, 12)),
    "fixed": om.sgd(0.05),
}


@pytest.mark.slow
@pytest.mark.parametrize("sweep_bytes", [2**30, 0], ids=["vmapped", "sequential"])
def test_learning_rates_are_tried(sweep_bytes):
    result = race(SWEPT, learning_rates=POINTS, sweep_bytes=sweep_bytes)
    assert [(t.optimizer, t.learning_rate) for t in result.trials] == [
        (name, rate) for name in ("adam", "muon", "decides") for rate in POINTS
    ]
    for trial in result.trials:
        expected = by_hand(SWEPT[trial.optimizer](trial.learning_rate), start(), BATCHES, 12)
        assert trial.loss == pytest.approx(expected, rel=1e-3)
    for row in result.rows:
        found = {t.learning_rate: t.loss for t in result.trials if t.optimizer == row.name}
        assert row.learning_rate == (None if row.name == "fixed" else min(found, key=found.__getitem__))


@pytest.mark.parametrize("sweep_bytes", [2**30, 0], ids=["vmapped", "sequential"])
def test_a_rate_that_blows_up_leaves_the_others_alone(sweep_bytes):
    rates = {"sgd": [0.05, 1e30]}
    result = race({"sgd": om.sgd}, learning_rates=rates, sweep_bytes=sweep_bytes)
    assert result.trials[0].loss == pytest.approx(by_hand(om.sgd(0.05), start(), BATCHES, 12), rel=1e-4)
    assert not math.isfinite(result.trials[1].loss)
    assert result.rows[0].learning_rate == 0.05


@pytest.mark.parametrize("sweep_bytes", [2**30, 0], ids=["vmapped", "sequential"])
def test_rates_do_not_recompile(sweep_bytes):
    def traces(rates):
        seen = []

        def make(rate):
            def update(updates, state, params=None):
                seen.append(rate)
                return jax.tree.map(lambda g: -rate * g, updates), state

            return optax.GradientTransformation(lambda params: (), update)

        race({"own": make}, learning_rates=rates, sweep_bytes=sweep_bytes)
        return len(seen)

    assert traces(np.geomspace(0.01, 0.1, 7).tolist()) == traces([0.01, 0.02])


def test_memory_decides_whether_a_sweep_is_vmapped():
    task = make_task(loss, start(), BATCHES, HELD_OUT, 3, title="", measure="")
    size = bytes_per_rate(task, lambda rates: om.adam(rates.learning_rate), LearningRates(0.1))
    kept = (
        size - 3 * 84 - (2 * 84 + 4)
    )  # parameters, gradients, updates; Adam's state; the rest is the loss's
    assert (
        8 * 3 * 4 <= kept <= 2 * 8 * 3 * 4 + 8 * 6 * 4 + 84 + 100
    )  # its error, or batch and weights as well

    def runs(sweep_bytes):
        seeds = []

        def batches(seed):
            seeds.append(seed)
            return itertools.cycle(BATCHES)

        race({"adam": om.adam}, batches=batches, learning_rates=POINTS, sweep_bytes=sweep_bytes)
        return seeds.count(1000)

    assert runs(3 * size) == 1
    assert runs(3 * size - 1) == 3


def test_a_state_may_hold_the_parameters():
    """Every step donates its buffers; a buffer in both trees would be donated twice."""
    tx = optax.GradientTransformation(
        lambda params: params,
        lambda updates, state, params=None: (jax.tree.map(jnp.negative, updates), state),
    )
    assert race({"copy": tx}).rows[0].steps == 12


def test_ctrl_c_returns_what_was_reached():
    def interrupted(after):
        def batches(seed):
            for k in range(100):
                if k == after and seed == 0:
                    signal.raise_signal(signal.SIGINT)
                yield BATCHES[k % 4]

        return batches

    result = race({"sgd": om.sgd(0.1)}, batches=interrupted(7), steps=50)
    assert not result.finished
    assert result.curves[0].steps[-1] == result.rows[0].steps == 7
    assert "Stopped early" in str(result)
    assert result.spectra == []  # they would take a while


@pytest.mark.parametrize("sweep_bytes", [2**30, 0], ids=["vmapped", "sequential"])
def test_ctrl_c_among_the_learning_rates(sweep_bytes, tmp_path):
    calls = []

    def batches(seed):
        for k in range(100):
            calls.append(seed)
            if len(calls) == 80:
                signal.raise_signal(signal.SIGINT)
            yield BATCHES[k % 4]

    result = race(
        {"sgd": om.sgd}, batches=batches, steps=50, learning_rates=[0.01, 0.1, 0.2], sweep_bytes=sweep_bytes
    )
    if sweep_bytes:  # all three in 50 steps, and then the race began
        assert [trial.steps for trial in result.trials] == [50, 50, 50]
    else:
        assert [trial.learning_rate for trial in result.trials] == [0.01]
        assert "1 learning rate tried" in str(result)
    assert not result.finished
    result.write(tmp_path)
    assert "Stopped early" in (tmp_path / "race.html").read_text()


ITERATOR = iter(BATCHES)
BAD = {
    "no optimizers": ({}, {}, "optimizers={'adamw': om.adamw(1e-3)}"),
    "no steps": ({"sgd": om.sgd(0.1)}, {"steps": 0}, "steps=100"),
    "no seeds": ({"sgd": om.sgd(0.1)}, {"seeds": 0}, "seeds=3"),
    "equal seeds": ({"sgd": om.sgd(0.1)}, {"seeds": 2}, "params=lambda seed"),
    "no rates": ({"sgd": om.sgd}, {}, "learning_rates={'sgd': [1e-3, 3e-3]}"),
    "rates of a transformation": (
        {"sgd": om.sgd(0.1)},
        {"learning_rates": [0.1]},
        "no such function of a learning rate",
    ),
    "rates of an unknown optimizer": ({"sgd": om.sgd}, {"learning_rates": {"adam": [0.1]}}, "rates of adam"),
    "a negative rate": ({"sgd": om.sgd}, {"learning_rates": [-1.0]}, "at least 0"),
    "no held-out batch": ({"sgd": om.sgd(0.1)}, {"held_out": []}, "held_out=[batch]"),
    "one held-out batch": ({"sgd": om.sgd(0.1)}, {"held_out": HELD_OUT[0]}, "type held_out=[batch]"),
    "an iterator": ({"sgd": om.sgd(0.1)}, {"batches": ITERATOR}, "batches=lambda seed"),
    "no batches": ({"sgd": om.sgd(0.1)}, {"batches": []}, "batches is empty"),
    "whole numbers": ({"sgd": om.sgd(0.1)}, {"params": {"n": np.arange(3)}}, "at 'n'"),
    "functions": (
        {"sgd": om.sgd(0.1)},
        {"params": {"f": jnp.tanh, "w": np.ones(2)}},
        "which is not an array",
    ),
    "a vector": ({"sgd": om.sgd(0.1)}, {"loss": lambda p, batch: p["bias"]}, "one real number"),
    "not finite at the start": (
        {"sgd": om.sgd(0.1)},
        {"loss": lambda p, b: jnp.nan * loss(p, b)},
        "not finite before the first step",
    ),
    "a loss of three": ({"sgd": om.sgd(0.1)}, {"loss": lambda p, x, y: 0.0}, "of the parameters and a batch"),
    "parameters of no seed": ({"sgd": om.sgd(0.1)}, {"params": lambda: start()}, "params must be a function"),
    "batches of two": ({"sgd": om.sgd(0.1)}, {"batches": lambda a, b: BATCHES}, "batches must be a function"),
    "a loss with more": ({"sgd": om.sgd(0.1)}, {"loss": lambda p, b: (loss(p, b), 1)}, "one real number"),
}


@pytest.mark.parametrize(("optimizers", "changed", "words"), BAD.values(), ids=BAD)
def test_errors_say_what_to_type(optimizers, changed, words):
    with pytest.raises(ValueError) as error:
        race(optimizers, **changed)
    assert str(error.value).startswith("race: ")
    assert words in str(error.value)


def test_spectra_of_known_updates():
    diagonal = jnp.zeros((5, 4)).at[jnp.arange(4), jnp.arange(4)].set(jnp.array([4.0, 2.0, 1.0, 1.0]))
    stack = jnp.stack([jnp.eye(3), jnp.ones((3, 3)), jnp.zeros((3, 3))])  # the last does not move
    update = {
        "a": diagonal,
        "b": stack,
        "bias": jnp.ones(3),
        "c": jnp.zeros((2, 2)),
        "d": jnp.full((2, 2), jnp.nan),
    }
    a, b = spectra("sgd", update, {"b": "bio", "bias": None, "*": "io"})
    assert (a.optimizer, a.path, a.rows, a.columns) == ("sgd", "a", 5, 4)
    np.testing.assert_allclose(a.values, [1, 0.5, 0.25, 0.25], rtol=1e-3)
    shares = np.array([4, 2, 1, 1]) / 8
    assert a.effective_rank == pytest.approx(np.exp(-np.sum(shares * np.log(shares))))
    np.testing.assert_allclose(b.values, [1, 0.5, 0.5], atol=1e-3)  # the mean of 1, 1, 1 and 1, 0, 0
    assert b.effective_rank == pytest.approx(2, abs=1e-4)  # the mean of 3 and 1


def test_spectra_leave_out_what_no_rule_decides():
    assert not list(spectra("sgd", {"odd": jnp.ones((2, 3, 4))}))


def test_the_kept_update_is_the_step_that_was_taken():
    task = make_task(loss, start(), BATCHES, HELD_OUT, 3, title="", measure="")
    run = Run(CompiledTask(task), om.adam(0.1), 0)
    before = jax.tree.map(np.asarray, run.params)
    run.take_step(keep_update=True)
    for name, update in run.kept_update.items():
        np.testing.assert_allclose(run.params[name] - before[name], update, atol=1e-6)


def test_written_and_read_again(tmp_path):
    result = race({"sgd": om.sgd}, learning_rates=[0.1, 0.2])
    paths = result.write(tmp_path / "new")
    assert [path.name for path in paths] == ["race.json", "race.png", "race.html"]
    assert RaceResult.read(paths[0]) == result
    result.plot(tmp_path / "race.svg")
    assert "<svg" in (tmp_path / "race.svg").read_text()


def test_progress_is_seen_or_not(capsys):
    race({"sgd": om.sgd}, learning_rates=[0.1])
    assert capsys.readouterr().out == ""
    race({"sgd": om.sgd}, learning_rates=[0.1], progress=True)
    shown = capsys.readouterr().out
    assert "sgd        0.1" in shown
    assert "step 12/12" in shown


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_needs_no_extra():
    extras = ("flax", "rich", "matplotlib", "sklearn")
    done = run_python(f"import optimorph, sys; print([name for name in {extras} if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


def test_a_missing_extra_is_named():
    done = run_python("import sys\nsys.modules['rich'] = None\nimport optimorph as om\nom.race")
    assert done.stderr.endswith("optimorph.race needs rich: pip install 'optimorph[race]'\n")
    done = run_python("import optimorph as om\nom.rice")
    assert "module 'optimorph' has no attribute 'rice'" in done.stderr


def test_a_missing_module_of_its_own_is_not_taken_for_an_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(om, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'optimorph._racing.race'$"):
        _ = om.race
