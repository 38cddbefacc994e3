"""Weights and updates added: rounding to the nearest as optax does, or right on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optimorph as om
from optimorph._core.rounding import stochastic_bfloat16

LARGEST = float(jnp.finfo(jnp.bfloat16).max)


def rounded(x, seed=0):
    return np.asarray(stochastic_bfloat16(jnp.asarray(x, jnp.float32), jax.random.key(seed))).astype(
        np.float32
    )


@pytest.mark.parametrize(
    "x", [1.0 + 2.0**-9, -(1.0 + 2.0**-9), np.pi, 1e-30, -1e30, 1.0 + 127 / 2**14, 3e-40]
)
def test_expectation(x):
    """The two neighbours, each as often as it must be: within 5 standard deviations of a million draws."""
    x = float(np.float32(x))
    draws = rounded(np.full(10**6, x, np.float32)).astype(float)
    bits = int(np.float32(x).view(np.uint32)) & 0xFFFF0000
    below, above = (float(np.uint32(b).view(np.float32)) for b in (bits, bits + 0x10000))
    assert set(draws) <= {below, above}
    p = (x - below) / (above - below)
    assert abs((draws == above).mean() - p) <= 5 * np.sqrt(p * (1 - p) / 1e6)


def test_over_keys():
    """Right on average for one number over many keys too."""
    keys = jax.random.split(jax.random.key(1), 10**5)
    draws = jax.vmap(lambda key: stochastic_bfloat16(jnp.float32(1 + 2.0**-9), key))(keys)
    assert abs(np.asarray(draws, np.float64).mean() - (1 + 2.0**-9)) < 5 * 2**-8 / np.sqrt(1e5)


@pytest.mark.parametrize(
    "x", [0.0, -0.0, np.inf, -np.inf, 1.0, -2.5, LARGEST, -LARGEST, 2.0**-126, 2.0**-133, -(2.0**-133)]
)
def test_numbers_of_bfloat16_stay(x):
    """Bit by bit, subnormal ones too."""
    out = stochastic_bfloat16(jnp.full(1000, np.float32(x)), jax.random.key(0))
    bits = np.asarray(jax.lax.bitcast_convert_type(out, jnp.uint16))
    np.testing.assert_array_equal(bits, np.float32(x).view(np.uint32) >> 16)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FFF8000])
def test_every_nan_stays_one(bits):
    x = jax.lax.bitcast_convert_type(jnp.full(1000, bits, jnp.uint32), jnp.float32)
    assert bool(jnp.all(jnp.isnan(stochastic_bfloat16(x, jax.random.key(0)))))


@pytest.mark.parametrize("x", [np.float32(3.3999e38), np.finfo(np.float32).max])
def test_finite_numbers_stay_finite(x):
    np.testing.assert_array_equal(rounded(np.full(1000, x)), LARGEST)
    np.testing.assert_array_equal(rounded(np.full(1000, -x)), -LARGEST)


def test_small_updates_add_up():
    """A thousand updates of 1/1024: nearest rounding stands still, stochastic rounding arrives."""
    params, updates = {"w": jnp.ones(4096, jnp.bfloat16)}, {"w": jnp.full(4096, 2.0**-10, jnp.bfloat16)}

    def train(key):
        def step(w, k):
            return om.apply_updates(w, updates, None if key is None else jax.random.fold_in(key, k)), None

        return jax.lax.scan(step, params, jnp.arange(1000))[0]["w"]

    assert bool(jnp.all(train(None) == 1))
    w = np.asarray(train(jax.random.key(0)), float)
    deviation = np.sqrt(1000 * 2**-10 * 2**-7)  # of one weight: steps of 2^-7, each an eighth of the time
    assert abs(w.mean() - (1 + 1000 / 1024)) < 5 * deviation / np.sqrt(4096)
    assert 0.5 * deviation < w.std() < 2 * deviation


def test_float32_addition():
    """A float32 update of a bfloat16 weight is not rounded before it is added."""
    w, u = jnp.bfloat16(1.0), np.float32(2.0**-8 + 2.0**-20)
    assert om.apply_updates({"w": w}, {"w": u})["w"] == 1 + 2.0**-7
    assert om.apply_updates({"w": w}, {"w": u.astype(jnp.bfloat16)})["w"] == 1  # a tie, to even


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.complex64, jnp.int32])
def test_other_dtypes_have_no_noise(dtype):
    w, u = jnp.arange(100).astype(dtype), jnp.full(100, 3).astype(dtype)
    with_key = om.apply_updates({"w": w}, {"w": u}, jax.random.key(0))["w"]
    assert with_key.dtype == dtype
    np.testing.assert_array_equal(with_key, w + u)


def test_integers_beyond_float32():
    assert om.apply_updates({"n": jnp.int32(2**24)}, {"n": jnp.int32(1)})["n"] == 2**24 + 1


@pytest.mark.parametrize("key", [None, jax.random.key(0), jax.random.PRNGKey(0)])
def test_missing_updates(key):
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": {"c": jnp.ones(2)}, "n": None}
    got = om.apply_updates(params, {"a": None, "b": {"c": None}, "n": None}, key)
    jax.tree.map(np.testing.assert_array_equal, got, params)
    got = om.apply_updates(params, {"a": params["a"], "b": {"c": None}, "n": None}, key)
    np.testing.assert_array_equal(got["a"], 2)
    assert got["n"] is None
    with pytest.raises(ValueError, match=r"'b/c': a parameter of shape .2,., but no update"):
        om.apply_updates(params, {"a": None, "b": None, "n": None}, key)


def test_numbers_without_an_update_stay_numbers():
    """A setting of an Equinox model is not made an array, which the next filter would take for a weight."""
    params = {"w": jnp.ones(3), "slope": 0.1, "depth": 2, "on": True, "phase": 1j}
    got = om.apply_updates(params, {"w": jnp.ones(3)} | dict.fromkeys(["slope", "depth", "on", "phase"]))
    weights, residuals = om.split_weights(params)
    for tree in (got, weights, om.join_weights(weights, residuals)):
        assert {name: type(x) for name, x in tree.items() if name != "w"} == {
            "slope": float,
            "depth": int,
            "on": bool,
            "phase": complex,
        }


def test_noise_is_the_leafs_own():
    """The same in any order and company; another for every leaf and every key."""
    w, u = jnp.ones(1000, jnp.bfloat16), jnp.full(1000, 2.0**-9, jnp.bfloat16)
    key = jax.random.key(3)
    names = ["a", "b", "c"]
    all_ = jax.jit(om.apply_updates)(dict.fromkeys(names, w), dict.fromkeys(names, u), key)
    alone = om.apply_updates({"b": w}, {"b": u}, key)
    np.testing.assert_array_equal(all_["b"], alone["b"])
    assert np.any(np.asarray(all_["a"]) != np.asarray(all_["b"]))
    other = om.apply_updates({"b": w}, {"b": u}, jax.random.fold_in(key, 1))
    assert np.any(np.asarray(other["b"]) != np.asarray(alone["b"]))


def test_the_noise_of_a_path_is_for_ever():
    """A resumed run repeats: neither Python's hash seed nor a new version may change it."""
    w, u = jnp.ones(24, jnp.bfloat16), jnp.full(24, 2.0**-8, jnp.bfloat16)
    up = om.apply_updates({"blocks": [{"kernel": w}]}, {"blocks": [{"kernel": u}]}, jax.random.key(0))
    assert "".join(str(int(x > 1)) for x in up["blocks"][0]["kernel"]) == "001101100101000010011111"
