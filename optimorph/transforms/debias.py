"""The correction for an average that started at zero."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimorph.core.checks import check_numbers
from optimorph.core.count import increment
from optimorph.core.dtypes import cast_like, wide
from optimorph.core.tree import map_updates, number
from optimorph.core.types import Numeric


class DebiasState(NamedTuple):
    """How many updates there have been."""

    count: jax.Array


def debias(decay: Numeric, *, ahead: int = 0) -> optax.GradientTransformation:
    """Divide every update by the weight that an average from zero has gathered so far.

        t ← t + 1                    (1)
        u = g / (1 - β^(t + a))      (2)

    Args:
      decay: β in [0, 1) of the average, a number, an array or a tracer.
      ahead: a, the steps by which the average looks ahead (Nadam's first term: 1).

    Raises:
      ValueError: β outside [0, 1), when it is a concrete number.

    Equals:
      optax.tree.bias_correction(updates, decay, t)
    References:
      Kingma & Ba 2015, arXiv:1412.6980, section 3; `ahead`: Dozat 2016, "Incorporating Nesterov
      momentum into Adam", algorithm 2.
    """
    check_numbers("debias", decay=decay)

    def init(params):
        return DebiasState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        count = increment(state.count)  # (1)

        @functools.cache
        def gathered(dtype):
            t = (count + ahead).astype(dtype)
            return 1 - jnp.power(number(decay, t), t)

        def divide(g):
            x = wide(g)
            return cast_like(x / number(gathered(jnp.finfo(x.dtype).dtype), x), g)  # (2)

        return map_updates("debias", divide, updates), DebiasState(count)

    return optax.GradientTransformation(init, update)
