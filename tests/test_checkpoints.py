"""A run that is saved, interrupted and resumed goes on to the bit, whichever library stores it."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
import rounding
import safetensors.flax

import optimorph as om

ROOT = Path(__file__).parent.parent
TX = om.skip_nonfinite(om.multi_steps(om.adamw(0.01, state="int8"), 2))
AVERAGE = om.chain(om.ema(0.9), om.debias(0.9))
FREE = optax.contrib.schedule_free(om.adamw(0.01, b1=0.0, state="int8"), 0.01, b1=0.9)


def drawn(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (64, 64), "bias": (5,)}
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def begin():
    """Split weights, 8-bit state in an open window, an average of weights, and a Schedule-Free run."""
    params = drawn(0)
    weights, residuals = om.split_weights(params)
    return {
        "weights": weights,
        "residuals": residuals,
        "state": TX.init(params),
        "average": AVERAGE.init(params),
        "free": {"params": params, "state": FREE.init(params)},
    }


@jax.jit
def step(run, gradients, key):
    params = om.join_weights(run["weights"], run["residuals"])
    updates, state = TX.update(gradients, run["state"], params, weight=2.0)
    params = om.apply_updates(params, updates)
    weights, residuals = om.split_weights(params, key=key)
    _, average = AVERAGE.update(params, run["average"])
    free = run["free"]
    updates, free_state = FREE.update(gradients, free["state"], free["params"])
    free = {"params": optax.apply_updates(free["params"], updates), "state": free_state}
    return {"weights": weights, "residuals": residuals, "state": state, "average": average, "free": free}


def train(run, steps):
    with jax.numpy_dtype_promotion("standard"):
        for seed in steps:
            run = step(run, drawn(seed), jax.random.key(seed))
    return run


@functools.cache
def runs():
    """After three steps, in the middle of a window, and after six."""
    half = train(begin(), range(1, 4))
    return half, train(half, range(4, 7))


def alike(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def by_orbax(run, like, folder):
    """Asynchronously, while the run goes on."""
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        manager.save(3, args=ocp.args.StandardSave(run))
        train(run, [4])
        manager.wait_until_finished()
    with ocp.CheckpointManager(folder) as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))


def by_flax(run, like, folder):
    (folder / "run.msgpack").write_bytes(flax.serialization.to_bytes(run))
    return flax.serialization.from_bytes(like, (folder / "run.msgpack").read_bytes())


def by_equinox(run, like, folder):
    eqx.tree_serialise_leaves(folder / "run.eqx", run)
    return eqx.tree_deserialise_leaves(folder / "run.eqx", like)


def by_safetensors(run, like, folder):
    """Every array under its path."""
    arrays = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(run)}
    safetensors.flax.save_file(arrays, folder / "run.safetensors")
    kept = safetensors.flax.load_file(folder / "run.safetensors")
    return jax.tree_util.tree_map_with_path(lambda path, _: kept[jax.tree_util.keystr(path)], like)


@pytest.mark.parametrize("library", [by_orbax, by_flax, by_equinox, by_safetensors])
def test_a_resumed_run_is_the_run(library, tmp_path):
    half, whole = runs()
    restored = library(half, begin(), tmp_path)
    alike(restored, half)
    alike(train(restored, range(4, 7)), whole)


def test_parameters_alone_and_then_another_optimizer(tmp_path):
    """Items of a checkpoint are restored one by one; each state into what its own `init` makes."""
    tx, other = om.adamw(0.1), om.skip_nonfinite(om.adamw(0.1, state="int8"))
    params = drawn(0)
    updates, state = tx.update(drawn(1), tx.init(params), params)
    params = optax.apply_updates(params, updates)
    items = {"params": ocp.args.StandardSave(params), "state": ocp.args.StandardSave(state)}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.Composite(**items))
    with ocp.CheckpointManager(tmp_path) as manager:
        blank = jax.tree.map(jnp.zeros_like, params)
        found = manager.restore(1, args=ocp.args.Composite(params=ocp.args.StandardRestore(blank)))
        alike(found["params"], params)
        kept = manager.restore(1, args=ocp.args.Composite(state=ocp.args.StandardRestore(tx.init(params))))
    found, _ = om.carry_state(kept["state"], other, found["params"], strict=True)
    expected, _ = om.carry_state(state, other, params, strict=True)
    alike(found, expected)


CRASH = """
import os, pathlib, sys
import jax.numpy as jnp
import orbax.checkpoint as ocp
import optimorph as om

params = {"w": jnp.ones((4, 4))}
tx = om.adamw(0.1)
_, state = tx.update(params, tx.init(params), params)
with ocp.CheckpointManager(sys.argv[1]) as manager:
    manager.save(1, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
    for owner, name in ((os, "rename"), (os, "replace"), (pathlib.Path, "rename"), (pathlib.Path, "replace")):
        setattr(owner, name, lambda *_: os._exit(9))  # all is written, and nothing committed
    _, state = tx.update(params, state, params)
    manager.save(2, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
"""


@pytest.mark.slow
def test_a_crash_in_the_middle_of_a_save(tmp_path):
    """The step before is the latest one, and the step that was lost can be saved again."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    crashed = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert crashed.returncode == 9, crashed.stderr[-2000:]
    assert len(list(tmp_path.iterdir())) == 2  # what was begun is there, under another name
    params, tx = {"w": jnp.ones((4, 4))}, om.adamw(0.1)
    _, expected = tx.update(params, tx.init(params), params)
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == 1
        state = manager.restore(1, args=ocp.args.StandardRestore(tx.init(params)))
        alike(state, expected)
        _, state = tx.update(params, state, params)
        manager.save(2, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        alike(manager.restore(2, args=ocp.args.StandardRestore(tx.init(params))), state)


# Averages of weights


def mean_of(weights, decay):
    """In float64."""
    mean, t = 0.0, len(weights)
    for w in weights:
        mean = (1 - decay) * np.asarray(w, np.float64) + decay * mean
    return mean / (1 - decay**t)


@rounding.in_float32
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_average_of_weights(dtype):
    """In float32 also of bfloat16 weights; what is returned has their dtype."""
    ema = om.chain(om.ema(0.99), om.debias(0.99))
    seen = [drawn(seed, dtype)["kernel"] for seed in range(40)]
    held = ema.init(seen[0])
    for w in seen:
        mean, held = ema.update(w, held)
    expected = mean_of(seen, 0.99)
    assert (mean.dtype, held[0].average.dtype) == (dtype, jnp.float32)
    rounding.close(mean, expected, units=20 if dtype == jnp.float32 else 1, dtype=str(jnp.dtype(dtype)))
    rounding.close(held[0].average / (1 - 0.99**40), expected, units=20, dtype="float32")


@pytest.mark.slow
@rounding.in_float32
def test_documented_errors_of_averages_of_bfloat16_weights():
    """If this fails, optax has mended its average, and the guide says too much."""
    steps = np.random.default_rng(0).standard_normal((1001, 1000)) * np.r_[1, [1e-3] * 1000][:, None]
    walk = jnp.asarray(np.cumsum(steps, axis=0)[1:], jnp.bfloat16)
    expected = mean_of(walk, 0.999)

    def error(tx):
        state, _ = jax.lax.scan(lambda state, w: (tx.update(w, state)[1], None), tx.init(walk[0]), walk)
        held = next(x for x in jax.tree.leaves(state) if x.ndim)
        return np.max(np.abs(np.float64(held) / (1 - 0.999**1000) - expected)) / np.max(np.abs(expected))

    assert error(om.ema(0.999)) < 2e-5
    with jax.numpy_dtype_promotion("standard"):
        assert 1e-4 < error(optax.ema(0.999, accumulator_dtype=jnp.float32)) < 1e-3
        assert error(optax.ema(0.999)) > 0.5


@rounding.in_float32
def test_the_weights_to_evaluate_of_a_schedule_free_run():
    """The mean of z, around an optimizer with 8-bit state and with split weights."""
    params = drawn(0)
    weights, residuals = om.split_weights(params, 16)
    state, zs = FREE.init(params), []
    with jax.numpy_dtype_promotion("standard"):
        update = jax.jit(FREE.update)
        for t in range(1, 6):
            params = om.join_weights(weights, residuals)
            updates, state = update(drawn(t), state, params)
            weights, residuals = om.split_weights(om.apply_updates(params, updates), 16)
            zs.append(np.float64(state.z["kernel"]))
        params = om.join_weights(weights, residuals)
        found = optax.contrib.schedule_free_eval_params(state, params)
    rounding.close(found["kernel"], np.mean(zs, axis=0), units=100)
    assert float(np.max(np.abs(found["kernel"] - params["kernel"]))) > 1e-3
