"""Polyak's heavy ball and Nesterov's look ahead."""

from typing import NamedTuple

import optax

from optimorph.core.checks import check_dtypes, check_numbers
from optimorph.core.dtypes import cast_like, wide
from optimorph.core.tree import full, map_state, map_updates, number
from optimorph.core.types import DTypeLike, Numeric, PyTree


class MomentumState(NamedTuple):
    """The velocity, shaped and sharded like the parameters."""

    velocity: PyTree


def momentum(
    decay: Numeric, *, nesterov: bool = False, dtype: DTypeLike | None = None
) -> optax.GradientTransformation:
    """Replace every update by a decaying sum of all updates so far.

        v ← g + β v        (1)
        u = v              (2)
        u = g + β v        (3)  nesterov: one step ahead

    Args:
      decay: β in [0, 1), a number, an array or a tracer.
      nesterov: return (3) instead of (2).
      dtype: of the stored velocity; float32 or the parameter's own dtype, whichever is wider. float16
        has no numbers above 65504.

    Raises:
      ValueError: β outside [0, 1), when it is a concrete number.

    Equals:
      optax.trace(decay, nesterov)
    References:
      Polyak 1964, "Some methods of speeding up the convergence of iteration methods", equation 9;
      Nesterov 1983; the form (3): Sutskever et al. 2013, "On the importance of initialization and
      momentum in deep learning", section 2.
    """
    check_numbers("momentum", decay=decay)
    check_dtypes("momentum", dtype=dtype)

    def add(g, v):
        v = wide(v)
        return wide(g).astype(v.dtype) + number(decay, v) * v

    def init(params):
        return MomentumState(full(params, dtype=dtype))

    def update(updates, state, params=None):
        velocity = map_state("momentum", add, updates, state.velocity)  # (1)
        step = add if nesterov else lambda g, v: v  # (3), (2)
        out = map_updates("momentum", lambda g, v: cast_like(step(g, v), g), updates, velocity)
        return out, MomentumState(map_updates("momentum", cast_like, velocity, state.velocity))

    return optax.GradientTransformation(init, update)
