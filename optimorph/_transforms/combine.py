"""Several transformations combined: a chain, and of the same gradient a quotient, a sum, a weighted mean."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimorph._core.checks import check_numbers
from optimorph._core.differences import checked_state, other_state
from optimorph._core.numbers import as_scalar, cast_like, upcast
from optimorph._core.roles import SECOND, holds, relabeled
from optimorph._core.rule import Rule, Transform, map_updates, rule_of, transform
from optimorph._core.types import Numeric
from optimorph._core.wrapped import wrapped


class DivideState(NamedTuple):
    """The state of the numerator (`signal`) and that of the denominator (`by`)."""

    signal: Any
    by: Any
    averages = holds(by=SECOND)


class AddState(NamedTuple):
    """The states of all terms, in the order of the terms."""

    terms: tuple[Any, ...]
    may_be_variance = True


class MixState(NamedTuple):
    """The states of both transformations."""

    first: Any
    second: Any


def chain(*transforms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Apply transformations one after another; the same as `optax.chain`, with the same state.

    Neighbouring transforms of this library that work leaf by leaf are merged into one function of one leaf.
    Between them the updates stay in float32 or wider, and `compress_state` can work through a leaf in slabs.

    Gradients must have the shapes of the parameters. For the gradients of single examples, which
    `optax.contrib.differentially_private_aggregate` takes, type `optax.chain(aggregate, tx)`.

    Args:
      transforms: transformations in the order in which they are applied.
    """
    txs = [wrapped("chain", tx) for tx in transforms]
    groups: list[list[Any]] = []
    for tx in txs:
        if groups and rule_of(tx) and rule_of(groups[-1][-1]):
            groups[-1].append(tx)
        else:
            groups.append([tx])
    merged = [_merged(group) for group in groups]
    if len(merged) == 1 and len(transforms) > 1:
        return merged[0]
    sizes = [len(group) for group in groups]

    def init(params):
        states = [tx.init(params) for tx in merged]
        return tuple(
            s for state, n in zip(states, sizes, strict=True) for s in (state if n > 1 else (state,))
        )

    def update(updates, state, params=None, **extra):
        if not isinstance(state, tuple) or len(state) != len(transforms):
            raise other_state("chain")
        after, rest = [], list(state)
        for tx, n in zip(merged, sizes, strict=True):
            own, rest = tuple(rest[:n]), rest[n:]
            updates, own = tx.update(updates, own if n > 1 else own[0], params, **extra)
            after += own if n > 1 else (own,)
        return updates, tuple(after)

    return Transform(init, update)


def divide(
    signal: optax.GradientTransformation, by: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Give the same gradient to two transformations and divide the output of one by that of the other.

        u = signal(g) / max(by(g), 64 √tiny)        (1)

    Here tiny is the smallest normal number of the dtype. A root below 64 √tiny comes from a mean square that
    underflowed. With this bound 0 / 0 is 0, and very small gradients do not give infinite updates, even if
    ε = 0.

    Both sides are computed in float32 or wider. Only the quotient is rounded to the gradient's dtype.

    Args:
      signal: the transformation that gives the numerator.
      by: the transformation that gives the denominator. Its updates should be real and not negative.
    """

    def quotient(s, d):
        least = 64 * math.sqrt(jnp.finfo(d.dtype).tiny)
        return s / jnp.maximum(d, least).astype(s.dtype)  # (1)

    return _combined("divide", quotient, (signal, by), DivideState._make)


def add(*terms: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Give the same gradient to several transformations and add their outputs.

        u = term₁(g) + term₂(g) + ...        (1)

    For example, a variance is `add(chain(square(), ema(b)), chain(ema(b), square(), optax.scale(-1)))`. The
    terms are computed in float32 or wider. Only their sum is rounded to the gradient's dtype. In a
    denominator `compress_state` does not compress the terms, because their sum may be a small difference,
    such as a variance.

    Args:
      terms: at least one transformation.

    Raises:
      ValueError: no terms.
    """
    if not terms:
        raise ValueError("add: at least one transformation is needed. Type add(first, second).")

    def total(*values):
        return functools.reduce(operator.add, values)  # (1)

    return _combined(
        "add", total, terms, lambda states: AddState(tuple(states)), operator.attrgetter("terms")
    )


def mix(
    decay: Numeric, first: optax.GradientTransformation, second: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Give the same gradient to two transformations and return a weighted mean of their outputs.

        u = β first(g) + (1 - β) second(g)        (1)

    Both outputs are computed in float32 or wider. Only their mean is rounded to the gradient's dtype.

    Args:
      decay: β in [0, 1), a number, an array or a tracer.
      first: the transformation with the weight β.
      second: the transformation with the weight 1 - β.

    Raises:
      ValueError: β outside [0, 1), when it is a concrete number.
    """
    check_numbers("mix", decay=decay)

    def mean(a, b):
        beta = as_scalar(decay, a)
        return beta * a + (1 - beta) * b  # (1)

    return _combined("mix", mean, (first, second), MixState._make)


def _combined(
    who: str,
    f: Callable[..., jax.Array],
    transforms: Sequence[optax.GradientTransformation],
    pack: Callable[[Sequence[Any]], Any],
    unpack: Callable[[Any], Sequence[Any]] = tuple,
) -> optax.GradientTransformationExtraArgs:
    """`f` of the updates of all transforms; a rule for one leaf if each of them is one."""
    txs = [wrapped(who, tx, wide=True) for tx in transforms]
    rules = [rule for tx in txs if (rule := rule_of(tx)) is not None]
    if len(rules) == len(txs):
        return transform(who, _combined_rule(f, rules, pack, unpack))

    def init(params):
        return pack([tx.init(params) for tx in txs])

    def update(updates, state, params=None, **extra):
        g = map_updates(who, upcast, updates)
        states = unpack(checked_state(who, state, type(pack([None] * len(txs)))))
        values, states = zip(
            *(tx.update(g, s, params, **extra) for tx, s in zip(txs, states, strict=True)), strict=True
        )
        out = map_updates(who, lambda g, *each: cast_like(f(*each), g), updates, *values)
        return out, pack(states)

    return optax.GradientTransformationExtraArgs(init, update)


def _combined_rule(
    f: Callable[..., jax.Array],
    rules: Sequence[Rule],
    pack: Callable[[Sequence[Any]], Any],
    unpack: Callable[[Any], Sequence[Any]],
) -> Rule:
    def update(g, state, leaf, now):
        values, after = [], []
        for rule, s, t in zip(rules, unpack(state), now, strict=True):
            u, s = rule.update(g, s, leaf, t)
            values.append(u)
            after.append(s)
        return f(*values), pack(after)

    return _of_rules(rules, update, pack, unpack)


def _merged(group: Sequence[Any]) -> Any:
    if len(group) == 1:
        return group[0]
    return transform("chain", _chained([tx.rule for tx in group]))


def _chained(rules: Sequence[Rule]) -> Rule:
    def update(g, states, leaf, now):
        after = []
        for rule, s, t in zip(rules, states, now, strict=True):
            g, s = rule.update(g, s, leaf, t)
            after.append(s)
        return g, tuple(after)

    return _of_rules(rules, update)


def _of_rules(
    rules: Sequence[Rule],
    update: Callable[..., tuple[jax.Array, Any]],
    pack: Callable[[Sequence[Any]], Any] = tuple,
    unpack: Callable[[Any], Sequence[Any]] = tuple,
) -> Rule:
    """A rule with the states of several; `pack` makes one state of theirs, and `unpack` takes it apart."""

    def advance(shared, leaves):
        told, after = [], []
        for rule, s in zip(rules, unpack(shared), strict=True):
            now, s = rule.advance(s, leaves)
            told.append(now)
            after.append(s)
        return told, pack(after)

    return Rule(
        relabeled(pack([rule.state for rule in rules])),
        update,
        init=lambda leaf: pack([rule.filled(rule.init(leaf)) for rule in rules]),
        begin=lambda leaves: pack([rule.filled(rule.begin(leaves)) for rule in rules]),
        advance=advance,
    )
