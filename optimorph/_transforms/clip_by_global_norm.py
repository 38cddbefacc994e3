"""Long gradients made shorter, all leaves by one factor."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._core.checks import check_numbers
from optimorph._core.numbers import as_scalar, cast_like, is_absent, upcast
from optimorph._core.roles import holds, scalar
from optimorph._core.rule import aligned
from optimorph._core.types import Numeric


class ClipState(NamedTuple):
    """The norm and the factor of clipping in the last step, float32 scalars. Setting them has no effect."""

    norm: jax.Array
    factor: jax.Array
    roles = holds(
        norm=scalar("norm of clip_by_global_norm", "clip_norm"),
        factor=scalar("factor of clip_by_global_norm", "clip_factor"),
    )


def clip_by_global_norm(max_norm: Numeric) -> optax.GradientTransformation:
    """Scale the updates so that their norm, taken over all leaves, is at most `max_norm`.

        ‖g‖ = √(Σ |gₖ|²)                  (1)
        u = g min(1, max_norm / ‖g‖)      (2)

    The norm is computed in float32 or wider. Before they are squared, the updates are divided by a power of 2
    near the largest |gₖ|, so no square overflows. Updates whose norm is small enough are returned bit by bit.
    A norm above the largest float32 number is reported as that number.

    If an update is NaN or infinite, all updates pass unchanged. The state then has the true norm and a factor
    of 1, and `skip_nonfinite` around the optimizer leaves the step out.

    In front of `muon` or `partition` the norm is that of all leaves. Inside a part of `partition` it is the
    norm of the leaves of this part. Inside `jax.shard_map` it is that of the shards of one device. Over a
    mesh it takes two all-reduces of scalars for all leaves that are sharded over the same axes.

    Args:
      max_norm: above 0, a number, an array or a tracer, in units of the gradient. With infinity the norm is
        only measured.

    Raises:
      ValueError: `max_norm` not above 0, when it is a concrete number.

    Equals:
      optax.clip_by_global_norm(max_norm)
    References:
      Pascanu, Mikolov & Bengio 2013, arXiv:1211.5063, algorithm 1; the scaled norm: Blue 1978, "A portable
      Fortran program to find the Euclidean norm of a vector".
    """
    who = "clip_by_global_norm"
    check_numbers(who, max_norm=max_norm)

    def init(params):
        return ClipState(jnp.zeros([], jnp.float32), jnp.ones([], jnp.float32))

    def update(updates, state, params=None):
        gs, tree, _ = aligned(who, updates, None)
        scale, root = _scaled_norm([g for g in gs if not is_absent(g)])
        norm, bound = root / scale, as_scalar(max_norm, root)  # (1)
        finite = jnp.isfinite(root)
        whole = (norm <= bound) | ~finite
        ratio = bound / jnp.where(whole, 1, root)

        def clip(g):
            x = _at_least(upcast(g), scale.dtype)
            shorter = x * scale.astype(x.dtype) * ratio.astype(x.dtype)  # (2)
            return cast_like(jnp.where(whole, x, shorter), g)

        factor = jnp.where(whole, 1, ratio * scale)
        most = float(jnp.finfo(jnp.float32).max)
        reported = jnp.where(finite, jnp.minimum(norm, most), root)
        out = tree.unflatten(g if is_absent(g) else clip(g) for g in gs)
        return out, ClipState(reported.astype(jnp.float32), factor.astype(jnp.float32))

    return optax.GradientTransformation(init, update)


def _scaled_norm(leaves: list) -> tuple[jax.Array, jax.Array]:
    """A power of two that brings the largest number into [1/4, 2), and the norm of all leaves times it."""
    kind = max(
        (jnp.finfo(upcast(g).dtype).dtype for g in leaves),
        key=lambda d: d.itemsize,
        default=np.dtype("float32"),
    )
    xs = [_at_least(upcast(g), kind) for g in leaves]
    parts = [part for x in xs for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
    parts = parts or [jnp.zeros(1, kind)]
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(p), initial=0) for p in parts]))
    _, half = jnp.frexp(jnp.sqrt(largest))  # XLA repeats a maximum in every leaf that uses it, but no root
    limits = jnp.finfo(kind)
    scale = jnp.ldexp(jnp.ones([], kind), -jnp.clip(2 * half, limits.minexp + 2, limits.maxexp - 2))
    squares = jnp.sum(jnp.stack([jnp.sum(jnp.square(p * scale)) for p in parts]))
    return scale, jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))


def _at_least(x: jax.Array, kind: np.dtype) -> jax.Array:
    """`x` in the real dtype `kind`, or in the complex one of its precision."""
    return x.astype(np.result_type(kind, np.complex64) if jnp.iscomplexobj(x) else kind)
