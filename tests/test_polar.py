"""Properties of the polar factor: what it must be for every matrix, not how it is computed."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import papers
import pytest
import rounding
from hypothesis import given, settings
from hypothesis import strategies as st

import optimorph as om
from optimorph._distributed.map_by_shape import map_by_shape
from optimorph.linalg import Exact, NewtonSchulz, _symmetric, polar_express
from optimorph.linalg._coefficients import MAX_CONDITION
from optimorph.linalg._newton_schulz import operations

SHAPES = [
    (1, 1),
    (1, 7),
    (7, 1),
    (7, 7),
    (4, 16),
    (16, 4),
    (37, 100),
    (2, 3, 5, 4),
    (0, 3),
    (3, 0),
    (0, 4, 4),
]
METHODS = {
    "jordan": NewtonSchulz("jordan"),
    "polar_express": NewtonSchulz(),
    "polar_express8": NewtonSchulz(steps=8),
    "table": NewtonSchulz(((1.5, -0.5, 0.0),), steps=3),
    "you": NewtonSchulz("you"),
    "cubic": NewtonSchulz(polar_express(steps=8, degree=3), steps=8),
    "gram": NewtonSchulz(iteration="gram"),
    "gram8": NewtonSchulz(steps=8, iteration="gram"),
    "in_turns": NewtonSchulz(max_stack_bytes=1),
    "exact": Exact(),
}
every = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def matrix(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def condition(method, values):
    """What a polar factor, or its table, multiplies the rounding of the smallest singular values by."""
    values = values[values > 1e-7 * np.max(values)]
    return np.linalg.norm(values) / np.min(values) if isinstance(method, Exact) else method.table.slope


def spectrum(values, shape=(12, 20), seed=0):
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((shape[0], shape[0])))[0]
    v = np.linalg.qr(rng.standard_normal((shape[1], shape[1])))[0]
    return u[:, : len(values)] * values @ v[:, : len(values)].T


ZOO = {
    "uniform": np.linspace(0.01, 1, 12),
    "gaussian": np.abs(matrix(12)),
    "power": np.arange(1, 13.0) ** -1.5,
    "exponential": np.exp(-np.arange(12.0)),
    "heavy": np.abs(np.random.default_rng(0).standard_cauchy(12)),
    "rank1": np.array([3.0]),
    "orthonormal": np.ones(12),
    "deficient": np.array([2.0, 1.0, 0.5, 0, 0, 0]),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every
def test_float64_equals_the_polynomial_of_the_singular_values(method, shape):
    """Newton-Schulz by products = its scalar polynomial on the spectrum; Exact = U Vᴴ."""
    with jax.enable_x64(True):
        g = matrix(shape)
        out = np.asarray(method(jnp.asarray(g)))
        assert out.shape == shape
        if g.size == 0:
            return
        for got, one in zip(out.reshape(-1, *shape[-2:]), g.reshape(-1, *shape[-2:]), strict=True):
            rows = {
                "jordan": papers.JORDAN,
                "polar_express": papers.EXPRESS,
                "gram": papers.EXPRESS,
                "in_turns": papers.EXPRESS,
            }.get(next(k for k, v in METHODS.items() if v is method))
            if rows:
                np.testing.assert_allclose(got, papers.on_singular_values(one, rows), atol=1e-9)
            if isinstance(method, Exact):
                u, _, vh = np.linalg.svd(one, full_matrices=False)
                np.testing.assert_allclose(got, u @ vh, atol=1e-12)


@pytest.mark.parametrize("values", ZOO.values(), ids=ZOO)
@pytest.mark.parametrize("method", [*METHODS.values(), NewtonSchulz("cans")], ids=[*METHODS, "cans"])
def test_never_turns_a_direction_around(method, values):
    """Uᵀ polar(G) V is diagonal and not negative, whatever the spectrum."""
    g = jnp.asarray(spectrum(values), jnp.float32)
    u, _, vh = np.linalg.svd(spectrum(values), full_matrices=False)
    inside = u.T @ np.asarray(method(g), np.float64) @ vh.T
    bound = 8 * rounding.eps("float32") * condition(method, values)
    np.testing.assert_allclose(inside - np.diag(np.diag(inside)), 0, atol=bound)
    assert np.min(np.diag(inside)) > -bound
    assert np.max(np.diag(inside)) < 1.25


def test_polar_express_reaches_one():
    """max |1 - σ| where the smallest singular value is a given part of the norm."""
    for lower, steps, bound in ((1e-3, 5, 0.27), (1e-2, 5, 0.15), (1e-3, 8, 1e-3)):
        values = np.geomspace(lower, 1, 12)
        values[0] = lower * np.linalg.norm(values)
        out = NewtonSchulz(steps=steps)(jnp.asarray(spectrum(values), jnp.float32))
        assert np.max(np.abs(1 - np.linalg.svd(np.asarray(out), compute_uv=False))) < bound


@pytest.mark.examples("polar_express")
@every
def test_symmetries(method):
    """polar(U G Vᵀ) = U polar(G) Vᵀ; polar(Gᵀ) = polar(G)ᵀ; a stack is its slices."""
    with jax.enable_x64(True):
        g = jnp.asarray(matrix((5, 9)))
        u = jnp.asarray(np.linalg.qr(matrix((5, 5), 1))[0])
        v = jnp.asarray(np.linalg.qr(matrix((9, 9), 2))[0])
        np.testing.assert_allclose(method(u @ g @ v.T), u @ method(g) @ v.T, atol=1e-11)
        np.testing.assert_allclose(method(g.T), method(g).T, atol=1e-11)
        stack = jnp.asarray(matrix((3, 2, 5, 9)))
        np.testing.assert_allclose(method(stack)[1, 1], method(stack[1, 1]), atol=1e-11)


@every
def test_complex(method):
    with jax.enable_x64(True):
        g = matrix((4, 6)) + 1j * matrix((4, 6), 1)
        u, _, vh = np.linalg.svd(g, full_matrices=False)
        inside = u.conj().T @ np.asarray(method(jnp.asarray(g))) @ vh.conj().T
        np.testing.assert_allclose(inside, np.diag(np.diag(inside).real), atol=1e-9)


@pytest.mark.examples("jordan", "polar_express")
@every
@settings(deadline=None, max_examples=25)
@given(power=st.integers(-30, 30), seed=st.integers(0, 5))
def test_scale_does_not_matter(method, power, seed):
    """But for the rounding of scaled entries, of which small singular values are magnified."""
    g = matrix((5, 9), seed).astype(np.float32)
    scaled = (g.astype(np.float64) * 10.0**power).astype(np.float32)
    magnified = condition(method, np.linalg.svd(g, compute_uv=False))
    rounding.close(method(jnp.asarray(scaled)), method(jnp.asarray(g)), units=4, condition=magnified)


@pytest.mark.examples("polar_express-*")
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@every
def test_finite_and_in_its_dtype(method, dtype):
    extremes = [
        0.0,
        float(jnp.finfo(dtype).max),
        float(jnp.finfo(dtype).tiny),
        float(jnp.finfo(dtype).smallest_subnormal),
    ]
    for size in extremes:
        out = method(jnp.full((3, 5), size, dtype))
        assert out.dtype == dtype
        assert bool(jnp.all(jnp.isfinite(out)))
    assert not np.any(np.asarray(method(jnp.zeros((3, 5), dtype)), np.float32))


@every
def test_the_largest_numbers_are_not_flushed(method):
    g = np.asarray(matrix((3, 5)), np.float32)
    g = g / np.abs(g).max()
    huge = (g * 3e38).astype(np.float32)
    magnified = condition(method, np.linalg.svd(g, compute_uv=False))
    rounding.close(method(jnp.asarray(huge)), method(jnp.asarray(g)), units=4, condition=magnified)


def test_iteration_dtype():
    """bfloat16 inside: coarse, yet in the input's dtype and close."""
    g = jnp.asarray(matrix((16, 32)), jnp.float32)
    out = NewtonSchulz(dtype=jnp.bfloat16)(g)
    assert out.dtype == jnp.float32
    error = np.abs(np.asarray(out) - np.asarray(NewtonSchulz()(g))).max()
    assert 1e-5 < error < 25 * rounding.eps("bfloat16")  # five in each of five steps


def test_description_is_hashable_and_frozen():
    assert NewtonSchulz() == NewtonSchulz("polar_express", 5)
    assert len({NewtonSchulz(), NewtonSchulz("jordan"), NewtonSchulz([[1.5, -0.5, 0.0]])}) == 3
    with pytest.raises(AttributeError):
        NewtonSchulz().steps = 3


@pytest.mark.examples("polar_express")
@every
def test_under_vmap_and_jit(method):
    with jax.enable_x64(True):
        stack = jnp.asarray(matrix((3, 5, 9)))
        np.testing.assert_allclose(jax.jit(jax.vmap(method))(stack), method(stack), atol=1e-11)


REAL_SHAPES = [(1, 5), (5, 1), (7, 7), (64, 64), (31, 100), (100, 31), (48, 192), (1000, 37)]


@pytest.mark.examples("*-polar_express")
@pytest.mark.parametrize("coefficients", ["polar_express", "jordan", "you"])
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=str)
@rounding.in_float64
def test_gram_is_standard(shape, coefficients):
    g = jnp.asarray(matrix(shape))
    standard, gram = (NewtonSchulz(coefficients, iteration=name) for name in ("standard", "gram"))
    rounding.close(gram(g), standard(g), condition=gram.table.slope)


def reference(g, rows):
    """(2), in float64."""
    x = np.asarray(g, np.float64)
    x = x / np.linalg.norm(x)
    for a, b, c in rows:
        r = x @ x.T
        x = a * x + (b * r + c * r @ r) @ x
    return x


@pytest.mark.parametrize("iteration", ["standard", "gram"])
@pytest.mark.parametrize("values", ZOO.values(), ids=ZOO)
def test_float32_is_as_close_to_float64_as_the_plain_iteration(values, iteration):
    """The error of (2) written down plainly in NumPy's float32 is the measure."""
    g = spectrum(values).astype(np.float32)
    rows = NewtonSchulz().table.rows
    true = reference(g, rows)
    x = g / np.linalg.norm(g)
    for a, b, c in np.asarray(rows, np.float32):
        r = x @ x.T
        x = a * x + (b * r + c * r @ r) @ x
    polar = NewtonSchulz(iteration=iteration)
    own = np.abs(np.asarray(polar(jnp.asarray(g))) - true).max()
    assert own < 10 * np.abs(x - true).max() + rounding.eps("float32") * polar.table.slope


@pytest.mark.examples("3-*")
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("rows", [2, 3, 8, 9])
@rounding.in_float64
def test_blocked_products_are_plain_ones(rows, dtype):
    x = jnp.asarray(matrix((2, rows, 2 * rows)), dtype)
    x = x + (1j * x[:, ::-1] if dtype == "complex128" else 0)
    one, three = (_symmetric.gram(x, "highest", halves) for halves in (False, True))
    assert (len(one), len(three)) == (1, 3)
    squares = [_symmetric.multiply(s, s, "highest") for s in (one, three)]
    for s, t in ((one, three), squares):
        left, right = (_symmetric.apply(each, x, "highest") for each in (s, t))
        rounding.close(left, right)
    plain = np.asarray(one[0]) @ np.asarray(one[0])
    rounding.close(squares[0][0], plain)


@pytest.mark.parametrize("iteration", ["standard", "gram"])
def test_a_whole_iteration_in_blocks(iteration, monkeypatch):
    with jax.enable_x64(True):
        g = jnp.asarray(matrix((2, 9, 20)))
        plain = NewtonSchulz(iteration=iteration)(g)
        monkeypatch.setitem(_symmetric.MIN_BLOCKED_ROWS, "cpu", 1)
        np.testing.assert_allclose(NewtonSchulz(iteration=iteration)(g), plain, atol=1e-11)


def multiplications(shape, polar):
    """Those of all the products in the traced program."""
    dots = re.findall(r"dot_general.*: \((.*)\) -> (.*)", jax.jit(polar).lower(jnp.zeros(shape)).as_text())
    sizes = [[math.prod(map(int, re.findall(r"(\d+)x", t))) for t in (*x.split(", "), y)] for x, y in dots]
    return sum(math.isqrt(x * y * z) for x, y, z in sizes)  # (n k) (k m) (n m)


@pytest.mark.parametrize("shape", [(32, 32), (32, 56), (32, 128), (128, 32)], ids=str)
def test_auto_takes_the_iteration_of_fewer_operations(shape):
    standard, gram, auto = (
        multiplications(shape, NewtonSchulz(iteration=name)) for name in ("standard", "gram", "auto")
    )
    assert auto == min(standard, gram)
    assert (gram < standard) == (shape[0] != shape[1])


@pytest.mark.parametrize("steps", [5, 8])
def test_counted_operations_are_those_of_the_program(steps):
    for iteration in ("standard", "gram"):
        polar = NewtonSchulz(steps=steps, iteration=iteration)
        restarts = polar.table.restarts() if iteration == "gram" else None
        assert operations((24, 60), polar.table.rows, restarts, False) == multiplications((24, 60), polar)


def test_tables_too_steep_for_gram_are_iterated_plainly():
    plain = multiplications((32, 128), NewtonSchulz("cans", iteration="standard"))
    assert multiplications((32, 128), NewtonSchulz("cans")) == plain


@pytest.mark.parametrize("shape", [(16, 64, 64), (16, 64, 96), (16, 64, 128), (16, 192, 64)], ids=str)
def test_memory_is_bounded(shape):
    """Temporaries are at most three times the stack, and with a cap of what the cap allows."""
    stack = jnp.zeros(shape)

    def temporary(polar):
        return jax.jit(polar).lower(stack).compile().memory_analysis().temp_size_in_bytes

    assert temporary(NewtonSchulz()) <= 3 * stack.nbytes
    capped = NewtonSchulz(max_stack_bytes=stack.nbytes // 8)
    assert temporary(capped) <= stack.nbytes * (1 + 4 / 8) + 1024


def test_precision_and_dtype_are_honoured():
    def text(polar):
        return jax.jit(polar).lower(jnp.zeros((8, 12))).as_text()

    assert "precision = [HIGHEST, HIGHEST]" in text(NewtonSchulz())
    assert "precision = [DEFAULT, DEFAULT]" in text(NewtonSchulz(precision="default"))
    half = text(NewtonSchulz(dtype=jnp.bfloat16))
    assert re.search(r"dot_general.*xbf16>, tensor<[^>]*xbf16>\) -> tensor<[^>]*xf32>", half)


def test_gradients_are_right():
    polar = NewtonSchulz(steps=3)
    with jax.enable_x64(True):
        g, h = jnp.asarray(matrix((3, 5))), jnp.asarray(matrix((3, 5), 1))
        slope = jax.jvp(polar, (g,), (h,))[1]
        np.testing.assert_allclose(slope, (polar(g + 1e-6 * h) - polar(g - 1e-6 * h)) / 2e-6, atol=1e-6)


def test_one_trace_for_one_shape():
    traces = []

    @jax.jit
    def polar(x):
        traces.append(x.shape)
        return NewtonSchulz()(x)

    for seed in range(3):
        polar(jnp.asarray(matrix((4, 6), seed), jnp.float32))
    assert traces == [(4, 6)]


def test_all_matrices_of_a_shape_are_one_call():
    seen = []

    def watched(x):
        seen.append(x.shape)
        return 2 * x

    params = {
        "a": jnp.ones((4, 6)),
        "b": jnp.ones((6, 4)),
        "c": jnp.ones((2, 3, 4, 6)),
        "d": jnp.ones((4, 18)),
        "e": jnp.ones((5, 6)),
    }
    rules = {"c": "bbio", "d": "i(3o)", "*": "io"}
    tx = om.orthogonalize(watched, rules)
    updates, _ = tx.update(params, tx.init(params))
    assert sorted(seen) == [(1, 5, 6), (1, 6, 4), (10, 4, 6)]
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda x: 2 * x, params))


@rounding.in_float64
def test_high_and_wide_matrices_go_together():
    params = {"a": matrix((4, 6)), "b": matrix((6, 4), 1), "c": matrix((2, 6, 4), 2), "d": matrix((4, 4), 3)}
    params = jax.tree.map(jnp.asarray, params)
    tx = om.orthogonalize(Exact(), {"c": "bio", "*": "io"})
    text = jax.jit(tx.update).lower(params, tx.init(params)).as_text()
    assert "tensor<4x4x6xf64>" in text
    updates, _ = tx.update(params, tx.init(params))
    for name in params:
        np.testing.assert_allclose(updates[name], Exact()(params[name]), atol=1e-12)


def test_empty_stacks_stay_empty():
    """Of no matrices, and of matrices without rows: they go into no call."""
    stacks = [jnp.zeros((0, 3, 5)), jnp.ones((2, 3, 5)), jnp.zeros((2, 5, 0))]
    found = map_by_shape(lambda x: 2 * x, stacks, transpose=True)
    assert [x.shape for x in found] == [x.shape for x in stacks]
    np.testing.assert_array_equal(found[1], 2 * stacks[1])


def test_the_program_grows_with_shapes_not_leaves():
    def products(count):
        params = {f"w{k}": jnp.zeros((8, 8)) for k in range(count)}
        tx = om.muon(0.02, axes={"*": "io"})
        return jax.jit(tx.update).lower(params, tx.init(params), params).as_text().count("dot_general")

    assert products(40) == products(2) == products(1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("values", ZOO.values(), ids=ZOO)
def test_half_precision_stays_close(values, dtype):
    """To the rounding of each, times the Gram condition, or five roundings in each of five steps."""
    g = jnp.asarray(spectrum(values, (16, 64)), jnp.float32)
    u, s, vh = np.linalg.svd(spectrum(values, (16, 64)), full_matrices=False)
    inside = np.diag(u.T @ np.asarray(NewtonSchulz(dtype=dtype)(g), np.float64) @ vh.T)
    exact = np.diag(u.T @ np.asarray(NewtonSchulz()(g), np.float64) @ vh.T)
    large = s > 0.05 * np.linalg.norm(s)
    bound = rounding.eps(dtype) * {"float16": MAX_CONDITION, "bfloat16": 25}[dtype]
    np.testing.assert_allclose(inside[large], exact[large], atol=bound)


def test_bfloat16_is_iterated_plainly():
    plain = multiplications((32, 128), NewtonSchulz(dtype=jnp.bfloat16, iteration="standard"))
    assert multiplications((32, 128), NewtonSchulz(dtype=jnp.bfloat16)) == plain
    assert multiplications((32, 128), NewtonSchulz(dtype=jnp.float16)) < plain
