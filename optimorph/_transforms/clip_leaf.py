"""Long updates made shorter, each leaf by itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimorph._core.checks import check_numbers
from optimorph._core.numbers import as_scalar
from optimorph._core.rule import Rule, called, transform
from optimorph._core.types import Numeric, Rules
from optimorph._distributed.reductions import Reduction, reduction
from optimorph._routing.rules import match_shardings, warn_unused


def clip_norm(max_norm: Numeric, shardings: Rules | None = None) -> optax.GradientTransformationExtraArgs:
    """Scale the update of each leaf so that its norm is at most `max_norm`.

        u = g min(1, max_norm / ‖g‖)        (1)

    ‖·‖ is the norm of a whole leaf. It is computed in float32 or wider and does not overflow. Over a mesh it
    takes two all-reduces of one number for each sharded leaf. A leaf with a NaN or an infinity passes
    unchanged.

    Args:
      max_norm: above 0, a number, an array or a tracer.
      shardings: the shardings of the leaves, needed inside `jax.shard_map`, as in `muon`.

    Raises:
      ValueError: `max_norm` not above 0, when it is a concrete number; inside `compress_state`, which may
        only be put around other transforms of the chain.

    References:
      Pascanu, Mikolov & Bengio 2013, arXiv:1211.5063, algorithm 1 (of all leaves).
    """
    check_numbers("clip_norm", max_norm=max_norm)
    return _clipped(called("clip_norm"), max_norm, shardings, lambda over, squares: over.sums(squares)[0])


def clip_rms(max_rms: Numeric = 1.0, shardings: Rules | None = None) -> optax.GradientTransformationExtraArgs:
    """Scale the update of each leaf so that its root mean square is at most `max_rms`.

        u = g min(1, max_rms / rms(g))        (1)

    After the division of AdamW this is StableAdamW. It limits the updates when gradients grow faster than
    their second moment:

        chain(divide(chain(ema(b1), debias(b1)), by=...), clip_rms(), add_decayed_weights(λ), ...)

    rms(·) is taken over a whole leaf, as the norm of `clip_norm` is.

    Args:
      max_rms: above 0, a number, an array or a tracer.
      shardings: the shardings of the leaves, needed inside `jax.shard_map`, as in `muon`.

    Raises:
      ValueError: as `clip_norm`.

    Equals:
      optax.clip_by_block_rms(max_rms)
    References:
      Shazeer & Stern 2018, "Adafactor", arXiv:1804.04235, algorithm 4; Wortsman et al. 2023, "Stable and
      low-precision training for large-scale vision-language models", arXiv:2304.13013, algorithm 2.
    """
    check_numbers("clip_rms", max_rms=max_rms)
    return _clipped(called("clip_rms"), max_rms, shardings, Reduction.mean)


def _clipped(who: str, bound: Numeric, shardings: Rules | None, of_squares: Callable[..., Any]) -> Any:
    """(1), where the size of an array is the root of a reduction of the squares."""
    match = match_shardings(who, shardings)

    def update(g, state, leaf, now):
        over = reduction(who, match, leaf, None)
        largest = over.maximum(jax.lax.stop_gradient(jnp.abs(g)))
        scale = jnp.where(largest > 0, largest, 1)
        x = g / scale.astype(g.dtype)  # whose squares are numbers
        squares = of_squares(over, (x * x.conj()).real)
        size = jnp.sqrt(jnp.where(squares > 0, squares, 1))
        limit = as_scalar(bound, size)
        long = (size > limit / scale) & jnp.isfinite(largest)
        return jnp.where(long, (limit / size).astype(g.dtype) * x, g), state  # (1)

    def begin(leaves):
        warn_unused(who, "shardings", shardings, leaves.paths)
        return optax.EmptyState()

    return transform(who, Rule(optax.EmptyState(), update, begin=begin))
