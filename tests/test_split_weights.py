"""bfloat16 weights with what they leave of float32: nothing is lost that float32 would have kept."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimorph as om

KEY = jax.random.key(0)
LARGEST = 0x7F7F8000  # from here on the next bfloat16 number is infinite
FORMS = {"8": (8, None), "8 by chance": (8, KEY), "16": (16, None)}
forms = pytest.mark.parametrize(("bits", "key"), FORMS.values(), ids=FORMS)


@functools.cache
def compiled(bits):
    return jax.jit(functools.partial(om.split_weights, bits=bits))


def of_every_exponent():
    """Both signs, both ends, ties, neighbours of powers of two, and a thousand others of each."""
    edges = [0, 1, 2, 128, 129, 130, 257, 258, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x17FFF]
    edges += [0x18000, 0x18001, 0x7F7FFF, 0x7F8000, 0x7F8001, 0x7FFFFE, 0x7FFFFF]
    others = np.random.default_rng(0).integers(0, 2**23, 1000, np.uint32)
    mantissas = np.concatenate([np.array(edges, np.uint32), others])
    bits = (np.arange(256, dtype=np.uint32)[:, None] << 23 | mantissas).ravel()
    return np.concatenate([bits, bits | 0x80000000]).view(np.float32)


def steps(x):
    """Of float32, from 0 up on either side."""
    return np.asarray(x).view(np.uint32).astype(np.int64) & 0x7FFFFFFF


@forms
def test_invariants_over_every_exponent(bits, key):
    x = of_every_exponent()
    finite = steps(x) < LARGEST
    weights, residuals = compiled(bits)(x, key=key)
    joined = om.join_weights(weights, residuals)
    assert (weights.dtype, residuals.dtype) == (jnp.bfloat16, jnp.dtype(f"int{bits}"))
    # (1) no bfloat16 number is nearer to what is joined, nor to x; without ties it is astype's
    whole = np.asarray(weights).astype(np.float32)
    for y in (np.asarray(joined), x):
        away = np.abs(steps(whole) - steps(y))[finite]
        assert away.max() == 0x8000 if bits == 16 or y is x else away.max() < 0x8000
        tied = y.view(np.uint32) & 0xFFFF == 0x8000
        np.testing.assert_array_equal(whole[finite & ~tied], y[finite & ~tied].astype(jnp.bfloat16))
    # (2)
    off = np.abs(steps(joined) - steps(x))[finite].max()
    assert (
        off == {"8": 129, "8 by chance": 257, "16": 0}[next(n for n, v in FORMS.items() if v == (bits, key))]
    )
    # (3) whatever the key: the pair is that of what it joins to
    again = compiled(bits)(joined, key=None if key is None else jax.random.key(1))
    known = ~np.isnan(x)
    for new, old in zip(again, (weights, residuals), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[known], np.asarray(old)[known])
    # signs, zeros, infinities and NaN
    np.testing.assert_array_equal(np.signbit(joined)[known], np.signbit(x)[known])
    for special in (x == 0, np.isinf(x)):
        np.testing.assert_array_equal(np.asarray(joined)[special], x[special])
    np.testing.assert_array_equal(np.isnan(joined), ~known)
    np.testing.assert_array_equal(np.isnan(whole), ~known)
    assert not np.any(np.asarray(residuals)[~known])
    np.testing.assert_array_equal(np.isinf(joined), np.isinf(x))
    if bits == 16:
        np.testing.assert_array_equal(np.asarray(joined).view(np.uint32)[known], x.view(np.uint32)[known])
    else:
        assert np.all(np.isfinite(whole[np.isfinite(x)]))


@forms
def test_an_update_of_zero_changes_nothing(bits, key):
    """But -0, and what is too small for the machine's own sums."""
    x = of_every_exponent()
    x = x[np.isfinite(x) & (np.abs(x) >= 2.0**-126)]
    pair = compiled(bits)(x, key=key)
    moved = om.apply_updates(om.join_weights(*pair), np.zeros_like(x))
    for new, old in zip(compiled(bits)(moved, key=key), pair, strict=True):
        np.testing.assert_array_equal(new, old)


STORES = {
    "bfloat16": (
        lambda p, k: jax.tree.map(lambda w: w.astype(jnp.bfloat16), p),
        lambda p: jax.tree.map(lambda w: w.astype(jnp.float32), p),
    ),
    "float32": (lambda p, k: p, lambda p: p),
    "8": (lambda p, k: om.split_weights(p), lambda pair: om.join_weights(*pair)),
    "8 by chance": (
        lambda p, k: om.split_weights(p, key=jax.random.fold_in(KEY, k)),
        lambda pair: om.join_weights(*pair),
    ),
    "16": (lambda p, k: om.split_weights(p, 16), lambda pair: om.join_weights(*pair)),
}
STEPS = 2000


def test_the_same_small_updates():
    """Two thousand of a millionth to a hundredth of the weights: those of float32, or next to them."""
    rng = np.random.default_rng(1)
    start = rng.uniform(0.5, 4, 512).astype(np.float32) * rng.choice([-1, 1], 512)
    sizes = np.abs(start) * np.geomspace(1e-6, 1e-2, 512).astype(np.float32)

    keys = jax.random.split(KEY, STEPS)  # drift and noise, the same numbers in all programs
    updates = jax.jit(jax.vmap(lambda key: sizes * (1 + jax.random.normal(key, start.shape)) / 8))(keys)

    def run(store, load):
        def step(stored, k_and_update):
            k, update = k_and_update
            return store(om.apply_updates(load(stored), update), k), None

        xs = jnp.arange(STEPS), updates
        return np.asarray(load(jax.lax.scan(step, store(jnp.asarray(start), 0), xs)[0]), float)

    ends = {name: run(*forms) for name, forms in STORES.items()}
    np.testing.assert_array_equal(ends["16"], ends["float32"])
    largest = np.maximum(np.abs(start), np.abs(ends["float32"]))
    z = (ends["8 by chance"] - ends["float32"]) / (np.sqrt(STEPS) * 129 * 2.0**-23 * largest)
    assert np.abs(z).max() < 5
    assert abs(z.mean()) < 5 / np.sqrt(len(z))
    small = sizes < np.abs(start) / 130000  # of which an update is an eighth, with noise up to all
    lost = np.abs(ends["8"] - start)[small] <= 129 * 2.0**-23 * np.abs(start)[small]
    assert lost.all()
    middle = (sizes > np.abs(start) / 10000) & (sizes < np.abs(start) / 1000)
    far = np.abs(ends["bfloat16"] - ends["float32"]) / np.abs(ends["float32"] - start)
    near = np.abs(ends["8"] - ends["float32"]) / np.abs(ends["float32"] - start)
    assert far[middle].min() > 0.5
    assert near[middle & (sizes > np.abs(start) / 5000)].max() < 0.05


@pytest.mark.slow
def test_a_training_run():
    """AdamW at 1e-5, gradients those of bfloat16 weights: with 8 bits by chance and 16, that of float32."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 32)).astype(np.float32)
    y = np.sign(x @ rng.standard_normal(32) + 0.5 * rng.standard_normal(256)).astype(np.float32)
    params = {"w": jnp.asarray(rng.uniform(-3, 3, 32), jnp.float32), "b": jnp.float32(1)}
    tx = om.adamw(1e-5, weight_decay=0.1)

    def loss(params):
        w, b = params["w"].astype(jnp.float32), params["b"].astype(jnp.float32)
        return jnp.mean(jax.nn.softplus(-y * (x @ w + b)))

    def train(store, load):
        def step(carry, k):
            stored, state = carry
            joined = load(stored)
            gradients = jax.grad(loss)(STORES["bfloat16"][0](joined, k))
            gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
            updates, state = tx.update(gradients, state, joined)
            return (store(om.apply_updates(joined, updates), k), state), None

        (stored, _), _ = jax.lax.scan(step, (store(params, 0), tx.init(params)), jnp.arange(STEPS))
        return load(stored)

    ends = {name: train(*forms) for name, forms in STORES.items()}
    won = {name: float(loss(params) - loss(end)) for name, end in ends.items()}
    assert won["float32"] > 0.05
    assert abs(won["16"] / won["float32"] - 1) < 1e-3
    assert abs(won["8 by chance"] / won["float32"] - 1) < 0.03
    assert won["bfloat16"] < 0.01
    assert won["8"] < 0.5 * won["float32"]  # weights above 1.3 stand still at this rate


@pytest.mark.slow
@forms
def test_nothing_is_kept_twice(bits, key):
    """Donated, each part is written where it was; beside them there is one leaf at a time, of many.

    Where programs are scheduled for memory, which must be asked for on CPUs: else all leaves are at once.
    """
    params = {f"w{k}": jnp.ones((64, 128)) for k in range(16)}
    tx = om.adamw(1e-3, weight_decay=0.1)
    pair, state = om.split_weights(params, bits), tx.init(params)

    def step(pair, state, gradients):
        joined = om.join_weights(*pair)
        updates, state = tx.update(gradients, state, joined)
        return om.split_weights(om.apply_updates(joined, updates), bits, key), state

    program = jax.jit(step, donate_argnums=(0, 1), keep_unused=True).lower(pair, state, params)
    memory = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    analysis = program.compile(memory).memory_analysis()
    assert analysis.alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves((pair, state)))
    assert sum(x.nbytes for x in jax.tree.leaves(pair)) == (2 + bits // 8) * 16 * 64 * 128
    assert analysis.temp_size_in_bytes <= 8 * 64 * 128  # 8 bytes for every number of one leaf


class Model(eqx.Module):
    kernel: jax.Array
    bias: jax.Array | None
    count: jax.Array


@forms
def test_trees_and_shapes(bits, key):
    """Any container; None, empty and 0-d leaves; what is not float32 stays whole."""

    def same(new, old):
        assert type(new) is type(old)
        assert new is old or (new.dtype == old.dtype and jnp.all(new == old))

    whole = {
        "half": jnp.ones(3, jnp.float16),
        "narrow": jnp.ones(3, jnp.bfloat16),
        "complex": jnp.ones(3, jnp.complex64),
        "key": KEY,
        "count": np.arange(3),
        "on": True,
        "none": None,
    }
    params = [Model(jnp.full((2, 3), 0.1), None, jnp.int32(3)), (jnp.float32(0.3), jnp.zeros((0, 4))), whole]
    weights, residuals = om.split_weights(params, bits, key)
    assert jax.tree.structure(weights) == jax.tree.structure(params)
    for name, leaf in whole.items():
        same(weights[2][name], leaf)
    assert all(leaf is None for leaf in residuals[2].values())
    assert weights[0].kernel.dtype == weights[1][1].dtype == jnp.bfloat16
    assert residuals[0].count is residuals[0].bias is None
    found = {leaf.shape: leaf.dtype for leaf in jax.tree.leaves(residuals)}
    assert found == dict.fromkeys([(2, 3), (), (0, 4)], jnp.dtype(f"int{bits}"))
    joined = om.join_weights(weights, residuals)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    for name, leaf in whole.items():
        same(joined[2][name], leaf)
    for new, old in zip(jax.tree.leaves(joined[:2]), jax.tree.leaves(params[:2]), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        np.testing.assert_allclose(new, old, rtol={8: 258 / 2**23, 16: 0}[bits])
    shapes = jax.eval_shape(lambda p: om.split_weights(p, bits, key), params[:2])
    told = [(x.shape, x.dtype) for x in jax.tree.leaves((weights[:2], residuals[:2]))]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(shapes)] == told
    jitted = jax.jit(om.join_weights)(weights[:2], residuals[:2])
    jax.tree.map(np.testing.assert_array_equal, jitted, joined[:2])


def test_wide_numbers_are_whole():
    with jax.enable_x64(True):
        params = {"wide": jnp.ones(3, jnp.float64), "w": jnp.full(3, 0.1, jnp.float32)}
        weights, residuals = om.split_weights(params, 16)
        assert weights["wide"].dtype == jnp.float64
        np.testing.assert_array_equal(weights["wide"], params["wide"])
        assert residuals["wide"] is None
        joined = om.join_weights(weights, residuals)
        assert joined["w"].dtype == jnp.float32
        np.testing.assert_array_equal(joined["w"], params["w"])


def test_noise_is_the_leafs_own():
    """The same in any company; another for every leaf and every key."""
    w = jnp.linspace(1, 2, 1000)
    both = om.split_weights({"a": w, "b": w}, key=KEY)[1]
    np.testing.assert_array_equal(both["b"], om.split_weights({"b": w}, key=KEY)[1]["b"])
    assert np.any(np.asarray(both["a"]) != np.asarray(both["b"]))
    other = om.split_weights({"b": w}, key=jax.random.key(1))[1]["b"]
    assert np.any(np.asarray(other) != np.asarray(both["b"]))


def test_refusals():
    """By path, and with what to type."""
    params = {"a": jnp.ones(3), "b": {"c": jnp.ones((2, 2)), "n": jnp.arange(2)}}
    weights, residuals = om.split_weights(params)
    for bits in (4, 32, -8):
        with pytest.raises(
            ValueError, match=rf"split_weights: bits must be 8 or 16, but is {bits}. Type bits=8"
        ):
            om.split_weights(params, bits)
    for step in (om.split_weights, lambda p, key: om.apply_updates(p, p, key)):
        with pytest.raises(ValueError, match=r"_\w+: key must be one key of jax\.random, but is int32\[2\]"):
            step(params, key=jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=r"split_weights: 'b/c' is 'text', which is not an array"):
        om.split_weights({"a": 1.0, "b": {"c": "text"}})
    c = residuals["b"]["c"]
    wrong = {
        "'a': a weight, but no residual": (weights, {"b": residuals["b"]}),
        "'b/c': a weight, but no residual": (weights, {"a": residuals["a"], "b": None}),
        "'d': a residual, but no weight": (weights, residuals | {"d": c}),
        "'a': a residual, but no weight": (weights | {"a": None}, residuals),
        "'b/c': a residual of int8 and shape (2,) for a weight of bfloat16 and shape (2, 2)": (
            weights,
            residuals | {"b": {"c": c[0], "n": None}},
        ),
        "'a': a residual of int8 and shape (3,) for a weight of float32 and shape (3,)": (params, residuals),
        "'a': a residual of int32 and shape (3,) for": (weights, residuals | {"a": jnp.arange(3)}),
        "'a': a residual of 'text' for": (weights, residuals | {"a": "text"}),
        "the same leaves in other containers": ([weights["a"]], (residuals["a"],)),
    }
    for message, pair in wrong.items():
        with pytest.raises(ValueError) as caught:
            om.join_weights(*pair)
        assert str(caught.value).startswith("join_weights: the residuals do not match the weights.")
        assert message in str(caught.value)
        assert str(caught.value).endswith("weights, residuals = split_weights(params).")
    with pytest.raises(ValueError) as caught:
        om.join_weights(params, residuals)
    assert "'b/n'" not in str(caught.value)
