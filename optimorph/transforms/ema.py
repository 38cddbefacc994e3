"""The exponential moving average."""

from typing import NamedTuple

import optax

from optimorph.core.checks import check_dtypes, check_numbers
from optimorph.core.dtypes import cast_like, wide
from optimorph.core.tree import full, map_state, map_updates, number
from optimorph.core.types import DTypeLike, Numeric, PyTree


class EmaState(NamedTuple):
    """The running average, shaped and sharded like the parameters."""

    average: PyTree


def ema(
    decay: Numeric, *, nesterov: bool = False, initial: Numeric = 0.0, dtype: DTypeLike | None = None
) -> optax.GradientTransformation:
    """Replace every update by its exponential moving average.

        m ← (1 - β) g + β m        (1)
        u = m                      (2)
        u = (1 - β) g + β m        (3)  nesterov: one step ahead

    An average that starts at zero is too small by the factor 1 - β^t: `debias` divides that out.

    Args:
      decay: β in [0, 1), a number, an array or a tracer.
      nesterov: return (3) instead of (2).
      initial: m before the first step, at least 0.
      dtype: of the stored average; float32 or the parameter's own dtype, whichever is wider. float16
        has no numbers above 65504.

    Raises:
      ValueError: β outside [0, 1) or `initial` negative, when they are concrete numbers.

    Equals:
      optax.ema(decay, debias=False)
    References:
      Kingma & Ba 2015, arXiv:1412.6980, algorithm 1; the form (3): Dozat 2016, "Incorporating
      Nesterov momentum into Adam", section 3.
    """
    check_numbers("ema", decay=decay, initial=initial)
    check_dtypes("ema", dtype=dtype)

    def lerp(g, m):
        m = wide(m)
        b = number(decay, m)
        return (1 - b) * wide(g).astype(m.dtype) + b * m

    def init(params):
        return EmaState(full(params, initial, dtype))

    def update(updates, state, params=None):
        average = map_state("ema", lerp, updates, state.average)  # (1)
        step = lerp if nesterov else lambda g, m: m  # (3), (2)
        out = map_updates("ema", lambda g, m: cast_like(step(g, m), g), updates, average)
        return out, EmaState(map_updates("ema", cast_like, average, state.average))

    return optax.GradientTransformation(init, update)
