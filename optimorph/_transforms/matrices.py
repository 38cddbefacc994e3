"""What is done to whole matrices: polar factors, and a scale by their shapes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._core.checks import call_fault, check_counts, check_function, dtype_name, is_one_of, is_real
from optimorph._core.numbers import evaluated, is_array, kind
from optimorph._core.rule import Leaves, Rule, Transform, aligned, arrays, called, not_in_parts, transform
from optimorph._core.shown import shown
from optimorph._core.types import AxesRules, DTypeLike, Rules
from optimorph._distributed.hardware import AUTO, Hardware, check_divide
from optimorph._distributed.sharded_function import ShardedFunction
from optimorph._distributed.shardings import local_shard, local_shard_spec, manual_axes, shardings_of
from optimorph._routing.resolve import AxesOfLeaves
from optimorph.linalg import Exact, NewtonSchulz

SCALES: dict[str, Callable[[int, int], float]] = {
    "rms_to_rms": lambda inputs, outputs: math.sqrt(outputs / inputs),  # (1)
    "keller": lambda inputs, outputs: math.sqrt(max(1, outputs / inputs)),  # (2)
    "adamw_rms": lambda inputs, outputs: 0.2 * math.sqrt(max(inputs, outputs)),  # (3)
}
Scale = str | Callable[[int, int], float] | None
"""Of a matrix by its numbers of inputs and outputs."""

_COMM_DTYPES = ("bfloat16", "float32", "float64")


def orthogonalize(
    orthogonalizer: Callable[[jax.Array], jax.Array] | None = None,
    axes: AxesRules | None = None,
    shardings: Rules | None = None,
    *,
    comm_dtype: DTypeLike | None = None,
    bytes_at_once: int = 2**28,
    divide: str | Hardware = AUTO,
) -> optax.GradientTransformationExtraArgs:
    """Replace every matrix by its polar factor, which has its singular vectors and singular values of 1.

        u = polar(g) = U Vᴴ, where g = U Σ Vᴴ        (1)

    Over a mesh each device computes a share of the matrices, and the updates have the shardings of the
    gradients. The mesh is found automatically: over `Explicit` mesh axes from the types of the arrays, over
    `Auto` axes from the compiler. On TPUs over `Auto` axes, and in exported programs, the work is divided by
    sharding hints, which need more collectives than `shardings`. `optimorph.plan(mesh=)` prints which of
    these ways is used.

    Args:
      orthogonalizer: a function of stacks `(batch, inputs, outputs)`: `linalg.NewtonSchulz()`, the default,
        `linalg.Exact()`, or your own. All matrices of one shape and dtype are one stack, whichever leaves
        they come from. The function must treat each matrix independently.
      axes: how leaves read as matrices, as in `muon`; a leaf that is not a matrix passes through. Inside
        `route_matrices` its `axes` and `shardings` are used.
      shardings: the shardings of the leaves over a mesh, as in `muon`.
      comm_dtype: the dtype of the data in collectives, if narrower than the gradients'. bfloat16 halves the
        bytes; each number is rounded to 8 significant bits before the iteration and once more after it.
      bytes_at_once: the most bytes of whole matrices that a device holds in one round of the exchange. Two
        rounds are in flight at a time.
      divide: whether one matrix may be divided over several devices, each of which computes some of its
        columns. With "auto" this happens where devices would otherwise be idle, if the published speed of the
        devices promises a gain. "v5e", "v5p", "v6e", "H100", "H200", "cpu" or a `Hardware` use the speed of
        that device. With "never", and with "auto" on any other device, no matrix is divided.
        `optimorph.plan(mesh=)` prints the expected times. Only `linalg.NewtonSchulz` can divide matrices, and
        sharding hints do not divide them.

    Raises:
      ValueError: at `init`, a spec that does not fit its leaf, or a leaf that no rule decides; at `update`,
        inside `jax.shard_map`, shardings that are missing or do not fit.

    References:
      Carlson et al. 2015, "Preconditioned spectral descent for deep learning"; Bernstein & Newhouse 2024,
      arXiv:2409.20325; Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """
    who = called("orthogonalize")
    polar = NewtonSchulz() if orthogonalizer is None else orthogonalizer
    check_function(who, "orthogonalizer", polar, "stacks of matrices, such as linalg.NewtonSchulz()", 0)
    check_counts(who, bytes_at_once=bytes_at_once)
    equivariant = isinstance(polar, NewtonSchulz | Exact)
    if not equivariant:
        polar = _Checked(who, polar if isinstance(polar, Hashable) else _by_identity(polar))
    if comm_dtype is not None and dtype_name(comm_dtype) not in _COMM_DTYPES:
        raise ValueError(
            f"{who}: comm_dtype must be one of {[*_COMM_DTYPES]}, but is {shown(comm_dtype)}. Type "
            "comm_dtype='bfloat16': a narrower exponent would lose small gradients."
        )
    check_divide(who, divide)
    comm = None if comm_dtype is None else jnp.dtype(comm_dtype)
    own = AxesOfLeaves(who, axes, shardings)

    def init(params):
        own.check(arrays(who, params), "no gradient changes")
        return optax.EmptyState()

    def update(updates, state, params=None, **extra):
        gs, tree, _ = aligned(who, updates, None)
        leaves = Leaves(tree, gs)
        forms, match = own.axes_and_shardings(leaves)
        present = [k for k, g in enumerate(gs) if g is not None and np.size(g)]
        chosen = {k: form for k in present if (form := forms[k]) is not None}
        matrices = [jnp.asarray(gs[k]) for k in chosen]
        paths = [leaves.paths[k] for k in chosen] if match is not None or manual_axes() else []
        given = shardings_of(who, match, paths, matrices)
        sharded = ShardedFunction(polar, tuple(chosen.values()), equivariant, comm, bytes_at_once, divide)
        factors = sharded(matrices, given) if matrices else []  # (1)
        for k, factor in zip(chosen, factors, strict=True):
            gs[k] = factor
        return tree.unflatten(gs), state

    return Transform(init, update)


def scale_by_shape(
    scale: Scale = "rms_to_rms", axes: AxesRules | None = None, shardings: Rules | None = None
) -> optax.GradientTransformationExtraArgs:
    """Multiply every matrix by a function of its numbers of inputs and outputs.

        u = √(out / in) g              (1)  "rms_to_rms": if ‖g‖₂ = 1, the RMS to RMS norm of u is 1
        u = √max(1, out / in) g        (2)  "keller"
        u = 0.2 √max(in, out) g        (3)  "adamw_rms": the RMS of a typical AdamW update
        u = g                          (4)  None
        u = f(in, out) g               (5)  a function

    Args:
      scale: a name, None, or a function of two integers.
      axes: how leaves read as matrices, as in `muon`; a leaf that is not a matrix passes through.
      shardings: the shardings of the leaves over a mesh, as in `muon`; the shape is that of whole matrices.

    Raises:
      ValueError: an unknown name; at `init`, a spec that does not fit its leaf, or a leaf that no rule
        decides.

    References:
      (1) Bernstein & Newhouse 2024, arXiv:2410.21265; (2) Jordan et al. 2024, "Muon: An optimizer for
      hidden layers in neural networks"; (3) Liu et al. 2025, arXiv:2502.16982, equation 4.
    """
    who = called("scale_by_shape")
    if not (scale is None or is_one_of(scale, [*SCALES]) or call_fault(scale, 1, 1) is None):
        raise ValueError(
            f"{who}: scale must be one of {', '.join(map(repr, SCALES))}, None, or a function of the "
            f"numbers of inputs and outputs, but is {shown(scale)}. Type scale='rms_to_rms', for example."
        )
    factor_of = scale if scale is None or callable(scale) else SCALES[scale]
    own = AxesOfLeaves(who, axes, shardings)

    def begin(leaves):
        own.check(leaves, "" if scale is None else "no update is scaled")
        return optax.EmptyState()

    def advance(state, leaves):
        return (None, None) if factor_of is None else own.axes_and_shardings(leaves), state

    def update(g, state, leaf, now):
        forms, match = now
        if factor_of is None or forms[leaf.index] is None or np.size(g) == 0:
            return g, state
        shape = np.shape(leaf.leaves.values[leaf.index])
        spec, shape = ((), shape) if match is None else local_shard_spec(who, match, leaf.path, shape)
        factor = forms[leaf.index].spread(functools.partial(_real, who, leaf.path, factor_of), shape)
        if factor.size == 1:
            return factor.item() * g, state
        if leaf.part:
            raise not_in_parts(who, f"{leaf.path!r} has several scales")
        return local_shard(factor.astype(g.dtype), spec) * g, state

    return transform(who, Rule(optax.EmptyState(), update, begin=begin, advance=advance))


def _real(who: str, path: str, factor_of: Callable[[int, int], Any], inputs: int, outputs: int) -> float:
    factor = evaluated(factor_of, inputs, outputs)
    if not (is_array(factor) and is_real(factor)) or np.shape(factor):
        raise ValueError(
            f"{who}: scale must return a real number for the numbers of inputs and outputs, but for {path!r} "
            f"returned {shown(factor)}. Type scale='rms_to_rms', for example."
        )
    return float(factor)


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A user's orthogonalizer, whose results have the shape and dtype of what it gets."""

    who: str
    f: Callable[[jax.Array], jax.Array]

    def __call__(self, x: jax.Array) -> jax.Array:
        found = self.f(x)
        if not is_array(found) or np.shape(found) != x.shape or kind(found) not in ("real", kind(x)):
            what = jax.tree.map(lambda x: jax.typeof(x) if is_array(x) else x, found)
            raise ValueError(
                f"{self.who}: orthogonalizer must return {kind(x)} numbers of shape {x.shape}, that of the "
                f"stack of matrices it got, but returned {what}. Type linalg.NewtonSchulz(), for example."
            )
        return jnp.asarray(found, x.dtype)


def _by_identity(f: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda x: f(x)
