"""A program for arrays as one for a part of them, if it makes every number of those at the same place."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from optimorph.core.types import Shape

ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt
ceil clamp clz complex conj convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2
expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not
optimization_barrier or population_count pow pvary real reduce_precision rem round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan tanh xor
"""
"""Primitives that make every number of those at the same place; of no others is it known."""

CALLS = {"checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit"}
"""Primitives that do what the program says that they hold."""

OUTSIDE = "an array that is neither gradient, nor parameter, nor moment"
OTHERS = "another leaf"

_ELEMENTWISE = frozenset(ELEMENTWISE.split())


class NotElementwise(Exception):
    """What a program has in it that mixes places, or asks where they are: "a 'reduce_sum'"."""


class _Value(NamedTuple):
    """Of a variable: an array, whether it is spread over the places of the part, and what made it."""

    x: Any
    spread: bool
    by: str


def on_part(closed: ClosedJaxpr, arrays: Iterable[jax.Array], whole: Shape, part: Shape) -> list[jax.Array]:
    """The results of a program for arrays of the shape `whole` on parts of them, of the shape `part`.

    Numbers may go into arrays, and not come out of them. What is computed of nothing in the arrays, such as
    a learning rate, is computed as it is.

    Raises:
      NotElementwise: the results are not all made place by place.
    """
    values = _run(closed.jaxpr, closed.consts, [_Value(x, True, "") for x in arrays], whole, part)
    for value in values:
        if not value.spread:
            raise NotElementwise(value.by)
    return [value.x for value in values]


def mixes(jaxpr: Jaxpr) -> str:
    """What in a program of several arrays may be what mixes them."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in CALLS:
            inner = _inner(eqn.params)
            if (found := mixes(getattr(inner, "jaxpr", inner))) != OTHERS:
                return found
        elif name not in _ELEMENTWISE and name != "broadcast_in_dim":
            return f"a {name!r}"
    return OTHERS


def _run(jaxpr: Jaxpr, consts: Iterable[Any], given: list[_Value], whole: Shape, part: Shape) -> list[_Value]:
    known = dict(zip(jaxpr.constvars, [_Value(x, False, OUTSIDE) for x in consts], strict=True))
    known.update(zip(jaxpr.invars, given, strict=True))

    def value(v):
        return _Value(v.val, False, OUTSIDE) if isinstance(v, Literal) else known[v]

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _made(eqn, list(map(value, eqn.invars)), whole, part), strict=True))
    return list(map(value, jaxpr.outvars))


def _made(eqn: Any, values: list[_Value], whole: Shape, part: Shape) -> list[_Value]:
    """What one equation of a program makes."""
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        inner = _inner(params)
        return _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values, whole, part)
    if name == "broadcast_in_dim" and not np.ndim(values[0].x) and params["shape"] == whole:
        return [_Value(jnp.broadcast_to(values[0].x, part), True, "")]
    spread = any(value.spread for value in values)
    by = next((value.by for value in values if not value.spread and np.ndim(value.x)), None)
    if spread and (name not in _ELEMENTWISE or any(v.aval.shape != whole for v in eqn.outvars)):
        raise NotElementwise(f"a {name!r}")
    if spread and by is not None:
        raise NotElementwise(by)
    made = eqn.primitive.bind(*[value.x for value in values], **params)
    many = made if eqn.primitive.multiple_results else [made]
    return [_Value(x, spread, f"a {name!r}" if by is None else by) for x in many]


def _inner(params: dict[str, Any]) -> Any:
    """The program that a call holds."""
    return next(params[each] for each in ("jaxpr", "call_jaxpr", "fun_jaxpr") if each in params)
