"""Three steps of published programs, by optimizers of this library alone and inside optax's wrappers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import rounding

import optimorph as om

WEIGHTS = [[0.5, -1.0, 1.5], [-0.5, 0.25, 1.0]]
GRADIENTS = [
    [[0.1, -0.2, 0.3], [0.4, 0.5, -0.6]],
    [[-0.3, 0.2, 0.1], [0.2, -0.1, 0.4]],
    [[0.2, 0.1, -0.4], [-0.5, 0.3, 0.1]],
]
AFTER = {
    "ademamix": [[0.4993254128, -0.9990036644, 1.4977619759], [-0.5017870548, 0.2477480178, 1.0008682009]],
    "mars_adamw": [[0.4980323457, -0.9976668017, 1.4942333622], [-0.5045657428, 0.2448486605, 1.0015099068]],
    "cautious": [[0.4995560490, -0.9991595506, 1.4973555214], [-0.5022586135, 0.2479169194, 1.0006998299]],
    "cautious decay": [
        [0.4993706608, -0.9992062189, 1.4979035445],
        [-0.5019430841, 0.2477360032, 1.0011684463],
    ],
    "schedule_free": [
        [0.5004732254, -1.0011557494, 1.4985786076],
        [-0.5009916778, 0.2482761389, 0.9987836330],
    ],
    "prodigy": [[0.3480986128, -0.8479191498, 1.3477399563], [-0.6515438758, 0.0981874955, 1.1513648844]],
}
"""The weights after three steps; of schedule_free those that are evaluated."""


def warm(rate, steps, first):
    """A rate whose warm-up ends after so many steps, the first of which has this count."""
    return lambda count: rate * jnp.minimum(1, (count.astype(float) + 1 - first) / steps)


def schedule_free(rate=0.0025, steps=2):
    """AdamW without momentum inside optax's wrapper, which counts from 1."""
    base = om.adamw(warm(rate, steps, 0), b1=0.0, weight_decay=0.1)
    return optax.contrib.schedule_free(base, warm(rate, steps, 1), b1=0.9)


def prodigy(b1=0.9, b2=0.999):
    """optax corrects the bias of Prodigy's averages, the published program does not: a schedule undoes it."""

    def uncorrected(count):
        t = count.astype(float) + 1
        return (1 - b1**t) / jnp.sqrt(1 - b2**t)

    return om.skip_nonfinite(optax.contrib.prodigy(uncorrected, (b1, b2), estim_lr0=0.01, weight_decay=0.01))


def cautious(b1=0.9, b2=0.95):
    """The published program adds ε before it corrects the bias."""
    quotient = om.divide(
        om.chain(om.ema(b1), om.debias(b1)), by=om.chain(om.square(), om.ema(b2), om.root(1e-8))
    )
    corrected = om.chain(quotient, optax.scale_by_schedule(lambda t: jnp.sqrt(1 - b2 ** (t + 1.0))))
    return om.chain(om.cautious(corrected), om.add_decayed_weights(0.1), om.scale_by_learning_rate(1e-3))


def cautious_decay():
    return om.adamw(1e-3, 0.9, 0.95, weight_decay=0.1, weight_decay_form="cautious")


def ademamix():
    schedules = om.schedules
    slow = {"b3": schedules.decay_warmup(0.9, 0.9999, 5), "alpha": schedules.linear_warmup(2.0, 5)}
    return om.ademamix(1e-3, **slow, weight_decay=0.1)


TX = {
    "ademamix": ademamix,
    "mars_adamw": lambda: om.mars_adamw(3e-3, weight_decay=0.1),
    "cautious": cautious,
    "cautious decay": cautious_decay,
    "schedule_free": schedule_free,
    "prodigy": prodigy,
}


@pytest.mark.parametrize("name", TX)
@rounding.in_float64
def test_three_steps(name):
    tx, params = TX[name](), {"w": jnp.array(WEIGHTS)}
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):  # optax's own code does not run under strict promotion
        for k in range(3):
            g = {"w": jnp.array(GRADIENTS[0 if name == "prodigy" else k])}
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        if name == "schedule_free":
            params = optax.contrib.schedule_free_eval_params(state, params)
    np.testing.assert_allclose(params["w"], AFTER[name], atol=6e-11)


@rounding.in_float64
def test_warmups():
    """Every step has more than the one before, and from the last on the whole."""
    for warmup, end in (
        (om.schedules.linear_warmup(8.0, 5), 8.0),
        (om.schedules.decay_warmup(0.9, 0.999, 5), 0.999),
    ):
        values = [float(warmup(jnp.int32(t))) for t in range(7)]
        assert values[:5] == sorted({*values[:5]})
        np.testing.assert_allclose(values[4:], end, rtol=1e-7)
    half_lives = [
        np.log(0.5) / np.log(float(om.schedules.decay_warmup(0.9, 0.99, 4)(jnp.int32(t)))) for t in range(4)
    ]
    np.testing.assert_allclose(np.diff(half_lives, 2), 0, atol=1e-4)
    for warmup in (
        lambda: om.schedules.linear_warmup(1.0, 0),
        lambda: om.schedules.decay_warmup(0.9, 0.99, 0),
    ):
        with pytest.raises(ValueError, match="_warmup: steps must be an integer of at least 1"):
            warmup()


def test_clipped_leaf_by_leaf():
    """Numbers of any size; zeros, and what is not finite, as they are."""
    g = {
        "large": jnp.full((3, 4), 1e30),
        "small": jnp.full(5, 1e-30),
        "none": jnp.zeros(2),
        "nan": jnp.array([1.0, jnp.nan]),
        "inf": jnp.array([jnp.inf, 5.0]),
    }
    for tx, size in (
        (om.clip_norm(1.0), jnp.linalg.norm),
        (om.clip_rms(0.5), lambda x: 2 * jnp.sqrt(jnp.mean(x**2))),
    ):
        u, _ = jax.jit(tx.update)(g, tx.init(g))
        rounding.close(size(u.pop("large")), 1.0, units=8)
        for name, x in u.items():
            np.testing.assert_array_equal(x, g[name])
    for tx in (om.clip_norm(1.0), om.clip_rms()):
        inside = om.compress_state(om.chain(om.ema(0.9), tx))
        w = {"w": jnp.ones((128, 128))}
        state = inside.init(w)
        with pytest.raises(ValueError, match=r"compress_state: put clip_.* outside"):
            inside.update(w, state, w)


def test_8_bit_state():
    """Of AdEMAMix all but the slow average, which a rule may round too; of MARS all but the last gradient."""
    w = {"w": jnp.ones((128, 128))}
    both = {"slow/*": om.codecs.BFloat16(stochastic=True)}
    for tx, size in (
        (om.ademamix(0.1, state="int8"), 6.4),
        (om.ademamix(0.1, state=both), 4.4),
        (om.mars_adamw(0.1, state="int8"), 6.4),
    ):
        state = tx.init(w)
        update = jax.jit(tx.update)
        for _ in range(2):
            updates, state = update(w, state, w)
        assert sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim) < size * w["w"].size
        assert bool(jnp.all(jnp.isfinite(updates["w"])))


def test_the_slow_average_is_in_float32():
    tx = om.ademamix(0.1, mu_dtype="bfloat16", nu_dtype="bfloat16")
    state = tx.init({"w": jnp.ones((4, 3), jnp.bfloat16)})
    moments = {str(x.dtype) for x in jax.tree.leaves(state) if x.ndim}
    assert moments == {"float32", "bfloat16"}
    assert optax.tree.get(state, "slow_average")["w"].dtype == jnp.float32
