"""What a transform remembers of past gradients: averages, a slow average, sums, the last gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimorph._core.checks import check_dtypes, check_flags, check_numbers, check_schedule
from optimorph._core.numbers import (
    as_kind_of,
    as_scalar,
    as_schedule,
    as_stored,
    common,
    copied,
    full_like,
    increment,
    is_schedule,
)
from optimorph._core.roles import AVERAGE, SLOW, TOTAL, VELOCITY, Role, holds, roles_of, scalar
from optimorph._core.rule import Rule, transform
from optimorph._core.types import DTypeLike, Numeric, PyTree, ScalarOrSchedule


class EmaState(NamedTuple):
    """The running average, with the shapes and shardings of the parameters."""

    average: PyTree
    roles = holds(average=AVERAGE)


class SlowEmaState(NamedTuple):
    """The slow average, with the shapes and shardings of the parameters, and the number of updates."""

    slow_average: PyTree
    slow_count: Any
    roles = holds(
        slow_average=Role("slow average", SLOW, tree=True), slow_count=scalar("count of a slow average")
    )


class MomentumState(NamedTuple):
    """The velocity, with the shapes and shardings of the parameters."""

    velocity: PyTree
    roles = holds(velocity=VELOCITY)


class AccumulateState(NamedTuple):
    """The running sum, with the shapes and shardings of the parameters."""

    total: PyTree
    roles = holds(total=TOTAL)


class ExtrapolateState(NamedTuple):
    """The previous gradient, with the shapes and shardings of the parameters."""

    previous: PyTree
    roles = holds(previous=Role("previous gradient", tree=True))


def ema(
    decay: Numeric,
    *,
    nesterov: bool = False,
    lookahead: Numeric | None = None,
    initial: Numeric = 0.0,
    dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replace every update by its exponential moving average.

        m ← (1 - β) g + β m        (1)
        u = m                      (2)
        u = (1 - β) g + β m        (3)  with nesterov: one step ahead
        u = (1 - α) g + α m        (4)  with lookahead: as in Lion, with the m before (1)

    An average that starts at zero is too small by the factor 1 - β^t. `debias` divides by this factor.

    Args:
      decay: β in [0, 1), a number, an array or a tracer.
      nesterov: return (3) instead of (2).
      lookahead: α in [0, 1): return (4) instead of (2).
      initial: m before the first step, at least 0.
      dtype: the dtype of the stored average. The default is float32, or the parameter's dtype if that is
        wider. float16 has no numbers above 65504.

    Raises:
      ValueError: β or α outside [0, 1) or `initial` negative, when they are concrete numbers; `nesterov`
        together with `lookahead`.

    Equals:
      optax.ema(decay, debias=False)
    References:
      Kingma & Ba 2015, arXiv:1412.6980, algorithm 1; the form (3): Dozat 2016, "Incorporating
      Nesterov momentum into Adam", section 3.
    """
    check_numbers("ema", decay=decay, initial=initial)
    if lookahead is not None:
        check_numbers("ema", lookahead=lookahead)
    check_dtypes("ema", dtype=dtype)
    check_flags("ema", nesterov=nesterov)
    if nesterov and lookahead is not None:
        raise ValueError("ema: nesterov and lookahead exclude each other. Type one of them.")

    def update(g, state, leaf, now):
        x, old = common(g, state.average)
        m = _lerp(x, old, decay)  # (1)
        u = _lerp(x, m, decay) if nesterov else m if lookahead is None else _lerp(x, old, lookahead)  # (2-4)
        return as_kind_of(u, g), EmaState(m if dtype is None else as_stored(m, dtype))

    def init(leaf):
        return EmaState(full_like(leaf.weight, initial, dtype))

    return transform("ema", Rule(roles_of(EmaState), update, init))


def slow_ema(decay: ScalarOrSchedule, alpha: ScalarOrSchedule = 1.0) -> optax.GradientTransformationExtraArgs:
    """Replace every update by a multiple of a slow moving average. Multiple and decay may be schedules.

        m ← (1 - β(t)) g + β(t) m        (1)
        u = α(t) m                       (2)

    t is the number of updates before this one. The average is stored in float32 or wider, and
    `compress_state` does not compress it by default: with β = 0.9999 a step changes it by less than the
    spacing of numbers in bfloat16 or 8 bits, and the noise of stochastic rounding would add up over 1 / (1 -
    β) steps.

    Args:
      decay: β in [0, 1), a number, an array, a tracer or a schedule, such as `schedules.decay_warmup`.
      alpha: α at least 0, a number, an array, a tracer or a schedule, such as `schedules.linear_warmup`.

    Raises:
      ValueError: β or α outside its range, when it is a concrete number.

    References:
      Pagliardini et al. 2024, "The AdEMAMix optimizer: better, faster, older", arXiv:2409.03137, section 3.
    """
    for name, value in {"decay": decay, "alpha": alpha}.items():
        if is_schedule(value):
            check_schedule("slow_ema", name, value)
        else:
            check_numbers("slow_ema", **{name: value})
    decay_at, alpha_at = as_schedule(decay), as_schedule(alpha)

    def begin(leaves):
        return SlowEmaState(None, jnp.zeros([], jnp.int32))

    def advance(state, leaves):
        t = state.slow_count
        return (decay_at(t), alpha_at(t)), SlowEmaState(None, increment(t))

    def update(g, state, leaf, now):
        beta, factor = now
        x, m = common(g, state.slow_average)
        m = _lerp(x, m, beta)  # (1)
        return as_kind_of(as_scalar(factor, m) * m, g), SlowEmaState(m, None)  # (2)

    def init(leaf):
        return SlowEmaState(full_like(leaf.weight), None)

    return transform("slow_ema", Rule(roles_of(SlowEmaState), update, init, begin, advance))


def momentum(
    decay: Numeric, *, nesterov: bool = False, dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Replace every update by a decaying sum of all updates so far.

        v ← g + β v        (1)
        u = v              (2)
        u = g + β v        (3)  nesterov: one step ahead

    Args:
      decay: β in [0, 1), a number, an array or a tracer.
      nesterov: return (3) instead of (2).
      dtype: the dtype of the stored velocity. The default is float32, or the parameter's dtype if that is
        wider. float16 has no numbers above 65504.

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
    check_flags("momentum", nesterov=nesterov)

    def add(g, v):
        return g + as_scalar(decay, v) * v

    def update(g, state, leaf, now):
        x, v = common(g, state.velocity)
        v = add(x, v)  # (1)
        u = add(x, v) if nesterov else v  # (3), (2)
        return as_kind_of(u, g), MomentumState(v if dtype is None else as_stored(v, dtype))

    def init(leaf):
        return MomentumState(full_like(leaf.weight, 0.0, dtype))

    return transform("momentum", Rule(roles_of(MomentumState), update, init))


def accumulate(
    initial: Numeric = 0.0, *, dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Replace every update by the sum of all updates so far.

        s ← s + g        (1)
        u = s            (2)

    Args:
      initial: s before the first step, at least 0, a number, an array or a tracer.
      dtype: the dtype of the stored sum. The default is float32, or the parameter's dtype if that is wider.
        float16 has no numbers above 65504.

    Raises:
      ValueError: `initial` negative, when it is a concrete number.

    References:
      Duchi, Hazan & Singer 2011, "Adaptive subgradient methods", algorithm 1 (diagonal).
    """
    check_numbers("accumulate", initial=initial)
    check_dtypes("accumulate", dtype=dtype)

    def update(g, state, leaf, now):
        x, s = common(g, state.total)
        s = x + s  # (1)
        return as_kind_of(s, g), AccumulateState(s if dtype is None else as_stored(s, dtype))  # (2)

    def init(leaf):
        return AccumulateState(full_like(leaf.weight, initial, dtype))

    return transform("accumulate", Rule(roles_of(AccumulateState), update, init))


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
        return as_kind_of(u, g), ExtrapolateState(copied(x) if dtype is None else as_stored(x, dtype))

    def init(leaf):
        return ExtrapolateState(full_like(leaf.weight, 0.0, dtype))

    return transform("extrapolate", Rule(roles_of(ExtrapolateState), update, init))


def _lerp(g: jax.Array, m: jax.Array, decay: Numeric) -> jax.Array:
    b = as_scalar(decay, m)
    return (1 - b) * g + b * m
