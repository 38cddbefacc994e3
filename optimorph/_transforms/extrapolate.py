"""The gradient and a multiple of what it changed by."""

from typing import NamedTuple

import optax

from optimorph._core.checks import check_dtypes, check_numbers
from optimorph._core.numbers import as_kind_of, as_scalar, common, full_like, stored_dtype
from optimorph._core.roles import Role, holds, roles_of
from optimorph._core.rule import Rule, transform
from optimorph._core.types import DTypeLike, Numeric, PyTree


class ExtrapolateState(NamedTuple):
    """The previous gradient, with the shapes and shardings of the parameters."""

    previous: PyTree
    roles = holds(previous=Role("previous gradient", tree=True))


def extrapolate(
    gamma: Numeric, decay: Numeric, *, dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Add to every update a multiple of its difference from the previous update.

        u = g + γ β / (1 - β) (g - p),  p ← g        (1)

    p is the previous update; before the first one it is 0. In front of the average `ema(β)`, γ = 1
    compensates the delay of the average, and a small γ reduces its variance. With β = 1/2 and γ = 1 the
    result is the optimistic gradient 2 g - p.

    Args:
      gamma: γ at least 0, a number, an array or a tracer.
      decay: β in [0, 1), a number, an array or a tracer.
      dtype: the dtype of the stored gradient. The default is float32, or the parameter's dtype if that is
        wider.

    Raises:
      ValueError: γ or β outside its range, when it is a concrete number.

    References:
      Yuan et al. 2024, "MARS: unleashing the power of variance reduction for training large models",
      arXiv:2411.10438, equation 4 and section 3.3 (of successive batches).
    """
    check_numbers("extrapolate", gamma=gamma, decay=decay)
    check_dtypes("extrapolate", dtype=dtype)

    def update(g, state, leaf, now):
        x, before = common(g, state.previous)
        beta = as_scalar(decay, x)
        u = x + as_scalar(gamma, x) * beta / (1 - beta) * (x - before)  # (1)
        return as_kind_of(u, g), ExtrapolateState(
            x if dtype is None else x.astype(stored_dtype(dtype, x.dtype))
        )

    def init(leaf):
        return ExtrapolateState(full_like(leaf.weight, 0.0, dtype))

    return transform("extrapolate", Rule(roles_of(ExtrapolateState), update, init))
