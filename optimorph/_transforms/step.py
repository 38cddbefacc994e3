"""The step: how weights decay, and the learning rate."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._core.checks import check_flags, check_numbers, check_params, is_one_of
from optimorph._core.numbers import as_float32, as_scalar, as_schedule, increment, is_trainable, upcast
from optimorph._core.roles import holds, roles_of, scalar
from optimorph._core.rule import Rule, called, pointwise, rule_of, transform
from optimorph._core.shown import shown
from optimorph._core.types import Mask, ScalarOrSchedule
from optimorph._routing.rules import check_mask, masked_leaves

FORMS = ("coupled", "independent", "cautious", "corrected")


class DecayState(NamedTuple):
    """The number of updates and the last weight decay. Setting the latter has no effect."""

    decay_count: jax.Array
    last_weight_decay: jax.Array
    roles = holds(
        decay_count=scalar("count of a decay schedule"), last_weight_decay=scalar("", "weight_decay")
    )


class CorrectedDecayState(NamedTuple):
    """`DecayState`, and the highest learning rate so far."""

    decay: DecayState
    highest_learning_rate: jax.Array
    roles = holds(highest_learning_rate=scalar("highest learning rate so far"))


class LearningRateState(NamedTuple):
    """The number of updates and the last learning rate. Setting the latter has no effect."""

    count: jax.Array
    last_learning_rate: jax.Array
    roles = holds(
        count=scalar("count of a learning rate schedule"), last_learning_rate=scalar("", "learning_rate")
    )


def add_decayed_weights(
    weight_decay: ScalarOrSchedule = 0.0, mask: Mask | None = None, *, cautious: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Add a multiple of the weights to their updates.

        u = g + λ w                  (1)
        u = g + λ w [g w ≥ 0]        (2)  with cautious: only where the step already shrinks the weight

    What this does depends on the place in the chain. Before the division of Adam, λ w is the gradient of
    (λ/2)‖w‖². This is L2 regularisation, and the division rescales it for each weight. After the division it
    is decoupled decay, which shrinks every weight by the same fraction:

        l2_adam = chain(add_decayed_weights(λ), scale_by_adam, scale_by_learning_rate(η))
        adamw   = chain(scale_by_adam, add_decayed_weights(λ), scale_by_learning_rate(η))

        scale_by_adam = divide(chain(ema(b1), debias(b1)), by=chain(square(), ema(b2), debias(b2), root(ε)))

    Args:
      weight_decay: λ, at least 0, a number, an array, a tracer or a schedule. With the constant 0 `update`
        needs no params. The last value is in the state, in float32: `probes.read` shows it.
      mask: which leaves decay: what `optax.masked` takes, or rules such as `{"*norm*": False, "*": True}`. By
        default all leaves decay.
      cautious: use (2) instead of (1). For complex numbers the condition is Re(g w̄) ≥ 0.

    Raises:
      ValueError: λ negative, when it is a concrete number; at `update`, params missing.

    Equals:
      optax.add_decayed_weights(weight_decay, mask)
    References:
      Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2 (both places); (2): Chen et al. 2025,
      "Cautious weight decay", arXiv:2510.12402.
    """
    who = called("add_decayed_weights")
    check_numbers(who, weight_decay=weight_decay)
    check_flags(who, cautious=cautious)
    decay_at = as_schedule(weight_decay)
    never = isinstance(weight_decay, int | float | np.number) and weight_decay == 0

    def begin(leaves):
        count = jnp.zeros([], jnp.int32)
        check_mask(who, mask, leaves)
        return DecayState(count, as_float32(decay_at(count)))

    def advance(state, leaves):
        decay = decay_at(state.decay_count)
        chosen = None if mask is None or never else masked_leaves(who, mask, leaves)
        return (decay, chosen), DecayState(increment(state.decay_count), as_float32(decay))

    def update(g, state, leaf, now):
        decay, chosen = now
        if never or (chosen is not None and not chosen[leaf.index]):
            return g, state
        if leaf.weight is None:
            check_params(who, None, "weight decay adds a multiple of them")
        w = upcast(leaf.weight).astype(g.dtype)
        term = as_scalar(decay, g) * w
        if cautious:
            term = jnp.where((jnp.sign(g) * jnp.sign(w).conj()).real >= 0, term, 0)  # (2)
        return g + term, state  # (1)

    return transform(who, Rule(roles_of(DecayState), update, begin=begin, advance=advance))


def scale_by_learning_rate(learning_rate: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Turn a direction of ascent into a step of descent.

        u = -η g        (1)

    Args:
      learning_rate: η, at least 0, a number, an array, a tracer, or a schedule, which is called with the
        number of updates before this one. The last value is in the state, in float32: `probes.read` shows it,
        but setting it there has no effect. `inject_hyperparams` makes a learning rate that can be set.

    Raises:
      ValueError: η negative, when it is a concrete number.

    Equals:
      optax.scale_by_learning_rate(learning_rate)
    References:
      Cauchy 1847, "Méthode générale pour la résolution des systèmes d'équations simultanées".
    """
    who = called("scale_by_learning_rate")
    check_numbers(who, learning_rate=learning_rate)
    rate_at = as_schedule(learning_rate)

    def begin(leaves):
        count = jnp.zeros([], jnp.int32)
        return LearningRateState(count, as_float32(rate_at(count)))

    def advance(state, leaves):
        rate = rate_at(state.count)
        return rate, LearningRateState(increment(state.count), as_float32(rate))

    def update(g, state, leaf, rate):
        return -as_scalar(rate, g) * g, state  # (1)

    return transform(who, Rule(roles_of(LearningRateState), update, begin=begin, advance=advance))


def _add_corrected_decay(
    learning_rate: ScalarOrSchedule, weight_decay: ScalarOrSchedule, mask: Mask | None
) -> optax.GradientTransformationExtraArgs:
    """Add λ η_t / max η times the weights: of the learning rates so far, in the dtype of the widest leaf."""
    plain: Any = rule_of(add_decayed_weights(weight_decay, mask))
    rate_at = as_schedule(learning_rate)

    def begin(leaves):
        dtypes = [jnp.finfo(jnp.result_type(x)).dtype for x in leaves.values if is_trainable(x)]
        highest = jnp.zeros([], functools.reduce(np.promote_types, dtypes, np.dtype(np.float32)))
        return CorrectedDecayState(plain.begin(leaves), highest)

    def advance(state, leaves):
        (decay, chosen), after = plain.advance(state.decay, leaves)
        rate = jnp.asarray(rate_at(state.decay.decay_count)).astype(state.highest_learning_rate.dtype)
        highest = jnp.maximum(state.highest_learning_rate, rate)
        decay = as_scalar(decay, rate) * jnp.where(highest > 0, rate / jnp.where(highest > 0, highest, 1), 1)
        after = after._replace(last_weight_decay=as_float32(decay))
        return (decay, chosen), CorrectedDecayState(after, highest)

    def update(g, state, leaf, now):
        return plain.update(g, state.decay, leaf, now)[0], state

    state = CorrectedDecayState(roles_of(DecayState), **CorrectedDecayState.roles)
    return transform("add_decayed_weights", Rule(state, update, begin=begin, advance=advance))


def decay_and_step(
    who: str, learning_rate: ScalarOrSchedule, weight_decay: ScalarOrSchedule, mask: Mask | None, form: str
) -> tuple[optax.GradientTransformationExtraArgs, ...]:
    """Decoupled weight decay in one of its forms, and the learning rate.

        u = -η (g + λ w)                  (1)  "coupled", as in PyTorch and optax
        u = -η g - λ w                    (2)  "independent" of the learning rate
        u = -η (g + λ w [g w ≥ 0])        (3)  "cautious": where the step itself shrinks the weight
        u = -η (g + λ η / max η w)        (4)  "corrected": the maximum is of the rates so far

    References:
      (1), (2) Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, where λ is multiplied by the schedule
      but not by the learning rate; (3) Chen et al. 2025, "Cautious weight decay", arXiv:2510.12402;
      (4) Defazio 2025, arXiv:2506.02285, AdamC.
    """
    if not is_one_of(form, FORMS):
        raise ValueError(
            f"{who}: weight_decay_form must be one of {', '.join(map(repr, FORMS))}, but is {shown(form)}. "
            "Type weight_decay_form='coupled'."
        )
    step = scale_by_learning_rate(learning_rate)
    if form == "corrected":
        return _add_corrected_decay(learning_rate, weight_decay, mask), step  # (4)
    decay = add_decayed_weights(weight_decay, mask, cautious=form == "cautious")  # (3)
    if form == "independent":
        negative = transform("scale", pointwise(lambda g: -g))
        return step, negative, decay, negative  # (2)
    return decay, step  # (1)
