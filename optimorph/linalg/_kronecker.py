"""Kronecker factors of second moments of stacks of matrices, and the eigenbases of these factors."""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optimorph._core.numbers import as_scalar, varying
from optimorph._core.types import Numeric

FIRST_STEPS = 2
"""Of orthogonal iteration, for the first bases, which start from the identity. More have not been better."""

FIRST_VALUE = 0.1
"""Every tracked eigenvalue before the second step."""

_product = functools.partial(jnp.matmul, precision="highest")


class Kronecker(NamedTuple):
    """The factors of a stack of matrices `(*batch, n, m)`; a side without a factor has None.

    Args:
      left, right: L `(*batch, n, n)` and R `(*batch, m, m)`, Hermitian.
      left_basis, right_basis: orthogonal, near their eigenvectors in columns.
      left_values, right_values: eigenvalues that are tracked, `(*batch, n)` and `(*batch, m)`, or None.
    """

    left: Any
    right: Any
    left_basis: Any
    right_basis: Any
    left_values: Any = None
    right_values: Any = None


def has_factor(side: int, max_dim: int | None) -> bool:
    """A side longer than `max_dim` has no factor."""
    return max_dim is None or side <= max_dim


def first_factors(stack: jax.Array, max_dim: int | None, dtype: Any, tracked: bool) -> Kronecker:
    """Of a stack `(batch, n, m)`: factors of 0, bases that are the identity, and eigenvalues if `tracked`."""
    count, *sizes = stack.shape
    real = jnp.finfo(dtype).dtype

    def side(n):
        if not has_factor(n, max_dim):
            return None, None, None
        basis = jnp.array(jnp.broadcast_to(jnp.eye(n, dtype=dtype), (count, n, n)))
        return jnp.zeros_like(basis), basis, jnp.full((count, n), FIRST_VALUE, real) if tracked else None

    return Kronecker(*itertools.chain(*zip(*map(side, sizes), strict=True)))


def rotated(k: Kronecker, x: jax.Array) -> jax.Array:
    """Into the eigenbasis: Q_Lᴴ x Q_R."""
    x = x if k.left_basis is None else _product(_adjoint(k.left_basis), x)
    return x if k.right_basis is None else _product(x, k.right_basis)


def rotated_back(k: Kronecker, x: jax.Array) -> jax.Array:
    """Out of the eigenbasis: Q_L x Q_Rᴴ."""
    x = x if k.left_basis is None else _product(k.left_basis, x)
    return x if k.right_basis is None else _product(x, _adjoint(k.right_basis))


def with_gradient(k: Kronecker, g: jax.Array, weight: jax.Array) -> Kronecker:
    """The factors after one more gradient.

    L ← (1 - w) L + w g gᴴ        (1)
    R ← (1 - w) R + w gᴴ g        (2)
    """
    return k._replace(left=_factor(k.left, g, weight), right=_factor(k.right, _adjoint(g), weight))


def with_gradient_kl(
    k: Kronecker, g: jax.Array, weight: jax.Array, first: jax.Array, largest_inverse_root: Numeric | None
) -> Kronecker:
    """The factors after one more gradient, each seen through the inverse of the other.

        L ← (1 - w) L + w / m · g R⁻¹ gᴴ            (1)  R⁻¹ = Q_R λ_R⁻¹ Q_Rᴴ
        R ← (1 - w) R + w / n · gᴴ L⁻¹ g            (2)
        λ_L ← (1 - w) λ_L + w mean_j |p_ij|² / λ_R,j    (3)  p = Q_Lᴴ g Q_R; λ_R likewise

    The first gradient has no eigenvalues beside it: those of (1) and (2) are 1, and (3) is left out.
    """
    n, m = g.shape[-2:]
    roots = [
        jnp.ones((len(g), 1), jnp.finfo(g.dtype).dtype)
        if x is None
        else jnp.where(first, 1, jax.lax.rsqrt(x))
        for x in (k.left_values, k.right_values)
    ]
    rows, columns = roots[0][..., :, None], roots[1][..., None, :]
    half, tall = rotated(k._replace(left_basis=None), g), rotated(k._replace(right_basis=None), g)
    power = jnp.square(jnp.abs(rotated(k._replace(right_basis=None), half)))

    def values(old, new):
        if old is None:
            return None
        default = max(10, min(old.shape[-1], 4000))
        most = as_scalar(default if largest_inverse_root is None else largest_inverse_root, old)
        return jnp.where(first, old, jnp.maximum(_mean(old, new, weight), most**-2))

    return k._replace(
        left=_factor(k.left, half * (columns / math.sqrt(m)).astype(g.dtype), weight),  # (1)
        right=_factor(k.right, _adjoint(tall * (rows / math.sqrt(n)).astype(g.dtype)), weight),  # (2)
        left_values=values(k.left_values, jnp.mean(power * columns**2, axis=-1)),  # (3)
        right_values=values(k.right_values, jnp.mean(power * rows**2, axis=-2)),
    )


def orthogonal_iteration(
    matrix: jax.Array,
    basis: jax.Array,
    steps: int = 1,
    *,
    sort: bool = False,
    again: jax.Array | bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Orthogonal bases that are nearer to the eigenvectors of Hermitian matrices than those before.

        A = P / (tr P / n)                        (1)
        Q ← Q[:, order of diag(Qᴴ A Q)]           (2)  with `sort`, descending
        Q, _ ← qr((A + ε^⅔ I) Q)                  (3)  once in each step

    The small multiple of the identity in (3), ε being the rounding of the dtype, keeps what the basis says of
    directions in which P is zero: without it they would be made of rounding errors.

    P, the matrix, is positive semidefinite, and Q, the basis, is orthogonal, both `(batch, n, n)`. There is
    one step only unless `again`. Beside the new bases the order of (2) in all steps together is returned,
    int32 `(batch, n)`. The number of turns of the loop is static, so that reverse-mode derivatives exist.

    References:
      Golub & Van Loan 2013, "Matrix Computations", section 8.2.4 (orthogonal iteration).
    """
    n = matrix.shape[-1]
    mean = jnp.trace(matrix, axis1=-2, axis2=-1).real[..., None, None] / n
    scaled = matrix / jnp.where(mean > 0, mean, 1).astype(matrix.dtype)  # (1)
    shift = float(jnp.finfo(matrix.dtype).eps) ** (2 / 3)

    def step(q, order):
        aq = _product(scaled, q)
        if sort:
            by = jnp.argsort(-jnp.sum((q.conj() * aq).real, axis=-2), axis=-1).astype(jnp.int32)
            q, aq = (jnp.take_along_axis(x, by[..., None, :], -1) for x in (q, aq))  # (2)
            order = jnp.take_along_axis(order, by, -1)
        return jnp.linalg.qr(aq + shift * q)[0], order  # (3)

    order = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), matrix.shape[:-1])

    def turn(k, made):
        return jax.lax.cond((k == 0) | again, step, lambda *same: same, *made)

    return jax.lax.fori_loop(0, steps, turn, tuple(varying(x, scaled, basis) for x in (basis, order)))


def permuted(x: jax.Array, rows: jax.Array | None, columns: jax.Array | None) -> jax.Array:
    """Matrices with rows and columns in another order, where there is one."""
    x = x if rows is None else jnp.take_along_axis(x, rows[..., :, None], -2)
    return x if columns is None else jnp.take_along_axis(x, columns[..., None, :], -1)


def _factor(old: jax.Array | None, y: jax.Array, weight: jax.Array) -> jax.Array | None:
    return None if old is None else _mean(old, _product(y, _adjoint(y)), weight)


def _mean(old: jax.Array, new: jax.Array, weight: jax.Array) -> jax.Array:
    w = weight.astype(old.dtype)
    return (1 - w) * old + w * new


def _adjoint(x: jax.Array) -> jax.Array:
    return x.mT.conj()
