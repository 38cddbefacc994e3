"""The comparison of the other tests: it passes what rounding explains, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding

EPS = 2.0**-23
TREE = {"w": jnp.asarray([1.0, 1e-3]), "n": jnp.int32(3)}


def off(by):
    return TREE | {"w": TREE["w"] + jnp.asarray([0.0, by], jnp.float32)}


def test_within_units_times_condition_of_the_largest():
    rounding.close(off(7 * EPS), TREE)
    rounding.close(off(70 * EPS), TREE, condition=10)
    with pytest.raises(AssertionError, match=r"^\['w'\] is off by 9 units of 1.19e-07, not 8 at most"):
        rounding.close(off(9 * EPS), TREE)


def test_within_units_of_each():
    rounding.close_each(off(7e-3 * EPS), TREE)
    with pytest.raises(AssertionError, match="is off by"):
        rounding.close_each(off(9e-3 * EPS), TREE)


def test_the_dtype_is_that_of_what_is_found():
    rounding.close(jnp.bfloat16(1.01), 1.0, units=2)
    rounding.close(1.01, 1.0, units=2, dtype="bfloat16")
    with jax.enable_x64(True), pytest.raises(AssertionError):
        rounding.close(jnp.float64(1 + EPS), 1.0)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (TREE, TREE | {"n": jnp.int32(4)}),
        (TREE, {"w": TREE["w"]}),
        (jnp.ones(3), np.ones((1, 3))),
        (jnp.asarray([1.0, np.nan]), np.ones(2)),
        (jnp.ones(2), np.asarray([1.0, np.inf])),
        (jnp.asarray([np.inf]), np.asarray([-np.inf])),
        (jnp.full(3, 1e-30), np.zeros(3)),
    ],
    ids=["whole numbers", "leaves", "shapes", "NaN", "infinite", "signs", "nothing"],
)
def test_what_rounding_does_not_explain(found, expected):
    with pytest.raises(AssertionError):
        rounding.close(found, expected)


def test_what_is_not_finite_in_both():
    rounding.close(jnp.asarray([np.nan, -np.inf, 1.0]), np.asarray([np.nan, -np.inf, 1.0]))
