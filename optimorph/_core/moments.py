"""Which arrays of an optimizer's state are moments, and of which kind."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimorph._core.roles import AVERAGE, FIRST, SECOND, may_be_variance
from optimorph._core.types import PyTree

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

    Args:
      f: of "first", "second" or "slow", or another kind that `fields` has, and the tree.
      state: of this library or of optax.
      fields: which fields of further states are moments.
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
    """The state with other moments, in order."""
    left = iter(moments)
    return map_moments(lambda kind, _: next(left), state, fields)


def unknown(state: PyTree, size: int, fields: Fields | None = None) -> list[str]:
    """`MyState.average`: fields without a role whose real arrays have two axes and `size` numbers."""
    found: dict[str, None] = {}

    def visit(name: str, tree: Any) -> None:
        for node in jax.tree.leaves(tree, is_leaf=_is_state):
            if _is_state(node):
                for field in {*node._fields} - {*getattr(node, "roles", ())}:
                    visit(f"{type(node).__name__}.{field}", getattr(node, field))
            elif np.ndim(node) > 1 and node.size >= size and jnp.issubdtype(node.dtype, jnp.floating):
                found[name] = None

    visit("", map_moments(lambda kind, moment: None, state, fields))
    return [name for name in found if name not in SUMS]


def _is_state(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")
