"""Weight decay as one more term of the update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph.core.checks import check_numbers, check_params
from optimorph.core.count import increment
from optimorph.core.tree import cast_like, map_updates, number, wide
from optimorph.core.types import Mask, ScalarOrSchedule
from optimorph.routing.rules import as_mask


class DecayState(NamedTuple):
    """How many updates a decay schedule has seen."""

    count: jax.Array


def add_decayed_weights(
    weight_decay: ScalarOrSchedule = 0.0, mask: Mask | None = None
) -> optax.GradientTransformation:
    """Add a multiple of the weights to their updates.

        u = g + λ w        (1)

    What it means depends on where it stands. Before the quotient it is the gradient of (λ/2)‖w‖², L2
    regularisation, and the quotient rescales it weight by weight; after the quotient it is decoupled decay,
    the same fraction of every weight:

        l2_adam = chain(add_decayed_weights(λ), scale_by_adam, scale_by_learning_rate(η))
        adamw   = chain(scale_by_adam, add_decayed_weights(λ), scale_by_learning_rate(η))

        scale_by_adam = divide(chain(ema(b1), debias(b1)), by=chain(square(), ema(b2), debias(b2), root(ε)))

    Args:
      weight_decay: λ, at least 0, a number, an array, a tracer or a schedule. The constant 0 asks for no
        params.
      mask: which leaves decay, as `optax.masked` takes it, or rules, `{"*norm*": False, "*": True}`; all of
        them without one.

    Raises:
      ValueError: λ negative, when it is a concrete number; at `update`, params missing.

    Equals:
      optax.add_decayed_weights(weight_decay, mask)
    References:
      Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2 (both places).
    """
    who = "add_decayed_weights"
    check_numbers(who, weight_decay=weight_decay)
    scheduled = callable(weight_decay)

    def init(params):
        return DecayState(jnp.zeros([], jnp.int32)) if scheduled else optax.EmptyState()

    def update(updates, state, params=None):
        if isinstance(weight_decay, int | float | np.number) and weight_decay == 0:
            return updates, state
        check_params(who, params, "weight decay adds a multiple of them")
        rate = weight_decay(state.count) if callable(weight_decay) else weight_decay

        def decayed(g, w):
            x = wide(g)
            return cast_like(x + number(rate, x) * wide(w).astype(x.dtype), g)  # (1)

        if scheduled:
            state = DecayState(increment(state.count))
        return map_updates(who, decayed, updates, params), state

    transform = optax.GradientTransformation(init, update)
    return transform if mask is None else _masked(transform, as_mask(mask))


def _masked(transform: optax.GradientTransformation, mask: Mask) -> optax.GradientTransformation:
    """`optax.masked` with the transform's own state, so that a checkpoint does not depend on the mask."""
    masked: Any = optax.masked(transform, mask)

    def init(params):
        return masked.init(params).inner_state

    def update(updates, state, params=None):
        updates, state = masked.update(updates, optax.MaskedState(state), params)
        return updates, state.inner_state

    return optax.GradientTransformation(init, update)
