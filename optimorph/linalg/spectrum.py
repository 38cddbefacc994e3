"""The singular values of stacks of matrices: all of them by decomposition, the largest by products alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from optimorph.core.numbers import upcast_dtype
from optimorph.linalg.symmetric import product
from optimorph.linalg.unit import not_zero, scaled

Stack = Inexact[Array, "*batch n m"]
Numbers = Float[Array, "*batch"]

METHODS = ("gram", "svd")

SQUARINGS = 10
"""Of a Gram matrix: its 1024th power, from which the largest of 1000 singular values is found to 0.34 %."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The singular values of a stack of matrices: what `spectrum` returns and every norm takes.

    Args:
      values: `(*batch, r)`, the largest first.
      shape: (inputs, outputs) of each matrix.
    """

    values: jax.Array
    shape: tuple[int, int]


def spectrum(x: Stack | Spectrum) -> Spectrum:
    """All singular values of every matrix, by singular value decomposition.

    Each is known to a few roundings of the largest, 1e-6 σ₁ in float32: what is smaller is noise. A spectrum
    comes back as it is, so of several norms of `spectrum(x)` only the first costs anything.
    """
    if isinstance(x, Spectrum):
        return x
    n, m = x.shape[-2:]
    if x.size == 0:
        real = jnp.finfo(upcast_dtype(x.dtype)).dtype
        return Spectrum(jnp.zeros((*x.shape[:-2], min(n, m)), real), (n, m))
    y, scale = scaled(x)
    return Spectrum(scale[..., 0] * jnp.linalg.svd(y, compute_uv=False), (n, m))


def is_exact(who: str, method: str) -> bool:
    """Whether a method is the exact one; refuse what is none."""
    if method not in METHODS:
        raise ValueError(f"{who}: no method is called {method!r}. Type {' or '.join(map(repr, METHODS))}.")
    return method == "svd"


def largest(values: jax.Array) -> jax.Array:
    """Of singular values, the largest; of none, 0."""
    return jnp.max(values, axis=-1, initial=0)


def gram_powers(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """c, and (σ₁ / c)² and (‖x‖F / c)² for it: (1) of `spectral_norm`."""
    if x.size == 0:
        zeros = spectrum(x).values.sum(axis=-1)
        return zeros, zeros, zeros
    y, scale = scaled(x)
    y = y.mT.conj() if y.shape[-2] > y.shape[-1] else y
    a = product(y, y.mT.conj(), "highest")
    power = _of_trace_one(jax.lax.stop_gradient(a))
    power = jax.lax.fori_loop(0, SQUARINGS, lambda _, b: _of_trace_one(product(b, b, "highest")), power)
    return scale[..., 0, 0], jnp.sum((a * power.conj()).real, axis=(-2, -1)), _trace(a)


def _of_trace_one(a: jax.Array) -> jax.Array:
    return a / not_zero(_trace(a))[..., None, None].astype(a.dtype)


def _trace(a: jax.Array) -> jax.Array:
    return jnp.trace(a, axis1=-2, axis2=-1).real
