"""Products of commuting symmetric matrices, such as polynomials of one matrix, by their upper triangles.

A symmetric matrix is a tuple of blocks: the whole matrix alone, or three of four equal quarters,

    S = [[A, B], [Bᴴ, C]],    S T = [[A D + B Eᴴ, A E + B F], [·, Bᴴ E + C F]]        (1)

which saves a quarter of every product. The blocks are joined only at the end.
"""

import functools

import jax
import jax.numpy as jnp

from optimorph._core.numbers import upcast_dtype
from optimorph._core.target import Target

Symmetric = tuple[jax.Array, ...]

MIN_BLOCKED_ROWS = {"cpu": 512}
"""Platform → rows from which (1) is faster than the whole product; never on platforms not measured."""


def blocked(rows: int, target: Target) -> bool:
    """Whether a symmetric matrix with this many rows should be computed by (1)."""
    return rows >= MIN_BLOCKED_ROWS.get(target.platform, rows + 1)


def product(x: jax.Array, y: jax.Array, precision: str) -> jax.Array:
    """x y, accumulated in float32 or wider, at the given precision."""
    return jnp.matmul(x, y, precision=precision, preferred_element_type=upcast_dtype(x.dtype))


def gram(x: jax.Array, precision: str, in_blocks: bool) -> Symmetric:
    """x xᴴ, in blocks or whole."""
    if not in_blocks:
        return (product(x, x.mT.conj(), precision),)
    half = x.shape[-2] // 2
    top, bottom = x[..., :half, :], x[..., half:, :]
    return (
        product(top, top.mT.conj(), precision),
        product(top, bottom.mT.conj(), precision),
        product(bottom, bottom.mT.conj(), precision),
    )


def multiply(s: Symmetric, t: Symmetric, precision: str) -> Symmetric:
    """s t, for s and t that commute."""
    if len(s) == 1:
        return (product(s[0], t[0], precision),)
    times = functools.partial(product, precision=precision)
    (a, b, c), (d, e, f) = s, t
    return (  # (1)
        times(a, d) + times(b, e.mT.conj()),
        times(a, e) + times(b, f),
        times(b.mT.conj(), e) + times(c, f),
    )


def apply(s: Symmetric, x: jax.Array, precision: str) -> jax.Array:
    """s x, for any x."""
    return product(_whole(s), x, precision)


def combine(dtype: jnp.dtype, *terms: tuple[float, Symmetric]) -> Symmetric:
    """The linear combination of (factor, matrix) pairs, rounded to a dtype once."""
    wide = upcast_dtype(terms[0][1][0].dtype)
    factors, matrices = zip(*terms, strict=True)
    total = []
    for blocks in zip(*matrices, strict=True):
        x = factors[0] * blocks[0].astype(wide)
        for factor, block in zip(factors[1:], blocks[1:], strict=True):
            x = x + factor * block.astype(wide)
        total.append(x.astype(dtype))
    return tuple(total)


def identity(s: Symmetric) -> Symmetric:
    """The identity, in blocks as s."""
    ones = [jnp.eye(block.shape[-2], block.shape[-1], dtype=block.dtype) for block in s]
    if len(s) == 3:
        ones[1] = jnp.zeros_like(ones[1])
    return tuple(jnp.broadcast_to(one, block.shape) for one, block in zip(ones, s, strict=True))


def _whole(s: Symmetric) -> jax.Array:
    if len(s) == 1:
        return s[0]
    a, b, c = s
    top = jnp.concatenate([a, b], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([b.mT.conj(), c], axis=-1)], axis=-2)
