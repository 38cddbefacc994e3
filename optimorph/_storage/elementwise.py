"""Run the jaxpr of an element-wise function on a slice of its arguments."""

import fnmatch
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from optimorph._core.types import Shape

MIXING = """
all_* approx_top_k arg* axis_index broadcast_in_dim broadcast_to cholesky* concatenate cond
conv_general_* cum* custom_* dot_* dynamic_* eig* fft for_target gather ge*qr* hessenberg householder_*
io_callback iota* lu p[mp]* pad pbroadcast* psum* pure_callback qr ragged_* random_* reduce reduce_[!p]*
reduce_prod reshape reshard rev rng_* scaled_* scan scatter* schur select_and_* shard_map
sharding_constraint slice sort split squeeze stack svd symmetric_* tile top_k transpose tri* unstack
while
"""
"""Patterns of primitives that mix elements, depend on where elements are, or hold a jaxpr of their own.

A primitive that is not here is element-wise if its results have the shape of its arguments and its
parameters do not contain that shape: JAX adds such primitives with every release.
"""

CALLS = {"checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit", "remat2"}
"""Primitives that run the jaxpr that they hold once."""

CONSTANT = "an array that is neither gradient, nor parameter, nor moment"

_MIXING = re.compile("|".join(map(fnmatch.translate, MIXING.split())))
_BROADCASTS = {"broadcast_in_dim", "broadcast_to"}


class NotElementwiseError(Exception):
    """What in a jaxpr mixes elements, or depends on where they are: "a 'reduce_sum'"."""


class _Value(NamedTuple):
    """Of a variable: an array, whether it is a slice of an argument's shape, and what made it."""

    x: Any
    sliced: bool
    by: str


class Elementwise(NamedTuple):
    """An element-wise function of arrays, as a jaxpr.

    Args:
      closed: the jaxpr, whose first arguments are constants of the program.
      constants: their number.
      whole: the shape that it was traced for.
    """

    closed: ClosedJaxpr
    constants: int
    whole: Shape

    def __call__(self, constants: Iterable[Any], arrays: Iterable[Any], part: Shape) -> list[jax.Array]:
        """The results for slices of the shape `part` where an argument has the shape `whole`.

        Scalars may enter the arrays, and none may leave them. What does not depend on the arrays, such as a
        learning rate, is computed unchanged. Other results are refused by a `NotElementwiseError`.
        """
        jaxpr, given = self.closed.jaxpr, [*constants, *arrays]
        values = [
            _Value(x, k >= self.constants and v.aval.shape == self.whole, CONSTANT)
            for k, (v, x) in enumerate(zip(jaxpr.invars, given, strict=True))
        ]
        results = _run(jaxpr, self.closed.consts, values, self.whole, part)
        for found in results:
            if not found.sliced and np.ndim(found.x):
                raise NotElementwiseError(found.by)
        return [found.x for found in results]


def check_elementwise(f: Elementwise) -> None:
    part = (*f.whole[:-2], 1, *f.whole[-1:])
    shapes = [
        jax.ShapeDtypeStruct(
            part if k >= f.constants and v.aval.shape == f.whole else v.aval.shape, v.aval.dtype
        )
        for k, v in enumerate(f.closed.jaxpr.invars)
    ]
    jax.eval_shape(lambda *given: f(given[: f.constants], given[f.constants :], part), *shapes)


def _run(jaxpr: Jaxpr, consts: Iterable[Any], given: list[_Value], whole: Shape, part: Shape) -> list[_Value]:
    """The values of the results of a jaxpr, and of those that it calls."""
    known = dict(zip(jaxpr.constvars, [_Value(x, False, CONSTANT) for x in consts], strict=True))
    known.update(zip(jaxpr.invars, given, strict=True))

    def value(v):
        return _Value(v.val, False, CONSTANT) if isinstance(v, Literal) else known[v]

    for eqn in jaxpr.eqns:
        values = list(map(value, eqn.invars))
        if eqn.primitive.name in CALLS:
            inner: Any = next(x for x in eqn.params.values() if isinstance(x, ClosedJaxpr | Jaxpr))
            made = _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values, whole, part)
        else:
            made = _made(eqn, values, whole, part)
        known.update(zip(eqn.outvars, made, strict=True))
    return list(map(value, jaxpr.outvars))


def _made(eqn: Any, values: list[_Value], whole: Shape, part: Shape) -> list[_Value]:
    name, params = eqn.primitive.name, eqn.params
    if name in _BROADCASTS and not np.ndim(values[0].x) and eqn.outvars[0].aval.shape == whole:
        return [_Value(jnp.broadcast_to(values[0].x, part), True, "")]
    sliced = any(value.sliced for value in values)
    by = next((value.by for value in values if not value.sliced and np.ndim(value.x)), None)
    if sliced and _mixes(eqn, whole):
        raise NotElementwiseError(f"a {name!r}")
    if sliced and by is not None:
        raise NotElementwiseError(by)
    made = eqn.primitive.bind(*[value.x for value in values], **eqn.primitive.get_bind_params(params))
    many = made if eqn.primitive.multiple_results else [made]
    return [_Value(x, sliced, f"a {name!r}" if by is None else by) for x in many]


def _mixes(eqn: Any, whole: Shape) -> bool:
    shapes = [v.aval.shape for v in eqn.outvars]
    return bool(
        _MIXING.fullmatch(eqn.primitive.name)
        or any(shape != whole for shape in shapes)
        or any(type(x) is tuple and x == whole for x in eqn.params.values())
    )
