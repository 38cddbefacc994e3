"""The sum over all steps."""

from typing import NamedTuple

import optax

from optimorph.core.checks import check_dtypes, check_numbers
from optimorph.core.dtypes import cast_like, wide
from optimorph.core.tree import full, map_state, map_updates
from optimorph.core.types import DTypeLike, Numeric, PyTree


class AccumulateState(NamedTuple):
    """The running sum, shaped and sharded like the parameters."""

    total: PyTree


def accumulate(initial: Numeric = 0.0, *, dtype: DTypeLike | None = None) -> optax.GradientTransformation:
    """Replace every update by the sum of all updates so far.

        s ← s + g        (1)
        u = s            (2)

    Args:
      initial: s before the first step, at least 0, a number, an array or a tracer.
      dtype: of the stored sum; float32 or the parameter's own dtype, whichever is wider. float16
        has no numbers above 65504.

    Raises:
      ValueError: `initial` negative, when it is a concrete number.

    References:
      Duchi, Hazan & Singer 2011, "Adaptive subgradient methods", algorithm 1 (diagonal).
    """
    check_numbers("accumulate", initial=initial)
    check_dtypes("accumulate", dtype=dtype)

    def add(g, s):
        s = wide(s)
        return s + wide(g).astype(s.dtype)

    def init(params):
        return AccumulateState(full(params, initial, dtype))

    def update(updates, state, params=None):
        total = map_state("accumulate", add, updates, state.total)  # (1)
        out = map_updates("accumulate", lambda g, s: cast_like(s, g), updates, total)  # (2)
        return out, AccumulateState(map_updates("accumulate", cast_like, total, state.total))

    return optax.GradientTransformation(init, update)
