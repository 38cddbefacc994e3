"""A program for arrays as one for a part of them, if it makes every number of those at the same place."""

import fnmatch
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from optimorph.core.types import Shape

MIXING = """
all_* approx_top_k arg* axis_index broadcast_in_dim broadcast_to cholesky* concatenate cond conv_general_*
cum* custom_* dot_* dynamic_* eig* fft gather ge*qr* hessenberg householder_* io_callback iota* lu p[mp]*
pad pbroadcast* psum* pure_callback qr ragged_* random_* reduce reduce_[!p]* reduce_prod reshape reshard rev
rng_* scaled_* scan scatter* schur select_and_* shard_map sharding_constraint slice sort split squeeze stack
svd symmetric_* tile top_k transpose tri* unstack while
"""
"""Patterns of primitives that mix places, ask where places are, or hold a program of their own.

A primitive that is not here is element-wise if its results have the shape of its arguments and its
parameters do not say that shape: JAX adds such primitives with every release.
"""

CALLS = {"checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit", "remat2"}
"""Primitives that run the program that they hold, once."""

OUTSIDE = "an array that is neither gradient, nor parameter, nor moment"
OTHERS = "another leaf"

_MIXING = re.compile("|".join(map(fnmatch.translate, MIXING.split())))
_BROADCASTS = {"broadcast_in_dim", "broadcast_to"}


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
    a learning rate, is computed as it is. The program holds no calls.

    Raises:
      NotElementwise: the results are not all made place by place.
    """
    values = _run(closed.jaxpr, closed.consts, [_Value(x, True, "") for x in arrays], whole, part)
    for value in values:
        if not value.spread:
            raise NotElementwise(value.by)
    return [value.x for value in values]


def inlined(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program without calls: each of its equations shows by itself what it makes of what."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]

    def run(jaxpr, consts, given):
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *given], strict=True))
        for eqn in jaxpr.eqns:
            values = [v.val if isinstance(v, Literal) else known[v] for v in eqn.invars]
            if eqn.primitive.name in CALLS:
                inner = next(x for x in eqn.params.values() if isinstance(x, ClosedJaxpr | Jaxpr))
                made = run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values)
            else:
                made = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
                made = made if eqn.primitive.multiple_results else [made]
            known.update(zip(eqn.outvars, made, strict=True))
        return [v.val if isinstance(v, Literal) else known[v] for v in jaxpr.outvars]

    return jax.make_jaxpr(lambda *given: run(closed.jaxpr, closed.consts, given))(*shapes)


def mixes(jaxpr: Jaxpr) -> str:
    """What in a program of several arrays may be what mixes them."""
    names = [eqn.primitive.name for eqn in jaxpr.eqns if eqn.primitive.name not in _BROADCASTS]
    return next((f"a {name!r}" for name in names if _MIXING.fullmatch(name)), OTHERS)


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
    if name in _BROADCASTS and not np.ndim(values[0].x) and eqn.outvars[0].aval.shape == whole:
        return [_Value(jnp.broadcast_to(values[0].x, part), True, "")]
    spread = any(value.spread for value in values)
    by = next((value.by for value in values if not value.spread and np.ndim(value.x)), None)
    if spread and _mixes(eqn, whole):
        raise NotElementwise(f"a {name!r}")
    if spread and by is not None:
        raise NotElementwise(by)
    made = eqn.primitive.bind(*[value.x for value in values], **eqn.primitive.get_bind_params(params))
    many = made if eqn.primitive.multiple_results else [made]
    return [_Value(x, spread, f"a {name!r}" if by is None else by) for x in many]


def _mixes(eqn: Any, whole: Shape) -> bool:
    """Whether an equation on arrays of this shape may mix their places."""
    shapes = [v.aval.shape for v in eqn.outvars]
    return bool(
        _MIXING.fullmatch(eqn.primitive.name)
        or any(shape != whole for shape in shapes)
        or any(type(x) is tuple and x == whole for x in eqn.params.values())
    )
