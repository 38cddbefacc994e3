"""The extreme eigenvalues of Hessians: those that are known, and what theory makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import optimorph as om
from optimorph.curvature import extremes


def symmetric(eigenvalues, seed=0):
    """A matrix of these eigenvalues, in float64."""
    size = len(eigenvalues)
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]
    return q * np.asarray(eigenvalues) @ q.T


def quadratic(w, h):
    return 0.5 * w @ h @ w


def ends(found):
    return np.array([found.largest, found.smallest], np.float64)


def ends_of(values):
    return np.array([max(values), min(values)])


SPECTRA = {
    "condition 1e3": np.geomspace(1e-3, 1, 30),
    "indefinite": np.linspace(-3, 5, 30),
    "negative": -np.geomspace(0.1, 10, 30),
    "singular": np.array([0.0] * 10 + [1.0, 2.0, 7.0]),
    "three values": np.array([1.0] * 5 + [2.0] * 20 + [9.0] * 5),
    "one value": np.full(12, 3.0),
    "one number": np.array([-2.0]),
    "none": np.zeros(8),
}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
def test_known_spectra(values, dtype):
    """As many steps as there are parameters know all, so do more, and so do as many as distinct values."""
    with jax.enable_x64(dtype == "float64"):
        h = jnp.asarray(symmetric(values), dtype)
        w = jnp.asarray(np.random.default_rng(1).standard_normal(len(values)), dtype)
        for steps in (len(values), 100, max(1, len(np.unique(values.round(6))))):
            found = extremes(quadratic, w, h, steps=steps)
            rounding.close(ends(found), ends_of(values), condition=len(values), dtype=dtype)
            assert all(leaf.dtype == dtype for leaf in found)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_rounding_noise_is_no_direction(dtype):
    """What is left of a Krylov space that has run out, in other rounding for every basis."""
    with jax.enable_x64(dtype == "float64"):
        for seed in range(20):
            h, w = jnp.asarray(symmetric([3.0] * 12, seed), dtype), jnp.ones(12, dtype)
            found = extremes(quadratic, w, h, steps=12)
            rounding.close(ends(found), np.array([3.0, 3.0]), condition=12, dtype=dtype)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(-1, 1), min_size=40, max_size=40), st.integers(0, 100))
def test_too_few_steps_know_their_error(values, seed):
    """An eigenvalue is within the error of each end, and neither is beyond the spectrum."""
    with jax.enable_x64(True):
        h = jnp.asarray(symmetric(values, seed))
        found = extremes(quadratic, jnp.zeros(40), h, steps=8, key=jax.random.key(seed))
        for end, error in ((found.largest, found.largest_error), (found.smallest, found.smallest_error)):
            assert np.min(np.abs(np.array(values) - end)) <= error + 1e-12
        assert min(values) - 1e-12 <= found.smallest
        assert found.largest <= max(values) + 1e-12


def test_the_error_is_the_residual():
    """‖H u - θ u‖ of the best u in the span of H's first powers on v, computed by QR."""
    with jax.enable_x64(True):
        h = symmetric(np.geomspace(1e-2, 1, 30))
        key = jax.random.key(3)
        found = extremes(quadratic, jnp.zeros(30), jnp.asarray(h), steps=5, key=key)
        powers = [np.asarray(optax.tree.random_like(key, jnp.zeros(30), jax.random.normal, jnp.float64))]
        for _ in range(4):
            powers.append(h @ powers[-1])
        basis = np.linalg.qr(np.stack(powers, 1))[0]
        theta, y = np.linalg.eigh(basis.T @ h @ basis)
        residuals = np.linalg.norm(h @ basis @ y - basis @ y * theta, axis=0)
        np.testing.assert_allclose(ends(found), theta[[-1, 0]], rtol=1e-8)
        np.testing.assert_allclose([found.largest_error, found.smallest_error], residuals[[-1, 0]], rtol=1e-6)
        assert found.largest_error > 1e-5


@pytest.mark.parametrize("power", [-30, -20, 20, 30])
def test_any_size(power):
    values = np.linspace(-1, 4, 12)
    h = jnp.asarray(symmetric(values) * 10.0**power, jnp.float32)
    found = extremes(quadratic, jnp.zeros(12), h)
    rounding.close(ends(found) / 10.0**power, ends_of(values), condition=12, dtype="float32")


def network(params, x, y):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    return jnp.mean((hidden @ params["second"] - y) ** 2) + params["shift"] ** 2


def a_network(dtype):
    rng = np.random.default_rng(0)
    shapes = {"first": {"kernel": (5, 6), "bias": (6,)}, "second": (6, 2), "shift": ()}
    draw = lambda shape: jnp.asarray(0.5 * rng.standard_normal(shape), dtype)  # noqa: E731
    params = jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return params, draw((20, 5)), draw((20, 2))


def dense(params, *data):
    flat, tree = ravel_pytree(params)
    return np.linalg.eigvalsh(jax.hessian(lambda w: network(tree(w), *data))(flat))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_network(dtype):
    """Against the eigenvalues of the whole Hessian, which is indefinite."""
    with jax.enable_x64(dtype == "float64"):
        params, *data = a_network(dtype)
        values = dense(params, *data)
        found = extremes(network, params, *data, steps=40)
        assert values[0] < 0 < values[-1]
        rounding.close(ends(found), ends_of(values), condition=len(values), dtype=dtype)
        assert max(found.largest_error, found.smallest_error) < 1e-4
        assert found.condition == np.inf


def test_tree_and_flat_agree():
    """And so do trees with None, and of numbers that NumPy or Python hold."""
    with jax.enable_x64(True):
        params, *data = a_network("float64")
        flat, tree = ravel_pytree(params)
        whole = extremes(network, params, *data, steps=45)
        for loss, other in (
            (lambda w, *data: network(tree(w), *data), flat),
            (network, params | {"absent": None}),
            (network, jax.tree.map(np.asarray, params) | {"shift": float(params["shift"])}),
        ):
            np.testing.assert_allclose(ends(extremes(loss, other, *data, steps=45)), ends(whole), rtol=1e-9)


def test_half_precision_and_mixtures_are_computed_in_the_wider():
    params, *data = a_network("float32")
    exact = extremes(network, params, *data)
    halves = extremes(network, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), *data)
    assert halves.largest.dtype == jnp.float32
    rounding.close(halves.largest, exact.largest, units=2, dtype="bfloat16")
    with jax.enable_x64(True):
        h = jnp.asarray(symmetric([1.0, 2.0, 3.0]))
        params = {"half": jnp.zeros(2, jnp.float16), "double": jnp.zeros(1)}
        found = extremes(lambda p: quadratic(jnp.append(p["half"].astype(float), p["double"]), h), params)
        assert found.largest.dtype == jnp.float64
        np.testing.assert_allclose(ends(found), [3, 1], rtol=1e-6)


def test_the_key_decides():
    h = jnp.asarray(symmetric(np.linspace(0, 1, 50)), jnp.float32)
    first, again, other, default = (
        extremes(quadratic, jnp.zeros(50), h, steps=5, key=key)
        for key in (jax.random.key(0), jax.random.key(0), jax.random.key(1), None)
    )
    assert first == again == default
    assert first.smallest != other.smallest


def test_it_is_traced_once():
    """For one loss: new data and new parameters cost nothing but the products."""
    traces = []

    def loss(w, h):
        traces.append(1)
        return quadratic(w, h)

    for k in (1.0, 2.0, 3.0):
        found = extremes(loss, jnp.full(4, k), k * jnp.eye(4))
        rounding.close(ends(found), k, dtype="float32")
    assert len(traces) == 1
    assert "[4,4]" in (text := str(jax.make_jaxpr(lambda w: extremes(quadratic, w, jnp.eye(4)))(jnp.ones(4))))
    assert "[32,4]" not in text  # four parameters, four steps
    jitted = jax.jit(lambda h: extremes(quadratic, jnp.zeros(4), h).condition)
    rounding.close(jitted(jnp.diag(jnp.asarray([1.0, 2, 3, 8]))), 8.0, condition=8)


def test_condition():
    def of(*values):
        return extremes(quadratic, jnp.zeros(len(values)), jnp.diag(jnp.asarray(values))).condition

    with jax.enable_x64(True):
        assert of(1.0, 5.0, 2.0) == pytest.approx(5)
        assert of(-1.0, 5.0) == of(0.0, 0.0) == of(-2.0, -1.0) == np.inf


def test_what_is_not_finite_is_reported():
    for bad in (jnp.nan, jnp.inf):
        found = extremes(quadratic, jnp.zeros(4), jnp.eye(4).at[2, 2].set(bad))
        assert np.isnan(found.largest)
        assert np.isnan(found.smallest)


@pytest.mark.parametrize("condition", [1e2, 1e3])
def test_to_theory_and_to_the_optimizer(condition):
    """Lanczos finds the ends of a quadratic, theory its best heavy ball, and that keeps its rate."""
    with jax.enable_x64(True):
        h = jnp.asarray(symmetric(np.geomspace(1, condition, 50)))
        found = extremes(quadratic, jnp.zeros(50), h, steps=50)
        assert found.condition == pytest.approx(condition)
        best = om.theory.polyak(float(found.largest + found.largest_error), float(found.smallest))
        tx = om.sgd(best.learning_rate, best.momentum)

        def step(_, carry):
            w, state = carry
            updates, state = tx.update(jax.grad(quadratic)(w, h), state, w)
            return optax.apply_updates(w, updates), state

        span = int(20 * np.sqrt(condition))
        run = jax.jit(lambda carry: jax.lax.fori_loop(0, span, step, carry))
        w = jnp.ones(50)
        early = run((w, tx.init(w)))
        late = run(early)
        measured = np.linalg.norm(late[0]) / np.linalg.norm(early[0])
        assert (measured / 2) ** (1 / span) == pytest.approx(best.contraction, rel=5e-4)  # errors are k ρᵏ
        assert best.contraction == pytest.approx((np.sqrt(condition) - 1) / (np.sqrt(condition) + 1))


def test_theory_refuses_what_is_not_convex():
    for values in ([-1.0, 2.0], [0.0, 0.0]):
        found = extremes(quadratic, jnp.zeros(2), jnp.diag(jnp.asarray(values)))
        with pytest.raises(ValueError, match=r"polyak: (strong_convexity|smoothness) must be .* above 0"):
            om.theory.polyak(float(found.largest), float(found.smallest))


W = {"w": jnp.ones(3)}
REFUSED = {
    "integers": (
        lambda: extremes(jnp.sum, W | {"step": jnp.int32(1)}),
        ["extremes", "'step'", "int32", "args"],
    ),
    "a whole number": (lambda: extremes(jnp.sum, {"a": [1.0, 3]}), ["extremes", "'a/1'", "int"]),
    "complex": (
        lambda: extremes(jnp.sum, {"z": jnp.ones(2, jnp.complex64)}),
        ["'z'", "complex64", "imaginary"],
    ),
    "a function": (lambda: extremes(jnp.sum, W | {"act": jnp.tanh}), ["extremes", "'act'", "eqx.filter"]),
    "nothing": (lambda: extremes(jnp.sum, {"a": None}), ["extremes", "no numbers"]),
    "nothing in it": (lambda: extremes(jnp.sum, jnp.zeros((0, 3))), ["extremes", "no numbers"]),
    "no steps": (lambda: extremes(jnp.sum, W, steps=0), ["extremes", "steps", "at least 1", "0", "steps=32"]),
    "boolean steps": (lambda: extremes(jnp.sum, W, steps=True), ["extremes", "steps", "True"]),
}


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert all(word in str(caught.value) for word in words)
