"""An average of squares in as many numbers as a matrix has rows and columns."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._core.checks import check_flags, check_numbers
from optimorph._core.numbers import as_scalar, common, full_like, stored_dtype, upcast
from optimorph._core.roles import Role, holds, roles_of
from optimorph._core.rule import Rule, called, not_in_parts, transform
from optimorph._core.types import AxesRules, Numeric, PyTree, Rules
from optimorph._routing.resolve import AxesOfLeaves
from optimorph.linalg import Axes


class FactoredState(NamedTuple):
    """The averages of rows and of columns.

    Args:
      rows, columns: `(*batch, n)` and `(*batch, m)` for a leaf that reads as `(*batch, n, m)`. If a leaf has
        several stacks, their averages are concatenated. A leaf that is not a matrix has its average in `rows`
        and a single 0 in `columns`.
    """

    rows: PyTree
    columns: PyTree
    roles = holds(
        rows=Role("averages of rows", tree=True, shaped=False),
        columns=Role("averages of columns", tree=True, shaped=False),
    )


def factored(
    decay: Numeric,
    axes: AxesRules | None = None,
    shardings: Rules | None = None,
    *,
    geometric: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Replace every matrix of squares by a running average of rank one.

        r_i ← β r_i + (1 - β) mean_j g_ij        (1)
        c_j ← β c_j + (1 - β) mean_i g_ij        (2)
        u_ij = r_i c_j / mean r                  (3)
        u_ij = √(r_i c_j)                        (4)  with `geometric`

    The state has one number for each row and column, instead of one for each element. In a second moment it
    replaces `ema`: `chain(square(), factored(0.999), debias(0.999), root())`. Inside `in_eigenbasis`, a
    division by the root of (3) is Shampoo with power 1/2, and a division by the root of (4) is Shampoo with
    power 1/4. Leaves that are not matrices have an ordinary average.

    Args:
      decay: β in [0, 1), a number, an array or a tracer.
      axes: how leaves read as matrices, as in `muon`. Inside `route_matrices` its `axes` are used.
      shardings: the shardings of the leaves over a mesh, as in `muon`.
      geometric: whether to return the geometric mean (4) instead of the matrix (3), whose rows and columns
        have the averages r and c.

    Raises:
      ValueError: β outside [0, 1), when it is a concrete number; inside `compress_state`.

    References:
      Shazeer & Stern 2018, "Adafactor", arXiv:1804.04235, algorithm 1.
    """
    who = called("factored")
    check_numbers(who, decay=decay)
    check_flags(who, geometric=geometric)
    own = AxesOfLeaves(who, axes, shardings)

    def init(leaf):
        form = own.axes_and_shardings(leaf.leaves)[0][leaf.index]
        dtype = jnp.finfo(stored_dtype(None, jnp.result_type(leaf.weight))).dtype
        if form is None:
            return FactoredState(full_like(leaf.weight, 0.0, dtype).real, jnp.zeros((1,), dtype))
        stacks = form.stacks(np.shape(leaf.weight))
        sizes = [sum(stack[k] for stack in stacks) for k in (-2, -1)]
        return FactoredState(*(jnp.zeros((*stacks[0][:-2], size), dtype) for size in sizes))

    def advance(state, leaves):
        return own.axes_and_shardings(leaves)[0], state

    def update(g, state, leaf, forms):
        if leaf.part:
            raise not_in_parts(who, f"{who} needs whole matrices")
        form = forms[leaf.index]

        def average(x, before):
            x, before = common(x, before)
            b = as_scalar(decay, before)
            return b * before + (1 - b) * x

        if np.size(g) == 0:
            return g, FactoredState(*map(upcast, state))
        if form is None:
            rows = average(g, state.rows)
            return rows.astype(g.dtype), FactoredState(rows, upcast(state.columns))
        stacks = form.matrices(g)
        rows, columns = (
            average(jnp.concatenate([jnp.mean(x, axis) for x in stacks], axis=-1), before)  # (1), (2)
            for axis, before in ((-1, state.rows), (-2, state.columns))
        )
        return _outer(form, g.shape, rows, columns, geometric).astype(g.dtype), FactoredState(rows, columns)

    return transform(who, Rule(roles_of(FactoredState), update, init=init, advance=advance))


def _outer(
    form: Axes, shape: tuple[int, ...], rows: jax.Array, columns: jax.Array, geometric: bool
) -> jax.Array:
    """(3) or (4) of every stack."""
    shapes: Any = form.stacks(shape)
    found = []
    for k in range(len(shapes)):
        r, c = (
            x[..., sum(s[side] for s in shapes[:k]) : sum(s[side] for s in shapes[: k + 1])]
            for side, x in ((-2, rows), (-1, columns))
        )
        if geometric:
            r, c = jnp.sqrt(r), jnp.sqrt(c)
        else:
            mean = jnp.mean(r, -1, keepdims=True)
            r = r / jnp.where(mean > 0, mean, 1)
        found.append(r[..., :, None] * c[..., None, :])
    return form.array(found, shape)
