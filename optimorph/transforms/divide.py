"""The quotient of two sentences that hear the same gradient."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from optimorph.core.dtypes import cast_like, wide
from optimorph.core.tree import map_updates


class DivideState(NamedTuple):
    """The states of both sentences."""

    signal: Any
    by: Any


def divide(
    signal: optax.GradientTransformation, by: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Divide one transformation of the gradient by another of the same gradient.

        u = signal(g) / max(by(g), 64 √tiny)        (1)

    where tiny is the least number of which the dtype keeps all digits: a smaller root is that of a mean
    square that underflowed. So 0 / 0 is 0, and with ε = 0 the smallest gradients give no infinite updates.

    Both sides are computed in float32 or wider and only their quotient is rounded to the gradient's dtype:
    the square of a small float16 number would be zero.

    Args:
      signal: the numerator's transformation.
      by: the denominator's transformation; its updates should be real and not negative.
    """
    signal, by = optax.with_extra_args_support(signal), optax.with_extra_args_support(by)

    def quotient(s, d):
        least = 64 * math.sqrt(jnp.finfo(d.dtype).tiny)
        return s / jnp.maximum(d, least).astype(s.dtype)  # (1)

    def init(params):
        return DivideState(signal.init(params), by.init(params))

    def update(updates, state, params=None, **extra):
        g = map_updates("divide", wide, updates)
        s, signal_state = signal.update(g, state.signal, params, **extra)
        d, by_state = by.update(g, state.by, params, **extra)
        out = map_updates("divide", lambda g, s, d: cast_like(quotient(s, d), g), updates, s, d)
        return out, DivideState(signal_state, by_state)

    return optax.GradientTransformationExtraArgs(init, update)
