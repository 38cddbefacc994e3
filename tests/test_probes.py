"""Probes: what they say is so, what they watch does not change, and they cost nothing in between."""

import functools

import catalog
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
from flax import nnx

import optimorph as om
from optimorph import probes
from optimorph.probes import CHEAP, SPECTRAL, probe, read

ONE = pytest.approx(1.0, rel=16 * rounding.eps("float32"))
ALL = (*CHEAP, *SPECTRAL, "gradient_stable_rank", "weight_spectral_norm", "momentum_effective_rank")


def weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"hidden/kernel": (6, 4), "layers/kernel": (2, 4, 6), "bias": (5,)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def after(tx, steps=1, params=None):
    """What a probe says after some steps, and the last gradients, updates and state."""
    params = weights() if params is None else params
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        g = weights(step + 1)
        updates, state = update(g, state, params)
    return read(state), g, updates, state


# What they say, in float64.


def rms(x):
    return np.sqrt(np.mean(np.abs(np.asarray(x, np.float64)) ** 2))


def test_numbers_of_leaves():
    said, g, updates, _ = after(probe(om.adamw(0.1), every=1), steps=3)
    moment = jax.tree.map(np.zeros_like, weights())
    for step in range(3):
        moment = {k: 0.9 * m + 0.1 * np.asarray(weights(step + 1)[k], np.float64) for k, m in moment.items()}
    for name, w in weights().items():
        exact = {
            "gradient_rms": rms(g[name]),
            "update_rms": rms(updates[name]),
            "weight_rms": rms(w),
            "update_to_weight": rms(updates[name]) / rms(w),
            "cosine": np.mean(g[name] * moment[name]) / rms(g[name]) / rms(moment[name]),
        }
        assert set(exact) == set(CHEAP)
        for metric, value in exact.items():
            rounding.close(said[f"{name}/{metric}"], value, units=12, dtype="float32")  # a cosine is of three


def from_singular_values(s, inputs, outputs):
    shares = s / s.sum()
    return {
        "spectral_norm": s[0],
        "rms_to_rms_norm": s[0] * np.sqrt(inputs / outputs),
        "stable_rank": np.sum(s**2) / s[0] ** 2,
        "effective_rank": np.exp(-np.sum(shares * np.log(shares))),
        "top_energy": s[0] ** 2 / np.sum(s**2),
        "orthogonality_error": np.sqrt(np.sum((s - s.mean()) ** 2) / np.sum(s**2)),
    }


@pytest.mark.parametrize("of", ["gradient", "update", "weight", "momentum"])
def test_numbers_of_matrices(of):
    """Of a stack the mean over its matrices."""
    metrics = tuple(f"{of}_{name}" for name in probes.OF_MATRICES)
    said, g, updates, state = after(probe(om.sgd(0.1, 0.9), metrics, 1, exact=True))
    arrays = {"gradient": g, "update": updates, "weight": weights(), "momentum": state.inner[2].velocity}[of]
    for name, x in arrays.items():
        if name == "bias":
            assert not any(key.startswith("bias/") for key in said)
            continue
        stack = np.asarray(x, np.float64).reshape(-1, *x.shape[-2:])
        rows = [from_singular_values(np.linalg.svd(m, compute_uv=False), *m.shape) for m in stack]
        for metric in rows[0]:
            mean = np.mean([row[metric] for row in rows])
            rounding.close(said[f"{name}/{of}_{metric}"], mean, dtype="float32")


def test_by_products_as_by_decomposition():
    """Without `exact`, norms and stable ranks to the stated accuracy."""
    metrics = tuple(f"gradient_{name}" for name in ("spectral_norm", "rms_to_rms_norm", "stable_rank"))
    for name, value in after(probe(om.sgd(0.1), metrics, 1, exact=True))[0].items():
        np.testing.assert_allclose(after(probe(om.sgd(0.1), metrics, 1))[0][name], value, rtol=4e-3)


def test_muon_is_orthogonal_and_its_gradient_is_not():
    said, *_ = after(
        probe(om.muon(1.0, scale=None), ("update_orthogonality_error", "gradient_orthogonality_error"), 1)
    )
    assert said["hidden/kernel/update_orthogonality_error"] < 0.1
    assert said["hidden/kernel/gradient_orthogonality_error"] > 0.2


def test_where_there_is_nothing():
    """No step: 0; a step from a weight of zero: infinite; no gradient: NaN; no moment: no cosine."""
    params = {"zero": jnp.zeros(3), "frozen": jnp.ones(3), "empty": jnp.zeros((0, 2))}
    tx = probe(om.sgd(0.1), every=1)
    _, state = tx.update(
        {"zero": jnp.ones(3), "frozen": None, "empty": params["empty"]}, tx.init(params), params
    )
    said = read(state)
    assert said["zero/update_to_weight"] == np.inf
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state))  # as jax_debug_infs needs it
    assert np.isnan(said["frozen/gradient_rms"])
    assert not any("cosine" in name or "empty" in name for name in said)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert read(state)["zero/update_to_weight"] == 0
    tx = probe(om.adam(0.1), every=1)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert read(state)["frozen/cosine"] == 0


def test_a_bare_array():
    params = jnp.ones((3, 4))
    tx = probe(om.adam(0.1), ("gradient_rms", "cosine"), 1)
    _, state = tx.update(2 * params, tx.init(params), params)
    assert read(state) == {
        "gradient_rms": 2.0,
        "cosine": ONE,
        "learning_rate": np.float32(0.1),
    }


# What they leave alone.


@pytest.mark.examples("sgd", "adamw", "muon")
@pytest.mark.parametrize("entry", catalog.RECIPES, ids=[entry.id for entry in catalog.RECIPES])
def test_nothing_is_changed(entry):
    """Updates and states, to the bit, of three steps of which two are looked at."""
    tx, params = entry.build(), {"kernel": weights()["hidden/kernel"], "other": weights(1)["hidden/kernel"]}
    watched = probe(tx, (*CHEAP, "update_stable_rank", "gradient_spectral_norm"), 2, axes={"*": "io"})
    states = tx.init(params), watched.init(params)
    update, watch = (jax.jit(t.update, compiler_options=rounding.EXACT) for t in (tx, watched))
    for seed in range(3):
        g = jax.tree.map(lambda p, seed=seed: jnp.abs(p) * (seed + 1), params)
        (a, bare), (b, state) = update(g, states[0], params), watch(g, states[1], params)
        for x, y in zip(jax.tree.leaves((a, bare)), jax.tree.leaves((b, state.inner)), strict=True):
            np.testing.assert_array_equal(x, y)
        states = bare, state


def test_every_kth_step():
    tx = probe(om.sgd(0.1), ("gradient_rms",), 3)
    params = {"w": jnp.ones(2)}
    state, found = tx.init(params), []
    assert np.isnan(read(state)["w/gradient_rms"])
    for step in range(7):
        _, state = jax.jit(tx.update)({"w": jnp.full(2, 1.0 + step)}, state, params)
        found.append(read(state)["w/gradient_rms"])
    assert found == [1, 1, 1, 4, 4, 4, 7]


def test_between_nothing_is_computed():
    """All arithmetic of the metrics is in a branch."""
    tx, params = probe(optax.set_to_zero(), (*CHEAP, *SPECTRAL), 5), {"kernel": jnp.ones((3, 4))}
    equations = jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr.eqns
    names = [equation.primitive.name for equation in equations]
    assert names.count("cond") == 1
    assert not {"reduce_sum", "sqrt", "svd", "dot_general"} & set(names)


def test_one_array_holds_all_numbers():
    """Thousands of scalars would cost more than what they say."""
    state = probe(om.adam(0.1), ALL).init(weights())
    extra = len(jax.tree.leaves(state)) - len(jax.tree.leaves(om.adam(0.1).init(weights())))
    assert extra == 4  # a count, the numbers, which are measured, and their names


def test_names_that_are_also_those_of_states():
    """Moments are found by the states that hold them, not by words."""
    params = {"trace": {"w": jnp.ones((3, 4))}, "w": jnp.ones(5), "mu": jnp.ones(5)}
    with jax.numpy_dtype_promotion("standard"):
        tx = probe(optax.rmsprop(0.1), every=1)
        _, state = tx.update(params, tx.init(params), params)
    assert not any("cosine" in name for name in read(state))
    tx = probe(om.partition({"*": "by"}, {"by": om.sgd(0.1, 0.9)}), ("cosine",), 1)
    _, state = tx.update(params, tx.init(params), params)
    for name in ("trace/w", "w", "mu"):
        assert read(state)[f"{name}/cosine"] == ONE


def test_what_is_not_trained_is_left_out():
    params = {"w": jnp.ones(3), "count": jnp.arange(3)}
    tx = probe(om.adam(0.1), every=1)
    g = {"w": jnp.ones(3), "count": np.zeros(3, jax.dtypes.float0)}
    _, state = tx.update(g, tx.init(params), params)
    assert "w/update_rms" in read(state)
    assert not any("count" in name for name in read(state))


# Where they can stand.


def test_where_nothing_has_the_metric():
    """A cosine with the momentum that there is none of."""
    assert list(after(probe(om.sgd(0.1), "cosine"))[0]) == ["learning_rate"]


def test_around_each_other_and_what_else_speaks():
    """Every state that can be read is, under names that say whose it is."""
    inner = om.skip_nonfinite(
        optax.chain(om.clip_by_global_norm(0.5), om.muon(lambda count: 0.5 ** count.astype(float)))
    )
    said, *_ = after(probe(probe(inner, ("gradient_rms",), 2), ("update_stable_rank",), 1), steps=2)
    rounding.close(said["clip_factor"], 0.5 / said["clip_norm"], dtype="float32")
    assert said["matrix/learning_rate"] == said["other/learning_rate"] == 0.5
    assert {"matrix/weight_decay", "other/weight_decay"} <= set(said)
    assert said["skipped"] == said["consecutive_skips"] == 0
    assert {"hidden/kernel/gradient_rms", "bias/gradient_rms", "hidden/kernel/update_stable_rank"} <= set(
        said
    )
    assert all(type(value) in (int, float) for value in said.values())


def test_skipped_steps_are_counted():
    tx = probe(om.skip_nonfinite(om.adam(0.1)), ("gradient_rms",), 1)
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    for g in (jnp.nan, 1.0, jnp.nan, jnp.inf):
        _, state = tx.update({"w": jnp.full(3, g)}, state, params)
    assert (read(state)["skipped"], read(state)["consecutive_skips"]) == (3, 2)


@pytest.mark.parametrize("inject", [om.inject_hyperparams, optax.inject_hyperparams])
def test_injected_numbers(inject):
    with jax.numpy_dtype_promotion("standard"):
        tx = probe(inject(optax.adam)(learning_rate=0.25, b1=0.5), ("cosine",), 1)
        said, *_ = after(tx)
    assert said["learning_rate"] == 0.25
    assert said["b1"] == 0.5
    assert said["bias/cosine"] == ONE


@pytest.mark.parametrize(
    "tx", [optax.adam(0.1), optax.sgd(0.1, 0.9), optax.contrib.muon(0.1)], ids=["adam", "sgd", "muon"]
)
def test_moments_of_optax_are_found(tx):
    with jax.numpy_dtype_promotion("standard"):
        params = {"kernel": jnp.ones((3, 4))}
        tx = probe(tx, ("cosine", "momentum_stable_rank"), 1)
        _, state = tx.update(params, tx.init(params), params)
    assert read(state)["kernel/cosine"] == ONE
    assert read(state)["kernel/momentum_stable_rank"] == ONE


def test_moments_of_other_shapes_are_left_out():
    """A moment of a projected gradient is not compared with the gradient."""
    params = {"kernel": jnp.ones((4, 6)) + jnp.eye(4, 6)}
    with jax.numpy_dtype_promotion("standard"):
        for rank in (1, 2):
            tx = probe(optax.contrib.galore(0.1, rank=rank), (*CHEAP, "momentum_stable_rank"), 1)
            _, state = tx.update(params, tx.init(params), params)
            assert {name.rpartition("/")[2] for name in read(state)} == {*CHEAP} - {"cosine"}


def test_scan_and_vmap():
    """A run as one program; two runs at once, whose numbers are arrays."""
    tx = probe(om.adam(0.1), ("gradient_rms", "update_spectral_norm"), 2, axes={"w": "io"})
    params = {"w": jnp.ones((2, 3))}
    gs = {"w": jnp.arange(1.0, 6.0)[:, None, None] * jnp.ones((5, 2, 3))}

    def run(gs):
        return jax.lax.scan(lambda s, g: tx.update(g, s, params)[::-1], tx.init(params), gs)[0]

    rounding.close(read(jax.jit(run)(gs))["w/gradient_rms"], 5.0, dtype="float32")
    both = read(jax.jit(jax.vmap(run))(jax.tree.map(lambda g: jnp.stack([g, 2 * g]), gs)))
    rounding.close(both["w/gradient_rms"], np.array([5, 10]))
    assert both["w/update_spectral_norm"].shape == (2,)


def test_donation_and_shapes():
    tx, params = probe(om.adam(0.1), ALL), weights()
    state = tx.init(params)
    assert jax.tree.structure(jax.eval_shape(tx.init, params)) == jax.tree.structure(state)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p)[1], donate_argnums=1, keep_unused=True)
    analysis = step.lower(params, state, params).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_flax_and_equinox():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, probe(om.muon(0.1, axes={"bias": None, "*": "io"}), ("cosine",), 1), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer):
        slopes = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 3))) ** 2))(model)
        optimizer.update(model, slopes)

    step(model, optimizer)
    said = read(nnx.as_pure(optimizer.opt_state))
    assert said["kernel/cosine"] == ONE

    net = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    tx = probe(om.adam(0.1), ("gradient_rms", "update_stable_rank"), 1)
    arrays = eqx.filter(net, eqx.is_array)
    _, state = eqx.filter_jit(tx.update)(arrays, tx.init(arrays), arrays)
    assert {"weight/gradient_rms", "bias/gradient_rms", "weight/update_stable_rank"} <= set(read(state))


# Who listens.


class Board:
    """As TensorBoard's writer takes scalars."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int):
        assert isinstance(scalar_value, int | float)
        self.scalars.setdefault(tag, []).append((global_step, scalar_value))


class Run:
    """As Weights & Biases takes a dictionary."""

    def __init__(self):
        self.rows = []

    def log(self, data: dict[str, float], step: int):
        assert all(isinstance(key, str) and isinstance(value, int | float) for key, value in data.items())
        self.rows.append((step, data))


def test_loggers():
    board, run = Board(), Run()
    tx, params = probe(om.adamw(0.1), every=2), weights()
    state = tx.init(params)
    for step in range(4):
        _, state = tx.update(weights(step), state, params)
        if step % 2 == 0:
            said = read(state)
            run.log(said, step)
            for name, value in said.items():
                board.add_scalar(name, value, step)
    assert [step for step, _ in run.rows] == [0, 2]
    assert [step for step, _ in board.scalars["bias/update_rms"]] == [0, 2]
    assert run.rows[1][1]["bias/gradient_rms"] == board.scalars["bias/gradient_rms"][1][1]


# What they refuse.


def test_refusals():
    refused = functools.partial(pytest.raises, ValueError)
    with refused(match=r"probe: 'rank' is not a metric. Type some of gradient_rms, .*update_stable_rank"):
        probe(om.adam(0.1), ("rank",))
    for every in (0, -1, True):
        with refused(match="probe: every must be an integer of at least 1"):
            probe(om.adam(0.1), every=every)
    with refused(match="probe: update was called without params, but it is asked for numbers about weights"):
        tx = probe(om.adam(0.1))
        tx.update(weights(), tx.init(weights()))
    with refused(match=r"probe: 'mystery/kernel'"):
        probe(om.adam(0.1), ("update_stable_rank",)).init({"mystery/kernel": jnp.ones((3, 4, 5))})
    with refused(match="probe: several leaves have the path 'a/b'"):
        probe(om.adam(0.1)).init({"a/b": jnp.ones(3), "a": {"b": jnp.ones(3)}})
    tx = probe(om.adam(0.1), "gradient_rms")
    tx.update(weights(), tx.init(weights()))  # needs none


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_python_numbers(jit):
    """Parameters that are Python numbers at `init` are arrays in jit."""
    params = {"scale": 2.0, "w": jnp.ones(3)}
    tx = probe(om.sgd(0.5), ("update_rms", "weight_rms"), 1)
    state = tx.init(params)
    for _ in range(2):
        _, state = jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
    assert read(state)["scale/weight_rms"] == 2.0


def test_gradients_wider_than_weights():
    """The metrics of bfloat16 weights and float64 gradients, in strict dtypes."""
    params, tx = {"w": jnp.ones((3, 4), jnp.bfloat16)}, probe(om.ema(0.5), every=1)
    with jax.enable_x64(True):
        g = {"w": jnp.full((3, 4), 0.5, jnp.float64)}
        _, state = tx.update(g, tx.init(params), params)
    assert read(state)["w/update_to_weight"] == 0.25
    assert read(state)["w/cosine"] == 1
