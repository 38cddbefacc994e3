"""How far rounding alone may take a result, on whatever processor it is computed.

Processors fuse products with sums, split sums and approximate roots each in its own way: their results differ
by a few roundings, which a badly conditioned problem magnifies. What is about mathematics is compared in
float64. A bound is so many `units` of the dtype's rounding, `finfo(dtype).eps`, times the `condition` of the
problem: by how much it magnifies a relative error of its input. A sum of n numbers has a condition of about
√n Σ|x| / |Σx|, 1 - β one of 1 / (1 - β), a polar factor one of 1 / σmin, and Newton-Schulz one of its slope
at zero, `table.slope`, as small singular values are multiplied by that.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

EXACT = {"xla_disable_hlo_passes": "algsimp,fusion", "xla_backend_optimization_level": 0}
"""Options of the compiler for what is compared bit by bit: every operation is done as it is written.

Without them a product is fused with a sum, or a quotient made a product, in one program and not in another.
"""


def in_float64(test, on=True):
    """A test whose numbers are float64 unless it says otherwise."""

    @functools.wraps(test)
    def wide(*args, **kwargs):
        with jax.enable_x64(on):
            return test(*args, **kwargs)

    return wide


def in_float32(test):
    """One that is about float32 among others in float64."""
    return in_float64(test, on=False)


def eps(dtype):
    """The distance from 1 to the next number; of complex numbers, that of their parts."""
    return float(jnp.finfo(dtype).eps)


def close(actual, expected, units=8.0, condition=1.0, dtype=None):
    """Every leaf is off by at most `units * eps * condition` times its largest expected number."""
    _compare(actual, expected, units * condition, dtype, lambda y: np.max(np.abs(y), initial=0.0))


def close_each(actual, expected, units=8.0, condition=1.0, dtype=None):
    """Every number is off by at most `units * eps * condition` times what is expected of it."""
    _compare(actual, expected, units * condition, dtype, np.abs)


def _compare(actual, expected, bound, dtype, size):
    """`eps` is that of `dtype`, or of each actual leaf; whole numbers are equal.

    The trees and shapes are the same, but that one number may stand for a whole leaf. What is not finite is
    the same in both.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(actual)
    assert structure == jax.tree.structure(expected), f"{structure} is not {jax.tree.structure(expected)}"
    for (path, x), y in zip(leaves, jax.tree.leaves(expected), strict=True):
        name, kind = jax.tree_util.keystr(path) or "the array", dtype or jnp.result_type(x)
        unit = eps(kind) if jnp.issubdtype(kind, jnp.inexact) else 0.0
        x, y = (np.asarray(z).astype(np.complex128) for z in (x, y))
        assert y.shape in (x.shape, ()), f"{name}: {x.shape} is not {y.shape}"
        finite = np.isfinite(x) & np.isfinite(y)
        np.testing.assert_array_equal(x[~finite], np.broadcast_to(y, x.shape)[~finite], err_msg=name)
        error = np.abs(np.subtract(x, y, where=finite, out=np.zeros_like(x)))
        of = size(np.where(finite, y, 0))
        if np.any(error > bound * unit * of):
            with np.errstate(over="ignore"):
                worst = np.max(error / np.maximum(of, np.finfo(float).tiny))
            raise AssertionError(
                f"{name} is off by {worst / (unit or 1):.3g} units of {unit:.3g}, not {bound:.3g} at most"
            )
