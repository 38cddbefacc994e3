"""A sentence spoken in another basis: that of the eigenvectors of the gradient's running factors."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh

from optimorph._core.checks import check_dtypes, check_numbers, is_integer
from optimorph._core.differences import checked_state, other_state
from optimorph._core.moments import map_moments
from optimorph._core.numbers import (
    as_scalar,
    cast_like,
    increment,
    is_absent,
    is_trainable,
    stored_dtype,
    upcast,
    upcast_dtype,
)
from optimorph._core.roles import FIRST, SECOND, Role, holds, scalar
from optimorph._core.rule import Leaves, aligned, arrays, handed_down
from optimorph._core.types import AxesRules, DTypeLike, Numeric, PyTree, Rules
from optimorph._distributed.evenly import divided_like, evenly, in_the_compilers_hands, mesh_in_use, together
from optimorph._distributed.factors import Layout, layout_of, refreshed
from optimorph._distributed.shardings import local_shard_spec, manual_axes
from optimorph._routing.resolve import AxesOfLeaves
from optimorph.linalg._kronecker import (
    Kronecker,
    permuted,
    rotated,
    rotated_back,
    with_gradient,
    with_gradient_kl,
)

NOT_IN_8_BITS = (
    "second moments change with their basis, and most of the state are factors and bases, for which 8 bits "
    "are too few. Type factor_dtype='bfloat16', mu_dtype='bfloat16' and others=optimorph.adamw(1e-3, "
    "state='int8')."
)
"""Why the state in an eigenbasis is not compressed, and what to type instead."""


class EigenbasisState(NamedTuple):
    """The states inside, how many updates there have been, factors, bases, and with `kl` eigenvalues.

    Args:
      inner: of the sentence. First moments are in the parameter's basis, second moments in the eigenbasis.
      average: of the transformation in front of it.
      basis_count: int32.
      left, right: L `(*batch, n, n)` and R `(*batch, m, m)` of leaves that read as `(*batch, n, m)`; of
        matrices of several sizes in a leaf one below the other; None of leaves that are no matrices.
      left_basis, right_basis: of their eigenvectors, in columns.
      left_values, right_values: `(*batch, n)` and `(*batch, m)`; None without `kl`.
    """

    inner: Any
    average: Any
    basis_count: Any
    left: PyTree
    right: PyTree
    left_basis: PyTree
    right_basis: PyTree
    left_values: PyTree = None
    right_values: PyTree = None
    roles = holds(
        basis_count=scalar("count of in_eigenbasis"),
        left=Role("left factor", tree=True, shaped=False),
        right=Role("right factor", tree=True, shaped=False),
        left_basis=Role("left basis", tree=True, shaped=False),
        right_basis=Role("right basis", tree=True, shaped=False),
        left_values=Role("left eigenvalues", tree=True, shaped=False),
        right_values=Role("right eigenvalues", tree=True, shaped=False),
    )


def in_eigenbasis(
    inner: optax.GradientTransformation,
    *,
    decay: Numeric,
    every: int = 10,
    kl: bool = False,
    sort: bool = True,
    average: optax.GradientTransformation | None = None,
    skip_first: bool = True,
    spread: bool = False,
    max_dim: int | None = 10_000,
    block_size: int | None = None,
    largest_inverse_root: float | None = None,
    whole_first: bool = False,
    dtype: DTypeLike | None = None,
    axes: AxesRules | None = None,
    shardings: Rules | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Run a transformation of matrices in the eigenbasis of the gradient's running second moments.

        u = Q_L inner(Q_Lᴴ g Q_R) Q_Rᴴ                    (1)
        L ← β L + (1 - β) g gᴴ                            (2)
        R ← β R + (1 - β) gᴴ g                            (3)
        Q_L, Q_R ← one orthogonal iteration with L, R     (4)  at every k-th step

    Adam in this basis is SOAP. Signs of eigenvectors do not matter to a sentence that works position by
    position. First moments of `inner` are kept in the parameter's basis and rotated where they are used, so
    that they stay what they are when the basis changes; second moments follow their columns, if (4) sorts
    these. The first step has no basis: its update is zero, and `inner` does not see its gradient, which
    gives the first basis by eight orthogonal iterations from the parameter's own basis (no `eigh`, which
    takes minutes to compile for TPUs).

    With `kl` the factors are those of KL-SOAP, of eigenvalues λ that are tracked in the basis:

        L ← β L + (1 - β) / m · g R⁻¹ gᴴ                  (5)  in place of (2); R⁻¹ = Q_R λ_R⁻¹ Q_Rᴴ
        R ← β R + (1 - β) / n · gᴴ L⁻¹ g                  (6)  in place of (3)
        λ_L ← β λ_L + (1 - β) mean_j |p_ij|² / λ_R,j      (7)  p = Q_Lᴴ g Q_R; λ_R likewise

    QR decompositions are batched over all factors of one size, so that a program has one for each size.
    Leaves that are no matrices are in their own basis, and skip the first step too. Factors are computed in
    float32 or wider: squares of gradients above 1e19 are infinite.

    Args:
      inner: any transformation that works position by position; it sees no parameters. Weight decay belongs
        behind this word.
      decay: β in [0, 1), a number, an array or a tracer.
      every: k, an integer of at least 1.
      kl: (5)-(7) in place of (2) and (3); then nothing is sorted.
      sort: whether (4) orders columns by diag(Qᴴ L Q) before it.
      average: a transformation in front of `inner`, in the parameter's basis, such as momentum. The factors
        are those of the gradient in front of it.
      skip_first: whether the first update is zero; without, it is what `average` makes of the gradient.
      spread: do (4) for a k-th of the factors of each size in every step, in turn, instead of for all in one.
      max_dim: sides that are longer have no factor, and keep their own basis.
      block_size: longer sides are divided into blocks of at most this size, each with factors of its own.
      largest_inverse_root: of λ in (5)-(7); by default max(10, min(n, 4000)).
      whole_first: whether the first gradient's factors have weight 1 instead of 1 - β.
      dtype: of stored factors and bases; float32 or the parameter's own, whichever is wider. In bfloat16
        bases are orthogonal to 2⁻⁸.
      axes: how leaves read as matrices, as that of `muon`. Inside `route_matrices` its axes count.
      shardings: those of the leaves over a mesh, as that of `muon`.

    Raises:
      ValueError: β outside [0, 1); `every`, `max_dim` or `block_size` below 1; at `init`, a spec that does
        not fit its leaf, a leaf that no rule decides.

    References:
      Vyas et al. 2024, "SOAP", arXiv:2409.11321, algorithm 3; (5)-(7): Lin et al. 2025, arXiv:2509.03378.
    """
    who = "in_eigenbasis"
    check_numbers(who, decay=decay)
    check_dtypes(who, dtype=dtype)
    for name, value in {"every": every, "max_dim": max_dim, "block_size": block_size}.items():
        if not (is_integer(value, 1) or (value is None and name != "every")):
            raise ValueError(
                f"{who}: {name} must be an integer of at least 1, but is {value!r}. Type {name}=10."
            )
    sort = sort and not kl
    inner, before = map(optax.with_extra_args_support, (inner, average or optax.identity()))
    own = AxesOfLeaves(who, axes, shardings)

    def read(leaves: Leaves) -> tuple[list[Layout | None], dict[str, Any]]:
        """How the factors of every leaf lie, and what the transformations inside may know of leaves."""
        forms, match = own.axes_and_shardings(leaves)
        found = [
            None
            if form is None or not is_trainable(x) or not np.size(x)
            else layout_of(form, np.shape(x), max_dim, block_size)
            for form, x in zip(forms, leaves.values, strict=True)
        ]
        return found, {
            "matrix_axes": [None if layout is None else layout.form for layout in found],
            "shardings": match,
        }

    def init(params):
        leaves, tree = arrays(who, params)
        own.check(Leaves(tree, leaves))
        layouts, facts = read(Leaves(tree, leaves))
        with handed_down(**facts):
            states = inner.init(params), before.init(params)
        made = [
            _NOTHING
            if layout is None
            else _evenly(layout.zeros(stored_dtype(dtype, jnp.result_type(w)), kl), w)
            for layout, w in zip(layouts, leaves, strict=True)
        ]
        columns = zip(*made, strict=True) if made else [()] * len(Kronecker._fields)
        fields = [tree.unflatten(column) for column in columns]
        fields[4:] = fields[4:] if kl else [None, None]
        return EigenbasisState(*states, jnp.zeros([], jnp.int32), *fields)

    def update(updates, state, params=None, **extra):
        state = checked_state(who, state, EigenbasisState)
        return in_the_compilers_hands(functools.partial(step, **extra), updates, state, params)

    def step(updates, state, params, **extra):
        gs, tree, ws = aligned(who, updates, params, strict=False)
        leaves = Leaves(tree, gs if params is None else ws)
        layouts, facts = read(leaves)
        _check_manual(who, leaves, facts)
        columns = _columns(who, tree, state, layouts)
        wide = [g if is_absent(g) else upcast(g) for g in gs]
        here = {k: layout for k, layout in enumerate(layouts) if layout is not None and not is_absent(gs[k])}
        bases = _Matrices.of(tree, here, columns, wide)
        first = state.basis_count == 0

        signal, averaged = before.update(tree.unflatten(wide), state.average, params, **extra)
        held = bases.moments(FIRST, rotated, state.inner)
        with handed_down(**facts):
            out, after = inner.update(bases.map(rotated, signal), held, None, **extra)  # (1)
        out, after = bases.map(rotated_back, out), bases.moments(FIRST, rotated_back, after)
        started = jax.tree.map(jnp.zeros_like, signal) if skip_first else signal
        out, after = _where(first, started, out), _where(first, state.inner, after)

        b = as_scalar(decay, jnp.zeros([], float))
        weight = jnp.where(first, 1, 1 - b) if whole_first else jnp.asarray(1 - b)

        def learn(k, g):  # (2), (3); (5)-(7)
            if kl:
                return with_gradient_kl(k, g, weight, first, largest_inverse_root)
            return with_gradient(k, g, weight)

        learned = bases.learned(learn, wide)
        learned, orders = learned.refreshed(state.basis_count, every, sort=sort, spread=spread)  # (4)
        if sort:
            due = (state.basis_count % every == 0) | spread
            order = functools.partial(orders.moments, SECOND, lambda order, x: permuted(x, *order))
            order = functools.partial(_in_dtypes, order)
            after = jax.lax.cond(due, order, lambda same: same, after)
        out = tree.flatten_up_to(out)
        told, after = divided_like(([out[k] for k in here], after), ([gs[k] for k in here], state.inner))
        for k, u in zip(here, told, strict=True):
            out[k] = u
        out = [g if is_absent(g) else cast_like(u, g) for g, u in zip(gs, out, strict=True)]
        fields = learned.stored(columns, gs)
        return tree.unflatten(out), EigenbasisState(after, averaged, increment(state.basis_count), *fields)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class _Matrices:
    """The leaves that are matrices, and for each stack of theirs its factors, or something else.

    Args:
      tree: the structure of all leaves.
      layouts: of the leaves that are matrices, by their index.
      kinds: the dtypes in which they are computed.
      own: what there is of each stack.
      mesh: over which they are computed, if one is known.
    """

    tree: Any
    layouts: dict[int, Layout]
    kinds: dict[int, Any]
    own: Mapping[int, Sequence[Any]]
    mesh: AbstractMesh | None

    @classmethod
    def of(cls, tree: Any, layouts: dict[int, Layout], columns: list[Any], gs: list[Any]) -> "_Matrices":
        """With the factors in the columns of a state."""
        kinds = {k: np.promote_types(upcast_dtype(columns[0][k].dtype), gs[k].dtype) for k in layouts}
        own = {
            k: layout.split(Kronecker(*(c and _in_precision(c[k], kinds[k]) for c in columns)))
            for k, layout in layouts.items()
        }
        return cls(tree, layouts, kinds, own, mesh_in_use([gs[k] for k in layouts]))

    def map(self, f: Callable[..., jax.Array], tree: PyTree) -> PyTree:
        """A tree of leaves with `f(own, stack)` of every stack."""
        leaves = self.tree.flatten_up_to(tree)
        there = [k for k in self.layouts if hasattr(leaves[k], "dtype")]
        made = self._of_stacks(f, {k: _in_precision(leaves[k], self.kinds[k]) for k in there})
        for k in there:
            leaves[k] = self.layouts[k].form.array(made[k], np.shape(leaves[k]))
        return self.tree.unflatten(leaves)

    def _of_stacks(self, f: Callable[..., Any], arrays: dict[int, jax.Array]) -> dict[int, list[Any]]:
        """`f(own, stack)` of every stack of the leaves."""
        stacks = {k: self.layouts[k].form.matrices(x) for k, x in arrays.items()}
        items = [(own, x) for k, each in stacks.items() for own, x in zip(self.own[k], each, strict=True)]
        made = iter(together(self.mesh, f, items, [x.shape[:-2] for _, x in items]))
        return {k: [next(made) for _ in each] for k, each in stacks.items()}

    def moments(self, kind: str, f: Callable[..., jax.Array], state: PyTree) -> PyTree:
        """A state with `map` of its moments of this kind."""
        return map_moments(lambda own, m: self.map(f, m) if own == kind else m, state)

    def learned(self, f: Callable[..., Kronecker], gs: list[Any]) -> "_Matrices":
        """With `f(own, stack of the gradient)` of every stack."""
        arrays = {k: gs[k].astype(self.kinds[k]) for k in self.layouts}
        return dataclasses.replace(self, own=self._of_stacks(f, arrays))

    def refreshed(self, *args: Any, **options: Any) -> "tuple[_Matrices, _Matrices]":
        """With newer bases, and the orders of their columns, by `factors.refreshed`."""
        stacks = [stack for k in self.layouts for stack in self.own[k]]
        made = []
        for found in map(iter, refreshed(self.mesh, stacks, *args, **options)):
            own = {k: [next(found) for _ in self.own[k]] for k in self.layouts}
            made.append(dataclasses.replace(self, own=own))
        return made[0], made[1]

    def stored(self, columns: list[Any], gs: list[Any]) -> list[PyTree]:
        """The trees of a state, from the columns of the one before; None where it has none."""
        for k, layout in self.layouts.items():
            made = layout.joined(self.own[k])
            kept = Kronecker(*(c and x.astype(c[k].dtype) for c, x in zip(columns, made, strict=True)))
            for column, x in zip(columns, _evenly(kept, gs[k]), strict=True):
                if column is not None:
                    column[k] = x
        return [None if column is None else self.tree.unflatten(column) for column in columns]


def _evenly(arrays: Kronecker, like: Any) -> Kronecker:
    """The arrays of a leaf, divided evenly over its mesh."""
    return jax.tree.map(lambda x: evenly(x, like), arrays)


def _check_manual(who: str, leaves: Leaves, facts: dict[str, Any]) -> None:
    """Refuse local shards of matrices inside `jax.shard_map`; whole ones, and stacks of them, may pass."""
    if not manual_axes():
        return
    forms, match = facts["matrix_axes"], facts["shardings"]
    for path, x, form in zip(leaves.paths, leaves.values, forms, strict=True):
        if form is None or is_absent(x):
            continue
        spec = None if match is None else local_shard_spec(who, match)(path, np.shape(x))[0]
        if spec is None or any(
            names and axis.letter != "b" for names, axis in zip(spec, form.parts, strict=True)
        ):
            raise ValueError(
                f"{who}: inside jax.shard_map {path!r} has shape {np.shape(x)}, which may be a local shard, "
                "but factors are those of whole matrices. Call update outside of jax.shard_map; or of leaves "
                "that are whole there, or divided along their stacks, type shardings={'*': P()}."
            )


_NOTHING = Kronecker(None, None, None, None)
"""Of a leaf that is no matrix."""


def _columns(who: str, tree: Any, state: EigenbasisState, layouts: list[Layout | None]) -> list[Any]:
    """The fields of a state that are trees, as lists of leaves; None of those that it has not.

    Raises:
      ValueError: naming `who`, if they are not those of these parameters.
    """
    fields = state[-len(Kronecker._fields) :]
    try:
        columns = [None if x is None else tree.flatten_up_to(x) for x in fields]
        for k, layout in enumerate(layouts):
            if layout is not None:
                layout.check(Kronecker(*(c and c[k] for c in columns)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise other_state(who) from error
    return columns


def _in_precision(x: jax.Array, dtype: Any) -> jax.Array:
    """An array in this precision; real ones stay real."""
    return jnp.asarray(x).astype(dtype if jnp.iscomplexobj(x) else jnp.finfo(dtype).dtype)


def _in_dtypes(f: Callable[[PyTree], PyTree], state: PyTree) -> PyTree:
    """f of a state, with the dtypes of before."""
    return jax.tree.map(lambda new, old: new.astype(old.dtype), f(state), state)


def _where(condition: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y.astype(x.dtype)), a, b)
