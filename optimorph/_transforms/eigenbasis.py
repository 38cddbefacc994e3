"""A transformation in another basis: the eigenvectors of running averages of g gᵀ and gᵀ g."""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from optimorph._core.checks import NoParamsError, check_counts, check_dtypes, check_flags, check_numbers
from optimorph._core.differences import checked_state, other_state
from optimorph._core.moments import map_moments
from optimorph._core.numbers import (
    as_made,
    as_scalar,
    cast_like,
    in_dtype_of,
    increment,
    is_absent,
    is_trainable,
    stored_dtype,
    upcast,
    upcast_dtype,
)
from optimorph._core.roles import FIRST, SECOND, Role, holds, scalar
from optimorph._core.rule import Leaves, aligned, arrays, called, handed, handed_down
from optimorph._core.types import AxesRules, DTypeLike, Numeric, PyTree, Rules, Shape
from optimorph._core.wrapped import wrapped
from optimorph._distributed.bases import refreshed
from optimorph._distributed.shardings import Match, local_shard_spec, manual_axes
from optimorph._distributed.stacks import (
    Slots,
    Stack,
    divided_like,
    filled,
    from_owners,
    in_the_compilers_hands,
    mesh_in_use,
    mesh_of,
    placed,
    to_owners,
    where_missing,
)
from optimorph._routing.resolve import AxesOfLeaves
from optimorph.linalg import Axes
from optimorph.linalg._kronecker import (
    Kronecker,
    first_factors,
    has_factor,
    permuted,
    rotated,
    rotated_back,
    with_gradient,
    with_gradient_kl,
)

NOT_IN_8_BITS = (
    "most of the state is factors and bases, for which 8 bits are too few, and second moments change with "
    "their basis. Type factor_dtype='bfloat16', mu_dtype='bfloat16' and others=optimorph.adamw(1e-3, "
    "state='int8')."
)
"""Why the state in an eigenbasis is not compressed, and what to type instead."""


class EigenbasisState(NamedTuple):
    """The inner states, the number of updates, the factors and their bases, and with `kl` the eigenvalues.

    The matrices of all leaves are grouped by size. All matrices of size n x m form one stack `(slots, n, m)`,
    whose key is "nxm". Over a mesh the number of slots is a multiple of the number of devices, so that every
    device holds equally many.

    Args:
      inner: the state of `inner`, for the stacks and for the leaves that are not matrices. First moments are
        in the parameter's basis, second moments in the eigenbasis.
      average: the state of the argument `average`.
      basis_count: the number of updates, int32.
      left, right: the factors L `(slots, n, n)` and R `(slots, m, m)`; None for a side without a factor.
      left_basis, right_basis: the eigenvectors of the factors, in columns.
      left_values, right_values: the eigenvalues, `(slots, n)` and `(slots, m)`; None without `kl`.
    """

    inner: Any
    average: Any
    basis_count: Any
    left: Any
    right: Any
    left_basis: Any
    right_basis: Any
    left_values: Any = None
    right_values: Any = None
    stacked = True  # an array has the matrices of several leaves
    not_in_8_bits = NOT_IN_8_BITS
    averages = holds(inner="", average="")
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
    refresh_warmup: int = 1,
    max_dim: int | None = 10_000,
    block_size: int | None = None,
    largest_inverse_root: Numeric | None = None,
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

    L and R are the factors of a matrix, and the columns of Q_L and Q_R are their eigenvectors. Adam in this
    basis is SOAP. The signs of the eigenvectors have no effect, because `inner` works element by element.

    First moments of `inner` are stored in the parameter's basis and rotated when they are used, so a new
    basis does not change them. Second moments are stored in the eigenbasis. Where (4) reorders its columns,
    the second moments are reordered too.

    In the first step there is no basis yet. The update is zero, and `inner` does not see the gradient. That
    gradient gives the first basis, by two orthogonal iterations that start at the identity. `eigh` is not
    used, because it takes minutes to compile for TPUs.

    With `kl` the factors are those of KL-SOAP, and their eigenvalues λ are averaged too:

        L ← β L + (1 - β) / m · g R⁻¹ gᴴ                  (5)  in place of (2); R⁻¹ = Q_R λ_R⁻¹ Q_Rᴴ
        R ← β R + (1 - β) / n · gᴴ L⁻¹ g                  (6)  in place of (3)
        λ_L ← β λ_L + (1 - β) mean_j |p_ij|² / λ_R,j      (7)  p = Q_Lᴴ g Q_R; λ_R likewise

    A compiled program has one batched QR decomposition for each size of factor. Leaves that are not matrices
    are not rotated, and their first update is zero too. Factors are computed in float32 or wider. In float32
    the square of a gradient above 1e19 is infinite.

    Args:
      inner: any transformation that works element by element. It gets no parameters, so put weight decay
        after `in_eigenbasis` in the chain.
      decay: β in [0, 1), a number, an array or a tracer.
      every: k, an integer of at least 1.
      kl: whether (5)-(7) replace (2) and (3). Columns are then not reordered.
      sort: whether the columns of a basis are ordered by diag(Qᴴ L Q) before (4).
      average: a transformation that is applied before `inner`, in the parameter's basis, such as momentum.
        The factors are computed from the gradient itself.
      skip_first: whether the first update is zero. If not, it is the output of `average`.
      spread: whether every step updates about 1/k of the bases, in turn, so that all steps cost about the
        same. By default every k-th step updates all of them. Compiled programs with `spread` have no
        reverse-mode derivatives.
      refresh_warmup: the number of first steps that update all bases, whatever k is. The first bases are
        those of one gradient, and the next gradients may differ much from it.
      max_dim: the longest side (number of rows or columns) that has a factor. A longer side is not rotated.
      block_size: the longest side that is not divided. Longer sides are divided into blocks of at most this
        size, and each block has its own factors.
      largest_inverse_root: the upper bound of 1/√λ in (5)-(7), above 0. The default is max(10, min(n, 4000)).
      whole_first: whether the first gradient enters the factors with weight 1 instead of 1 - β.
      dtype: the dtype of the stored factors and bases. The default is float32, or the parameter's dtype if
        that is wider. In bfloat16 a basis is orthogonal up to 2⁻⁸.
      axes: how leaves read as matrices, as in `muon`. Inside `route_matrices` its `axes` are used.
      shardings: the shardings of the leaves over a mesh, as in `muon`.

    Each array of the state holds the matrices of several leaves, so `optax.tree.map_params` cannot map over
    this state. The length of these arrays depends on the mesh at `init`.

    Raises:
      ValueError: β outside [0, 1); `every`, `refresh_warmup`, `max_dim` or `block_size` below 1; at `init`,
        a spec that does not fit its leaf, or a leaf that no rule decides.

    References:
      Vyas et al. 2024, "SOAP", arXiv:2409.11321, algorithm 3; (5)-(7): Lin et al. 2025, arXiv:2509.03378.
    """
    who = called("in_eigenbasis")
    check_numbers(who, decay=decay)
    check_dtypes(who, dtype=dtype)
    check_counts(who, every=every, refresh_warmup=refresh_warmup, max_dim=max_dim, block_size=block_size)
    if largest_inverse_root is not None:
        check_numbers(who, largest_inverse_root=largest_inverse_root)
    check_flags(who, kl=kl, sort=sort, skip_first=skip_first, spread=spread, whole_first=whole_first)
    sort = sort and not kl
    every, refresh_warmup = (min(n, np.iinfo(np.int32).max) for n in (every, refresh_warmup))  # as the count
    inner, before = wrapped(who, inner), wrapped(who, optax.identity() if average is None else average)
    own = AxesOfLeaves(who, axes, shardings)

    def read(leaves: Leaves) -> _Known:
        """Where the matrices of the leaves are."""
        forms, match = own.axes_and_shardings(leaves)
        _check_manual(who, leaves, forms, match)
        found = {
            k: form if block_size is None else form.in_blocks(np.shape(x), block_size)
            for k, (form, x) in enumerate(zip(forms, leaves.values, strict=True))
            if form is not None and is_trainable(x) and np.size(x)
        }
        return _Known(leaves.structure, Slots.of(found, leaves.values), match)

    def init(params):
        leaves = arrays(who, params)
        own.check(leaves, "none has a basis")
        known = read(leaves)
        slots = known.slots
        if (readings := handed("readings")) is not None:
            readings.stacked |= {leaves.paths[k]: counts for k, counts in slots.of_leaves.items()}
        mesh = mesh_of([leaves.values[k] for k in slots.forms])
        in_a_basis = {key for key in slots.parts if has_factor(min(slots.size(key)), max_dim)}
        counts = {k: filled(n, mesh if k in in_a_basis else None) for k, n in slots.counts.items()}
        kinds = slots.dtypes(leaves.values)

        def zeros(key):
            kind = stored_dtype(None, kinds[key])
            return jnp.zeros((counts[key], *slots.size(key)), kind)

        stacks = {key: placed(zeros(key), mesh) for key in counts}
        with known.handed_down():
            tree = known.joined(leaves.values, stacks)
            states = inner.init(tree), before.init(tree)
        made = {
            key: first_factors(x, max_dim, stored_dtype(dtype, kinds[key]), kl) for key, x in stacks.items()
        }
        made = jax.tree.map(lambda x: placed(x, mesh), made)
        return EigenbasisState(*states, jnp.zeros([], jnp.int32), *_fields(made, kl))

    def update(updates, state, params=None, **extra):
        state = as_made(init, checked_state(who, state, EigenbasisState), params)
        return in_the_compilers_hands(functools.partial(step, **extra), (updates, state), params)

    def step(old, params, **extra):
        updates, state = old
        gs, tree, ws = aligned(who, updates, params, strict=False)
        known = read(Leaves(tree, gs if params is None else ws))
        slots = known.slots
        kept = _kept(who, slots, state, max_dim)
        there = {k: gs[k] for k in slots.forms if not is_absent(gs[k])}
        mesh = mesh_in_use([*there.values()])
        wide = {k: upcast(g) for k, g in there.items()}
        counts = {key: next(map(len, jax.tree.leaves(k)), slots.counts[key]) for key, k in kept.items()}
        g = to_owners(mesh, slots.stacked(wide, counts))
        now = {key: jax.tree.map(lambda x, like=g[key]: _in_precision(x, like), k) for key, k in kept.items()}
        first = state.basis_count == 0

        others = [x if is_absent(x) else upcast(x) for x in gs]
        with known.handed_down():
            signal, averaged = before.update(known.joined(others, g), state.average, None, **extra)
            held = known.moments(FIRST, _into, now, state.inner)
            try:
                out, after = inner.update(known.map(_into, now, signal), held, None, **extra)  # (1)
            except NoParamsError as error:
                raise ValueError(
                    f"{who}: inner has a transform that needs the parameters, such as weight decay, but a "
                    f"basis has none. Put it behind: chain({who}(...), add_decayed_weights(0.1))."
                ) from error
        out, after = known.map(_back, now, out), known.moments(FIRST, _moment_back, now, after)
        started = jax.tree.map(jnp.zeros_like, signal) if skip_first else signal
        out, after = _where(first, started, out), _where(first, state.inner, after)

        b = as_scalar(decay, jnp.zeros([], float))
        weight = jnp.where(first, 1, 1 - b) if whole_first else jnp.asarray(1 - b)

        def learn(k, x):  # (2), (3); (5)-(7)
            if kl:
                return with_gradient_kl(k, x, weight, first, largest_inverse_root)
            return with_gradient(k, x, weight)

        learned = {key: learn(now[key], x) for key, x in g.items()}
        whole = state.basis_count < refresh_warmup
        learned, orders = refreshed(  # (4)
            mesh, learned, slots.counts, state.basis_count, whole, every, sort=sort, spread=spread
        )
        if sort:
            after = jax.lax.cond(
                whole | (state.basis_count % every == 0) | spread,
                lambda same: known.moments(SECOND, lambda order, x: permuted(x, *order), orders, same),
                lambda same: same,
                after,
            )
        if dtype is not None:
            learned = jax.tree.map(lambda x: x.astype(stored_dtype(dtype, x.dtype)), learned)
        missing = slots.missing(there)
        was, new = (state.inner, state.average, kept), (after, averaged, learned)
        after, averaged, learned = where_missing(missing, was, new)

        matrices = slots.unstacked(from_owners(mesh, out["stacks"]))
        found, told = tree.flatten_up_to(out["others"]), [matrices[k] for k in there]
        told = told if mesh is None else divided_like(told, [*there.values()])
        for k, u in zip(there, told, strict=True):
            found[k] = u
        found = [g if is_absent(g) else cast_like(u, g) for g, u in zip(gs, found, strict=True)]
        count = increment(state.basis_count)
        return tree.unflatten(found), EigenbasisState(after, averaged, count, *_fields(learned, kl))

    return optax.GradientTransformationExtraArgs(init, update)


class _Known(NamedTuple):
    """The tree that transformations inside see: stacks of matrices, and the other leaves."""

    tree: Any
    slots: Slots
    match: Match | None

    def handed_down(self) -> contextlib.AbstractContextManager[None]:
        """What transformations inside know: axes of leaves, and inside `jax.shard_map` also shardings."""
        return handed_down(matrix_axes=self.forms, shardings=self._sharding if manual_axes() else None)

    def _sharding(self, path: str, shape: Shape) -> Any:
        """Each device has whole matrices; other leaves have the shardings that their rules give."""
        leaf = path.removeprefix("others/")
        if leaf == path:
            return PartitionSpec()
        return ... if self.match is None else self.match(leaf, shape)

    @property
    def forms(self) -> list[Axes | None]:
        return [None] * self.tree.num_leaves + [Axes("bio")] * len(self.slots.parts)

    def joined(self, leaves: Sequence[Any], stacks: Stack) -> PyTree:
        others = [None if k in self.slots.forms else x for k, x in enumerate(leaves)]
        return {"others": self.tree.unflatten(others), "stacks": stacks}

    def map(self, f: Any, own: dict[str, Any], tree: PyTree) -> PyTree:
        stacks = {key: f(own[key], x) if hasattr(x, "dtype") else x for key, x in tree["stacks"].items()}
        return {**tree, "stacks": stacks}

    def moments(self, kind: str, f: Any, own: dict[str, Any], state: PyTree) -> PyTree:
        return map_moments(lambda found, m: self.map(f, own, m) if found == kind else m, state)


def _check_manual(who: str, leaves: Leaves, forms: Any, match: Any) -> None:
    """Refuse local shards of matrices inside `jax.shard_map`; whole ones may pass."""
    if not manual_axes():
        return
    for path, x, form in zip(leaves.paths, leaves.values, forms, strict=True):
        if form is None or is_absent(x):
            continue
        spec = None if match is None else local_shard_spec(who, match, path, np.shape(x))[0]
        if spec is None or any(spec):
            raise ValueError(
                f"{who}: inside jax.shard_map or pmap, {path!r} of shape {np.shape(x)} may be a local shard, "
                "but factors need whole matrices. Call update outside, or if leaves are whole, type "
                "shardings={'*': P()}."
            )


def _kept(who: str, slots: Slots, state: EigenbasisState, max_dim: int | None) -> dict[str, Kronecker]:
    """What a state has of each size of matrix; a state of other matrices is refused."""
    fields = [x for x in state[-len(Kronecker._fields) :] if x is not None]
    if not all({*x} == {*slots.parts} for x in fields):
        raise other_state(who)
    kept = {key: Kronecker(*(x[key] for x in fields)) for key in slots.parts}
    for key, k in kept.items():
        sides = [has_factor(n, max_dim) for n in slots.size(key)]
        full = all(len(x) >= slots.counts[key] for x in jax.tree.leaves(k))
        if [x is not None for x in k[:2]] != sides or not full:
            raise other_state(who)
    return kept


def _fields(kept: dict[str, Kronecker], kl: bool) -> Any:
    fields = [{key: k[j] for key, k in kept.items()} for j in range(len(Kronecker._fields))]
    return fields if kl else [*fields[:4], None, None]


def _into(k: Kronecker, x: jax.Array) -> jax.Array:
    return rotated(k, _in_precision(x, *jax.tree.leaves(k)))


def _back(k: Kronecker, x: jax.Array) -> jax.Array:
    return rotated_back(k, _in_precision(x, *jax.tree.leaves(k)))


def _moment_back(k: Kronecker, x: jax.Array) -> jax.Array:
    return _back(k, x).astype(x.dtype)


def _in_precision(x: jax.Array, *others: jax.Array) -> jax.Array:
    """A stored array in the precision of others; real ones stay real."""
    dtype = np.result_type(*(upcast_dtype(y.dtype) for y in (x, *others)))
    return x.astype(dtype if jnp.iscomplexobj(x) else jnp.finfo(dtype).dtype)


def _where(condition: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.where(condition, in_dtype_of(x, y), y), a, b)
