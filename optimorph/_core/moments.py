"""Which arrays of an optimizer's state are moments, and of which kind."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optimorph._core.roles import AVERAGE, FIRST, SECOND, SLOW, may_be_variance
from optimorph._core.shown import shown
from optimorph._core.types import PyTree
from optimorph._core.warn import warn

Fields = Mapping[str, Mapping[str, str]]
"""Name of a state's type → field → kind of the moment that it holds, "first" or "second"."""

OPTAX_FIELDS: Fields = {
    "EmaState": {"ema": FIRST},
    "ScaleByAdamState": {"mu": FIRST, "nu": SECOND},
    "ScaleByAmsgradState": {"mu": FIRST, "nu": SECOND, "nu_max": SECOND},
    "ScaleByBeliefState": {"mu": FIRST, "nu": SECOND},
    "ScaleByLionState": {"mu": FIRST},
    "ScaleByRmsState": {"nu": SECOND},
    "ScaleByRmsWithCountState": {"nu": SECOND},
    "ScaleByRssState": {"sum_of_squares": SECOND},
    "TraceState": {"trace": FIRST},
    "MuonState": {"mu": FIRST},
}
"""optax's states that hold first moments and velocities, or second moments. A moment whose difference from
another is taken, as in a centered RMSprop, is not here: quantization would leave noise of the difference. The
states of this library say themselves what they hold."""

SUMS = ("MultiStepsState.acc_grads",)
"""Trees as large as moments that are known to be none."""


def map_moments(f: Callable[[str, PyTree], PyTree], state: PyTree, fields: Fields | None = None) -> PyTree:
    """The state with `f(kind, moment)` in place of every moment, each a tree like the parameters.

    The kind is "first", "second" or "slow", or another one that `fields` has for states of other libraries.
    """
    known = OPTAX_FIELDS if fields is None else {**OPTAX_FIELDS, **fields}

    def kinds(node: Any, average: str) -> dict[str, str]:
        if roles := getattr(node, "roles", None):
            own = {field: average if role == AVERAGE else role.moment for field, role in roles.items()}
        else:
            own = known.get(type(node).__name__, {})
        return {field: own[field] for field in getattr(node, "_fields", ()) if own.get(field)}

    def walk(tree: Any, average: str) -> Any:
        def visit(node: Any) -> Any:
            if hasattr(node, "averages"):
                inside = {field: node.averages.get(field, average) for field in node._fields}
                return node._replace(
                    **{field: walk(getattr(node, field), kind) for field, kind in inside.items() if kind}
                )
            own = kinds(node, average)
            return node._replace(**{k: f(kind, getattr(node, k)) for k, kind in own.items()}) if own else node

        def stop(node: Any) -> bool:
            skipped = average == SECOND and may_be_variance(node)
            return skipped or hasattr(node, "averages") or bool(kinds(node, average))

        return jax.tree.map(visit, tree, is_leaf=stop)

    return walk(state, FIRST)


def moments_of(state: PyTree, fields: Fields | None = None) -> list[tuple[str, PyTree]]:
    """The moments of a state in order, each with its kind."""
    found = []
    map_moments(lambda kind, moment: found.append((kind, moment)), state, fields)
    return found


def with_moments(state: PyTree, moments: Iterable[PyTree], fields: Fields | None = None) -> PyTree:
    left = iter(moments)
    return map_moments(lambda kind, _: next(left), state, fields)


def nodes_with(state: PyTree, attribute: str) -> list[Any]:
    """The outermost nodes of a state that have an attribute."""

    def has(node: Any) -> bool:
        return hasattr(node, attribute)

    return [node for node in jax.tree.leaves(state, is_leaf=has) if has(node)]


def unknown(state: PyTree, size: int, fields: Fields | None = None) -> list[str]:
    """`MyState.average`: fields without a role whose real arrays have two axes and `size` numbers."""
    found: dict[str, None] = {}
    for node, field in _without_role(map_moments(lambda kind, moment: None, state, fields)):
        for x in jax.tree.leaves(getattr(node, field), is_leaf=lambda x: hasattr(x, "_fields")):
            if getattr(x, "ndim", 0) > 1 and x.size >= size and jnp.issubdtype(x.dtype, jnp.floating):
                found[f"{type(node).__name__}.{field}"] = None
    return [name for name in found if name not in SUMS]


def check_fields(who: str, fields: Any, rules: Any) -> None:
    """Refuse what does not say which fields of which states are moments, and of which kind.

    Only rules of codecs can be for another kind than those that this library has.
    """
    held = [*fields.values()] if isinstance(fields, Mapping) else []
    kinds = [kind for of_state in held if isinstance(of_state, Mapping) for kind in of_state.values()]
    known = all(kind in (FIRST, SECOND, SLOW) or (rules and isinstance(kind, str)) for kind in kinds)
    nested = isinstance(fields, Mapping) and all(isinstance(of_state, Mapping) for of_state in held)
    nested = nested and all(isinstance(name, str) for of_state in (fields, *held) for name in of_state)
    if fields is not None and not (nested and known):
        raise ValueError(
            f"{who}: fields must say which fields of a state are {FIRST!r}, {SECOND!r} or {SLOW!r} moments, "
            f"by the name of its type, but is {shown(fields)}. Type "
            "fields={'MyState': {'average': 'first'}}."
        )


def warn_unused_fields(who: str, state: PyTree, fields: Fields | None) -> None:
    """Warn of fields that no state has, or of which a state says itself what they hold."""
    there = {(type(node).__name__, field) for node, field in _without_role(state)}
    for pair in [(name, field) for name, held in (fields or {}).items() for field in held]:
        if pair not in there:
            known = ", ".join(sorted(map(".".join, there))) or "none"
            warn(
                f"{who}: no state has the field {'.'.join(pair)!r} of the argument fields, or the state "
                f"itself says what it holds. Fields that can be named: {known}.",
                stacklevel=3,
            )


def _without_role(tree: PyTree) -> Iterator[tuple[Any, str]]:
    """The states in a state, and those in them, each with every field that has no role."""
    for node in nodes_with(tree, "_fields"):
        yield from ((node, field) for field in node._fields if field not in getattr(node, "roles", {}))
        yield from _without_role(tuple(node))
