"""Kronecker factors of second moments of stacks of matrices, and the eigenbases of these factors."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FIRST_STEPS = 8
"""Of orthogonal iteration, for the first bases, which start from the identity."""

FIRST_VALUE = 0.1
"""Every tracked eigenvalue before the second step."""

_product = functools.partial(jnp.matmul, precision="highest")


class Kronecker(NamedTuple):
    """The factors of a stack of matrices `(*batch, n, m)`; a side without a factor has arrays of size 0.

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


def first_factors(stack: jax.Array, max_dim: int | None, dtype: Any, tracked: bool) -> Kronecker:
    """Of a stack `(batch, n, m)`: factors of 0, and bases that are the identity.

    Args:
      stack: its shape counts.
      max_dim: sides that are longer have no factor.
      dtype: of factors and bases.
      tracked: whether there are eigenvalues.
    """
    count, *sizes = stack.shape
    sizes = [n if max_dim is None or n <= max_dim else 0 for n in sizes]
    factors = [jnp.zeros((count, n, n), dtype) for n in sizes]
    bases = [jnp.array(jnp.broadcast_to(jnp.eye(n, dtype=dtype), (count, n, n))) for n in sizes]
    real = jnp.finfo(dtype).dtype
    values = [jnp.full((count, n), FIRST_VALUE, real) if tracked else None for n in sizes]
    return Kronecker(*factors, *bases, *values)


def rotated(k: Kronecker, x: jax.Array) -> jax.Array:
    """Into the eigenbasis: Q_Lᴴ x Q_R."""
    x = _product(_adjoint(k.left_basis), x) if k.left_basis.size else x
    return _product(x, k.right_basis) if k.right_basis.size else x


def rotated_back(k: Kronecker, x: jax.Array) -> jax.Array:
    """Out of the eigenbasis: Q_L x Q_Rᴴ."""
    x = _product(k.left_basis, x) if k.left_basis.size else x
    return _product(x, _adjoint(k.right_basis)) if k.right_basis.size else x


def with_gradient(k: Kronecker, g: jax.Array, weight: jax.Array) -> Kronecker:
    """The factors after one more gradient.

    L ← (1 - w) L + w g gᴴ        (1)
    R ← (1 - w) R + w gᴴ g        (2)
    """
    left, right = _gram(k.left, g), _gram(k.right, _adjoint(g))
    return k._replace(left=_mean(k.left, left, weight), right=_mean(k.right, right, weight))


def with_gradient_kl(
    k: Kronecker, g: jax.Array, weight: jax.Array, first: jax.Array, largest_inverse_root: float | None
) -> Kronecker:
    """The factors after one more gradient, each seen through the inverse of the other.

        L ← (1 - w) L + w / m · g R⁻¹ gᴴ            (1)  R⁻¹ = Q_R λ_R⁻¹ Q_Rᴴ
        R ← (1 - w) R + w / n · gᴴ L⁻¹ g            (2)
        λ_L ← (1 - w) λ_L + w mean_j |p_ij|² / λ_R,j    (3)  p = Q_Lᴴ g Q_R; λ_R likewise

    The first gradient has no eigenvalues beside it: those of (1) and (2) are 1, and (3) is left out.
    """
    n, m = g.shape[-2:]
    roots = [
        jnp.where(first, 1, jax.lax.rsqrt(x)) if x.size else jnp.ones((*x.shape[:-1], 1), x.dtype)
        for x in (k.left_values, k.right_values)
    ]
    rows, columns = roots[0][..., :, None], roots[1][..., None, :]
    half = _product(g, k.right_basis) if k.right_basis.size else g
    tall = _product(_adjoint(k.left_basis), g) if k.left_basis.size else g
    p = _product(_adjoint(k.left_basis), half) if k.left_basis.size else half
    left = _gram(k.left, half * (columns / math.sqrt(m)).astype(g.dtype))
    right = _gram(k.right, _adjoint(tall * (rows / math.sqrt(n)).astype(g.dtype)))
    power = jnp.square(jnp.abs(p))
    means = jnp.mean(power * columns**2, axis=-1), jnp.mean(power * rows**2, axis=-2)
    values = []
    for old, new in zip((k.left_values, k.right_values), means, strict=True):
        most = largest_inverse_root or max(10, min(old.shape[-1], 4000))
        values.append(
            jnp.where(first, old, jnp.maximum(_mean(old, new, weight), most**-2)) if old.size else old
        )
    return k._replace(
        left=_mean(k.left, left, weight),
        right=_mean(k.right, right, weight),
        left_values=values[0],
        right_values=values[1],
    )


def orthogonal_iteration(
    matrix: jax.Array,
    basis: jax.Array,
    steps: jax.Array | int = 1,
    *,
    sort: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Orthogonal bases that are nearer to the eigenvectors of Hermitian matrices than those before.

        A = P / (tr P / n)                        (1)
        Q ← Q[:, order of diag(Qᴴ A Q)]           (2)  with `sort`, descending
        Q, _ ← qr((A + ε^⅔ I) Q)                  (3)  once in each step

    The small multiple of the identity in (3), ε being the rounding of the dtype, keeps what the basis says of
    directions in which P is zero: without it they would be made of rounding errors.

    Args:
      matrix: P, positive semidefinite, `(batch, n, n)`.
      basis: Q, orthogonal, `(batch, n, n)`.
      steps: how many, a number or an integer array.
      sort: whether (2) is done.

    Returns:
      The new bases, and the order of (2) in all steps together, int32 `(batch, n)`.

    References:
      Golub & Van Loan 2013, "Matrix Computations", section 8.2.4 (orthogonal iteration).
    """
    n = matrix.shape[-1]
    mean = jnp.trace(matrix, axis1=-2, axis2=-1).real[..., None, None] / n
    scaled = matrix / jnp.where(mean > 0, mean, 1).astype(matrix.dtype)  # (1)
    shift = float(jnp.finfo(matrix.dtype).eps) ** (2 / 3)

    def step(_, carry):
        q, order = carry
        aq = _product(scaled, q)
        if sort:
            by = jnp.argsort(-jnp.sum((q.conj() * aq).real, axis=-2), axis=-1).astype(jnp.int32)
            q, aq = (jnp.take_along_axis(x, by[..., None, :], -1) for x in (q, aq))  # (2)
            order = jnp.take_along_axis(order, by, -1)
        return jnp.linalg.qr(aq + shift * q)[0], order  # (3)

    order = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), matrix.shape[:-1])
    return jax.lax.fori_loop(0, steps, step, (basis, order))


def permuted(x: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Matrices with rows and columns in another order; an order of size 0 is none."""
    x = jnp.take_along_axis(x, rows[..., :, None], -2) if rows.size else x
    return jnp.take_along_axis(x, columns[..., None, :], -1) if columns.size else x


def _gram(factor: jax.Array, y: jax.Array) -> jax.Array:
    return _product(y, _adjoint(y)) if factor.size else factor


def _mean(old: jax.Array, new: jax.Array, weight: jax.Array) -> jax.Array:
    w = weight.astype(old.dtype)
    return (1 - w) * old + w * new


def _adjoint(x: jax.Array) -> jax.Array:
    return x.mT.conj()
