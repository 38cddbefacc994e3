"""Which arrays of an optimizer's state are moments, and of which kind."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimorph.core.types import PyTree
from optimorph.storage.compressed import CompressedState
from optimorph.transforms.add import AddState
from optimorph.transforms.divide import DivideState
from optimorph.transforms.ema import EmaState

FIRST, SECOND = "first", "second"

Fields = Mapping[str, Mapping[str, str]]
"""Name of a state's type → field → kind of the moment that it holds."""

FIELDS: Fields = {
    "MomentumState": {"velocity": FIRST},
    "EmaState": {"average": FIRST, "ema": FIRST},
    "AccumulateState": {"total": SECOND},
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
"""The states of this library and of optax that hold first moments and velocities, or second moments; an
average that a quotient divides by is a second one. Of moments whose difference is taken, as that of a
centered RMSprop, there is nothing here: what little is left of them would be noise. Nor of what is in codes
already."""


SUMS = ("MultiStepsState.acc_grads",)
"""What is as large as moments, and none."""


def map_moments(
    f: Callable[[str, PyTree], PyTree], state: PyTree, fields: Fields = FIELDS, average: str = FIRST
) -> PyTree:
    """The state with `f(kind, moment)` in place of every moment, each a tree like the parameters.

    Args:
      f: of "first" or "second", or another kind that `fields` has, and the tree.
      state: of this library or of optax.
      fields: which fields of which states are moments.
      average: what an `EmaState` holds here.
    """

    def visit(node: Any) -> Any:
        if isinstance(node, DivideState):
            signal, by = map_moments(f, node.signal, fields), map_moments(f, node.by, fields, SECOND)
            return DivideState(signal, by)
        own = isinstance(node, EmaState)
        known = {k: average if own else kind for k, kind in _known(node, fields).items()}
        return node._replace(**{k: f(kind, getattr(node, k)) for k, kind in known.items()}) if known else node

    def ends(node: Any) -> bool:
        return isinstance(node, DivideState | AddState | CompressedState) or bool(_known(node, fields))

    return jax.tree.map(visit, state, is_leaf=ends)


def moments_of(state: PyTree, fields: Fields = FIELDS) -> list[tuple[str, PyTree]]:
    """The moments of a state in order, each with its kind."""
    found = []
    map_moments(lambda kind, moment: found.append((kind, moment)), state, fields)
    return found


def with_moments(state: PyTree, moments: Iterable[PyTree], fields: Fields = FIELDS) -> PyTree:
    """The state with other moments, in order."""
    left = iter(moments)
    return map_moments(lambda kind, _: next(left), state, fields)


def unknown(state: PyTree, size: int, fields: Fields = FIELDS) -> list[str]:
    """`MyState.average`: what else holds real arrays of two axes and at least so many numbers."""
    found: dict[str, None] = {}

    def visit(name: str, tree: Any) -> None:
        for node in jax.tree.leaves(tree, is_leaf=_is_state):
            if _is_state(node):
                for field in node._fields:
                    visit(f"{type(node).__name__}.{field}", getattr(node, field))
            elif np.ndim(node) > 1 and node.size >= size and jnp.issubdtype(node.dtype, jnp.floating):
                found[name] = None

    visit("", map_moments(lambda kind, moment: None, state, fields))
    return [name for name in found if name not in SUMS]


def _is_state(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _known(node: Any, fields: Fields) -> dict[str, str]:
    """Field → kind, of those that a state has."""
    known = fields.get(type(node).__name__, {})
    return {field: kind for field, kind in known.items() if field in getattr(node, "_fields", ())}
