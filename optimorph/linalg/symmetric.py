"""Symmetric matrices that commute, as polynomials of one matrix do, computed by their upper triangles.

A matrix is a tuple of its blocks: itself alone, or, of four equal quarters, the three of the upper triangle,

    S = [[A, B], [Bᴴ, C]],    S T = [[A D + B Eᴴ, A E + B F], [·, Bᴴ E + C F]]        (1)

which leaves out a quarter of every product, and never puts the matrix together again before the end.
"""

import functools
import operator

import jax
import jax.numpy as jnp

from optimorph.core.numbers import upcast_dtype

Symmetric = tuple[jax.Array, ...]

WORTH_WHILE = {"cpu": 512}
"""Platform → rows from which (1) is faster than the whole product; where it was not measured, never."""


def blocked(rows: int) -> bool:
    """Whether a symmetric matrix of so many rows should be computed by (1) on this machine."""
    return rows >= WORTH_WHILE.get(jax.default_backend(), rows + 1)


def product(x: jax.Array, y: jax.Array, precision: str) -> jax.Array:
    """x y, summed in float32 or wider, in the precision that was asked for and no lower."""
    kind = upcast_dtype(x.dtype)
    return jnp.matmul(x, y, precision=precision, preferred_element_type=kind)


def gram(x: jax.Array, precision: str, halves: bool) -> Symmetric:
    """x xᴴ, in blocks or whole."""
    times = functools.partial(product, precision=precision)
    if not halves:
        return (times(x, x.mT.conj()),)
    top, bottom = _halves(x)
    return times(top, top.mT.conj()), times(top, bottom.mT.conj()), times(bottom, bottom.mT.conj())


def multiply(s: Symmetric, t: Symmetric, precision: str) -> Symmetric:
    """s t, of two that commute."""
    times = functools.partial(product, precision=precision)
    if len(s) == 1:
        return (times(s[0], t[0]),)
    (a, b, c), (d, e, f) = s, t
    return (  # (1)
        times(a, d) + times(b, e.mT.conj()),
        times(a, e) + times(b, f),
        times(b.mT.conj(), e) + times(c, f),
    )


def apply(s: Symmetric, x: jax.Array, precision: str) -> jax.Array:
    """s x, of any x."""
    return product(_whole(s), x, precision)


def combine(dtype: jnp.dtype, *terms: tuple[float, Symmetric]) -> Symmetric:
    """The sum of multiples, rounded to a dtype once."""
    factors = [factor for factor, _ in terms]

    def total(*blocks: jax.Array) -> jax.Array:
        kind = upcast_dtype(blocks[0].dtype)
        scaled = (f * block.astype(kind) for f, block in zip(factors, blocks, strict=True))
        return functools.reduce(operator.add, scaled)

    return tuple(total(*row).astype(dtype) for row in zip(*(matrix for _, matrix in terms), strict=True))


def identity(s: Symmetric) -> Symmetric:
    """The identity, in the blocks of s."""
    ones = [jnp.eye(block.shape[-2], block.shape[-1], dtype=block.dtype) for block in s]
    if len(s) == 3:
        ones[1] = jnp.zeros_like(ones[1])
    return tuple(jnp.broadcast_to(one, block.shape) for one, block in zip(ones, s, strict=True))


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    half = x.shape[-2] // 2
    return x[..., :half, :], x[..., half:, :]


def _whole(s: Symmetric) -> jax.Array:
    if len(s) == 1:
        return s[0]
    a, b, c = s
    top = jnp.concatenate([a, b], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([b.mT.conj(), c], axis=-1)], axis=-2)
