"""Whether a function of arrays makes every number of those at the same place."""

from collections.abc import Iterator
from typing import Any

MOVES = {"cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum", "dot_general", "fft", "rev", "sort"}
"""Primitives that keep a shape, and mix places all the same."""

FILLS = {"broadcast_in_dim"}
"""Primitives that make an array of one number, the same everywhere."""


def not_elementwise(jaxpr: Any) -> str | None:
    """A primitive of a jaxpr that mixes the places of an array or asks where they are; None if there is none.

    Arrays all have one shape; scalars may go into them and not come out of them.
    """
    return next(_offenders(jaxpr), None)


def _offenders(jaxpr: Any) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        inner = [sub for value in eqn.params.values() for sub in _jaxprs(value)]
        if inner:
            for sub in inner:
                yield from _offenders(sub)
            continue
        arrays = {v.aval.shape for v in eqn.invars if _is_array(v)}
        made = {v.aval.shape for v in eqn.outvars}
        name = eqn.primitive.name
        if arrays:
            good = len(arrays) == 1 and made == arrays and name not in MOVES
        else:
            good = made == {()} or name in FILLS
        if not good:
            yield name


def _is_array(v: Any) -> bool:
    return v.aval.shape != ()


def _jaxprs(value: Any) -> Iterator[Any]:
    """The jaxprs that a primitive's parameter holds."""
    for each in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(each, "jaxpr", each)
        if hasattr(inner, "eqns"):
            yield inner
