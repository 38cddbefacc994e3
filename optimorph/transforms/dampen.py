"""PyTorch's dampening."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimorph.core.checks import check_numbers
from optimorph.core.count import increment
from optimorph.core.dtypes import cast_like, wide
from optimorph.core.tree import map_updates, number
from optimorph.core.types import Numeric


class DampenState(NamedTuple):
    """How many updates there have been."""

    count: jax.Array


def dampen(dampening: Numeric) -> optax.GradientTransformation:
    """Shrink every update but the first.

        u = g               (1)  t = 1
        u = (1 - τ) g       (2)  t > 1

    Before `momentum` this is PyTorch's dampened momentum, whose velocity starts at the whole first gradient.

    Args:
      dampening: τ in [0, 1], a number, an array or a tracer.

    Raises:
      ValueError: τ outside [0, 1], when it is a concrete number.

    References:
      torch.optim.SGD, argument `dampening`.
    """
    check_numbers("dampen", dampening=dampening)

    def init(params):
        return DampenState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        def shrink(g):
            g = wide(g)
            return jnp.where(state.count == 0, g, (1 - number(dampening, g)) * g)  # (1), (2)

        out = map_updates("dampen", lambda g: cast_like(shrink(g), g), updates)
        return out, DampenState(increment(state.count))

    return optax.GradientTransformation(init, update)
