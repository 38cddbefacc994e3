"""The promises of the theory, measured with the library's own optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding

import optimorph as om
from optimorph import schedules, theory

CONDITIONS = [1e2, 1e3, 1e4, 1e5]


def steps_per_e(transform, condition, early, late):
    """Steps that divide the error by e on a quadratic with eigenvalues from 1/R to 1, in the long run."""
    with jax.enable_x64(True):
        eigenvalues = jnp.geomspace(1 / condition, 1.0, 8)
        w = {"w": jnp.ones(8)}

        def step(carry, _):
            w, state = carry
            updates, state = transform.update({"w": eigenvalues * w["w"]}, state, w)
            return (optax.apply_updates(w, updates), state), None

        @jax.jit
        def run(carry, length):
            return jax.lax.fori_loop(0, length, lambda _, c: step(c, None)[0], carry)

        carry = run((w, transform.init(w)), early)
        first = float(jnp.linalg.norm(carry[0]["w"]))
        carry = run(carry, late - early)
        last = float(jnp.linalg.norm(carry[0]["w"]))
        return (late - early) / np.log(first / last)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_gradient_descent_needs_r(condition):
    plan = theory.gradient_descent(1.0, 1 / condition)
    assert plan.steps_per_e == pytest.approx(condition / 2, rel=0.02)
    span = int(3 * condition)
    measured = steps_per_e(om.sgd(plan.learning_rate), condition, span, 2 * span)
    assert measured == pytest.approx(plan.steps_per_e, rel=0.1)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_heavy_ball_needs_root_r(condition):
    plan = theory.polyak(1.0, 1 / condition)
    assert plan.steps_per_e == pytest.approx(np.sqrt(condition) / 2, rel=0.02)
    span = int(20 * np.sqrt(condition))
    measured = steps_per_e(om.sgd(plan.learning_rate, plan.momentum), condition, span, 3 * span)
    assert measured == pytest.approx(plan.steps_per_e, rel=0.1)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_nesterov_needs_root_r(condition):
    plan = theory.nesterov(1.0, 1 / condition)
    assert plan.steps_per_e == pytest.approx(np.sqrt(condition), rel=0.06)
    span = int(30 * np.sqrt(condition))
    tuned = om.sgd(plan.learning_rate, plan.momentum, nesterov=True)
    assert steps_per_e(tuned, condition, span, 3 * span) == pytest.approx(plan.steps_per_e, rel=0.1)


@pytest.mark.parametrize("change", [{"learning_rate": 0.8}, {"learning_rate": 1.01}, {"momentum": 0.98}])
def test_polyak_is_the_optimum(change):
    """Any other step size or momentum is slower, or does not converge at all."""
    best = theory.polyak(1.0, 1e-3)
    rate = best.learning_rate * change.get("learning_rate", 1.0)
    beta = best.momentum * change.get("momentum", 1.0)
    best_steps = steps_per_e(om.sgd(best.learning_rate, best.momentum), 1e3, 300, 900)
    other_steps = steps_per_e(om.sgd(rate, beta), 1e3, 300, 900)
    assert other_steps < 0 or other_steps > 1.05 * best_steps


def test_perfect_conditioning():
    assert theory.polyak(2.0, 2.0) == pytest.approx((0.5, 0.0, 0.0))
    assert theory.gradient_descent(2.0, 2.0) == (0.5, 0.0, 0.0)
    assert theory.polyak(2.0, 2.0).steps_per_e == 0.0


def root_through_noise(schedule):
    """The error after 20,000 looks at w - 3 through noise of variance 1, root mean square over 64 walkers."""
    tx = om.sgd(schedule)
    noise = jax.random.normal(jax.random.key(0), (20_000, 64))

    def step(carry, e):
        w, state = carry
        updates, state = tx.update(w - 3.0 + e, state, w)
        return (optax.apply_updates(w, updates), state), None

    (w, _), _ = jax.lax.scan(step, (jnp.zeros(64), tx.init(jnp.zeros(64))), noise)
    return float(jnp.sqrt(jnp.mean((w - 3.0) ** 2)))


def test_robbins_monro_finds_the_root_and_a_constant_step_does_not():
    """1/t averages the noise: σ/√t. A constant step a stays at σ √(a / (2 - a)), however long it runs.

    Of 64 walkers the root mean square has a standard deviation of 9 %, of which there are three.
    """
    assert root_through_noise(schedules.robbins_monro(1.0)) == pytest.approx(20_000**-0.5, rel=0.3)
    assert root_through_noise(0.1) == pytest.approx(np.sqrt(0.1 / 1.9), rel=0.3)


@pytest.mark.parametrize("exponent", [0.51, 0.75, 1.0])
def test_robbins_monro_formula(exponent):
    schedule = schedules.robbins_monro(0.3, exponent, 10.0)
    for t in (0, 1, 7, 100_000):
        for found in (schedule(t), jax.jit(schedule)(jnp.int32(t))):
            rounding.close(found, 0.3 / (1 + t / 10) ** exponent, dtype="float32")


def test_robbins_monro_joins_optax_schedules():
    joined = optax.join_schedules([optax.constant_schedule(1.0), schedules.robbins_monro(0.5)], [10])
    assert float(joined(5)) == 1.0
    assert float(joined(10)) == 0.5
