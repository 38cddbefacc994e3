"""An average of squares in as many numbers as a matrix has rows and columns."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._core.checks import check_flags, check_numbers
from optimorph._core.differences import other_state
from optimorph._core.numbers import as_scalar, common, full_like, upcast
from optimorph._core.roles import Role, holds, roles_of
from optimorph._core.rule import Rule, called, not_in_parts, transform
from optimorph._core.types import AxesRules, Numeric, PyTree, Rules, Shape
from optimorph._distributed.reductions import reduction
from optimorph._distributed.stacks import in_the_compilers_hands
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
      shardings: the shardings of the leaves, needed inside `jax.shard_map`, as in `muon`.
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

    def average(x, before):
        if np.shape(x) != np.shape(before):
            raise other_state(who)
        x, before = common(x, before)
        b = as_scalar(decay, before)
        return b * before + (1 - b) * x

    def begin(leaves):
        own.check(leaves)

    def init(leaf):
        form, _ = own.of(leaf)
        zeros = full_like(leaf.weight).real
        if form is None:
            return FactoredState(zeros, jnp.zeros((1,), zeros.dtype))
        return FactoredState(*_at_first(form, zeros))

    def advance(state, leaves):
        return own.axes_and_shardings(leaves), state

    def update(g, state, leaf, now):
        if leaf.part:
            raise not_in_parts(who, f"{who} needs whole matrices")
        forms, match = now
        form = forms[leaf.index]
        if np.size(g) == 0:
            return g, FactoredState(*map(upcast, state))
        if form is None:
            rows = average(g, state.rows)
            return rows.astype(g.dtype), FactoredState(rows, upcast(state.columns))
        over = {side: reduction(who, match, leaf, form, side).mean_over_devices for side in "io"}

        def outer(old):
            g, state = old
            rows, columns = _of_sides(jnp.mean, form.matrices(g))
            rows = average(over["o"](rows), state.rows)  # (1)
            columns = average(over["i"](columns), state.columns)  # (2)
            u = _outer(form, g.shape, rows, columns, None if geometric else over["i"])
            return u.astype(g.dtype), FactoredState(rows, columns)

        return in_the_compilers_hands(outer, (g, state))

    return transform(who, Rule(roles_of(FactoredState), update, init, begin, advance))


def _at_first(form: Axes, zeros: jax.Array) -> list[jax.Array]:
    """Zeros for rows and columns, divided over a mesh as the leaf's batch axes are."""
    parts, stacks = form.parts, form.stacks(zeros.shape)
    alone = all(axis.whole for axis in parts)  # then the axes of batches are those of the leaf
    batch = jnp.sum(zeros, [k for k, axis in enumerate(parts) if not (alone and axis.letter == "b")])
    shapes = [(*stacks[0][:-2], sum(stack[side] for stack in stacks)) for side in (-2, -1)]
    return [jnp.broadcast_to(jnp.expand_dims(batch, [*range(batch.ndim, len(x))]), x) for x in shapes]


def _of_sides(f: Callable[..., jax.Array], stacks: Sequence[jax.Array]) -> list[jax.Array]:
    """A reduction of each row over its columns, and of each column over its rows."""
    return [jnp.concatenate([f(x, axis) for x in stacks], axis=-1) for axis in (-1, -2)]


def _outer(
    form: Axes,
    shape: Shape,
    rows: jax.Array,
    columns: jax.Array,
    over_rows: Callable[[jax.Array], jax.Array] | None,
) -> jax.Array:
    """(3) of every stack, given the mean over devices that divide rows; (4) without it."""
    shapes: Any = form.stacks(shape)
    found = []
    for k in range(len(shapes)):
        r, c = (
            x[..., sum(s[side] for s in shapes[:k]) : sum(s[side] for s in shapes[: k + 1])]
            for side, x in ((-2, rows), (-1, columns))
        )
        if over_rows is None:
            r, c = jnp.sqrt(r), jnp.sqrt(c)
        else:
            mean = over_rows(jnp.mean(r, -1, keepdims=True))
            r = r / jnp.where(mean > 0, mean, 1)
        found.append(r[..., :, None] * c[..., None, :])
    return form.array(found, shape)
