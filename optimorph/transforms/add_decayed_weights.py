"""Weight decay as one more term of the update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph.core.checks import check_numbers, check_params
from optimorph.core.count import as_schedule, increment, reading
from optimorph.core.dtypes import cast_like, wide
from optimorph.core.tree import map_updates, number
from optimorph.core.types import Mask, ScalarOrSchedule
from optimorph.routing.rules import as_mask


class DecayState(NamedTuple):
    """How many updates there have been, and the last one's decay (before it, the first one's), to be read."""

    count: jax.Array
    weight_decay: jax.Array


def add_decayed_weights(
    weight_decay: ScalarOrSchedule = 0.0, mask: Mask | None = None, *, cautious: bool = False
) -> optax.GradientTransformation:
    """Add a multiple of the weights to their updates.

        u = g + λ w                  (1)
        u = g + λ w [g w ≥ 0]        (2)  cautious: where the descent itself shrinks the weight

    What it means depends on where it stands. Before the quotient it is the gradient of (λ/2)‖w‖², L2
    regularisation, and the quotient rescales it weight by weight; after the quotient it is decoupled decay,
    the same fraction of every weight:

        l2_adam = chain(add_decayed_weights(λ), scale_by_adam, scale_by_learning_rate(η))
        adamw   = chain(scale_by_adam, add_decayed_weights(λ), scale_by_learning_rate(η))

        scale_by_adam = divide(chain(ema(b1), debias(b1)), by=chain(square(), ema(b2), debias(b2), root(ε)))

    Args:
      weight_decay: λ, at least 0, a number, an array, a tracer or a schedule. The constant 0 asks for no
        params. What it was is in the state, in float32: `probes.read` shows it.
      mask: which leaves decay, as `optax.masked` takes it, or rules, `{"*norm*": False, "*": True}`; all of
        them without one.
      cautious: add (2) instead of (1); of complex numbers, where Re(g w̄) ≥ 0.

    Raises:
      ValueError: λ negative, when it is a concrete number; at `update`, params missing.

    Equals:
      optax.add_decayed_weights(weight_decay, mask)
    References:
      Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2 (both places); (2): Chen et al. 2025,
      "Cautious weight decay", arXiv:2510.12402.
    """
    who = "add_decayed_weights"
    check_numbers(who, weight_decay=weight_decay)
    decay_at = as_schedule(weight_decay)

    def init(params):
        count = jnp.zeros([], jnp.int32)
        return DecayState(count, reading(decay_at(count)))

    def update(updates, state, params=None):
        decay = decay_at(state.count)
        state = DecayState(increment(state.count), reading(decay))
        if isinstance(weight_decay, int | float | np.number) and weight_decay == 0:
            return updates, state
        check_params(who, params, "weight decay adds a multiple of them")

        def decayed(g, w):
            x = wide(g)
            y = wide(w).astype(x.dtype)
            term = number(decay, x) * y
            if cautious:
                term = jnp.where((jnp.sign(x) * jnp.sign(y).conj()).real >= 0, term, 0)  # (2)
            return cast_like(x + term, g)  # (1)

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
