"""Measure what an optimizer does to every leaf. The numbers are kept in the state and read from it.

    tx = probe(muon(0.02))                                            # cheap metrics, every 25th step
    tx = probe(tx, metrics=("update_stable_rank",), every=100)        # a spectral metric, less often
    ...
    logger.log(read(state), step)

`read` returns a flat dictionary of numbers, which most loggers take.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optimorph import linalg
from optimorph._core.checks import check_flags, check_integer, check_params, one_or_several
from optimorph._core.differences import checked_state
from optimorph._core.flags import cond
from optimorph._core.moments import moments_of
from optimorph._core.numbers import as_made, common, increment, is_array, is_missing, is_trainable, upcast
from optimorph._core.paths import by_path, distinct_paths
from optimorph._core.roles import FIRST, Role, holds, scalar
from optimorph._core.rule import Leaves
from optimorph._core.shown import shown
from optimorph._core.types import AxesRules, PyTree
from optimorph._core.warn import warn
from optimorph._core.wrapped import wrapped
from optimorph._distributed.map_by_shape import map_by_shape
from optimorph._distributed.shardings import undivided
from optimorph._routing.resolve import resolve_leaves, resolved_axes
from optimorph.linalg import Axes

INFINITE = float(jnp.finfo(jnp.float32).max)
"""What states have in the place of an infinite value, which `jax_debug_infs` would refuse."""


class Leaf(NamedTuple):
    """What a metric sees of a leaf, before the step; None where there is none."""

    gradient: jax.Array
    update: jax.Array
    weight: Any
    momentum: Any


class ProbeState(NamedTuple):
    """The inner state, the number of updates, and the latest values of all metrics.

    Args:
      inner: the state of the inner transformation.
      probe_count: the number of updates, int32.
      values: one value for each name, float32 `(n,)`; 0 before the first measurement.
      measured: whether each value was measured, bool `(n,)`. It is False if the gradient was missing.
      names: the names `path/metric` of all values, as UTF-8 bytes with a line feed between two names, uint8.
    """

    inner: Any
    probe_count: jax.Array
    values: jax.Array
    measured: jax.Array
    names: jax.Array
    roles = holds(
        probe_count=scalar("numbers of probe"),
        **dict.fromkeys(("values", "measured", "names"), Role("numbers of probe", shaped=False)),
    )


def _rms(x: Any) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(jnp.abs(upcast(x)))))


def _ratio(leaf: Leaf) -> jax.Array:
    step, size = common(_rms(leaf.update), _rms(leaf.weight))
    return jnp.where(step == 0, 0, jnp.where(size == 0, INFINITE, step / jnp.where(size == 0, 1, size)))


def _cosine(leaf: Leaf) -> jax.Array:
    g, m = common(upcast(leaf.gradient), leaf.momentum)
    size, product = _rms(g) * _rms(m), jnp.mean((g * m.conj()).real)
    return jnp.where(size == 0, 0, jnp.clip(product / jnp.where(size == 0, 1, size), -1, 1))


OF_LEAVES: dict[str, Callable[[Leaf], jax.Array]] = {
    "gradient_rms": lambda leaf: _rms(leaf.gradient),
    "update_rms": lambda leaf: _rms(leaf.update),
    "weight_rms": lambda leaf: _rms(leaf.weight),
    "update_to_weight": _ratio,
    "cosine": _cosine,
}
"""Metrics of any leaf: root mean squares, that of the update over that of the weight, and the cosine of the
gradient with the first moment or velocity, where the state has one."""

OF_MATRICES: dict[str, Callable[[Any], jax.Array]] = {
    "spectral_norm": linalg.spectral_norm,
    "rms_to_rms_norm": linalg.rms_to_rms_norm,
    "stable_rank": linalg.stable_rank,
    "effective_rank": linalg.effective_rank,
    "top_energy": functools.partial(linalg.top_energy, k=1),
    "orthogonality_error": linalg.orthogonality_error,
}
"""Metrics of matrices, `linalg`'s functions, after "gradient_", "update_", "weight_" or "momentum_"."""

CHEAP = tuple(OF_LEAVES)
SPECTRAL = tuple(f"update_{name}" for name in OF_MATRICES)


def probe(
    inner: optax.GradientTransformation,
    metrics: Sequence[str] = CHEAP,
    every: int = 25,
    *,
    axes: AxesRules | None = None,
    exact: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Measure every leaf in every k-th step. The updates do not change.

    The numbers are one array in the state, and `read` returns them as a dictionary. Between two measurements
    nothing is computed. Probes may be nested, each with its own metrics and period. Put a probe inside
    `multi_steps`, as in `multi_steps(probe(tx), k)`: outside, it would see the zero updates between two
    steps.

    Metrics of any leaf: "gradient_rms", "update_rms", "weight_rms" (root mean squares), "update_to_weight"
    (the root mean square of the update, divided by that of the weight) and "cosine" (of the angle between the
    gradient and the first moment or velocity).

    Metrics of matrices, after "gradient_", "update_", "weight_" or "momentum_": "spectral_norm",
    "rms_to_rms_norm", "stable_rank", "effective_rank", "top_energy", "orthogonality_error". They are
    functions of `linalg`. For a leaf with several matrices the mean is taken.

    Numbers below 1e-19 or above 1e19 are not measured correctly, because their squares are out of the range
    of float32. If all weights of a leaf are zero, "update_to_weight" is infinite. Integer leaves are left
    out. The metrics of a leaf without a gradient are NaN.

    Args:
      inner: any transformation, of this library or of optax.
      metrics: names of metrics. The default is all metrics of any leaf.
      every: k, an integer of at least 1. The first step is measured.
      axes: how leaves read as matrices, as in `muon`.
      exact: whether to compute spectral and RMS to RMS norms by a singular value decomposition. By default
        they come from powers of the Gram matrix, and are at most 0.4 % too small.

    Raises:
      ValueError: an unknown metric, or `every` below 1; at `init`, two leaves with the same path, or with
        metrics of matrices a leaf that no rule decides; at `update`, with metrics of weights, params missing.
    """
    metrics = tuple(one_or_several(metrics))
    check_flags("probe", exact=exact)
    _check(metrics, every)
    inner = wrapped("probe", inner)
    of_matrices = [name for name in metrics if name not in OF_LEAVES]
    resolve = resolve_leaves("probe", axes)

    def names_of(
        params: PyTree, state: PyTree, gradients: PyTree = None
    ) -> tuple[tuple[str, ...], dict[str, Axes | None]]:
        """Every path with every metric that its leaf has; path → how the leaf reads as matrices.

        With gradients, Python numbers need one.
        """
        trained = by_path(gradients)
        moments, paths = _momenta(state, params), distinct_paths("probe", params)
        known = Leaves(jax.tree.structure(params), jax.tree.leaves(params))
        read = resolved_axes("probe", resolve, None, known) if of_matrices else [None] * len(paths)
        forms = dict(zip(paths, read, strict=True))
        names = tuple(
            f"{path}/{name}".lstrip("/")
            for name in metrics
            for path, leaf in zip(paths, jax.tree.leaves(params), strict=True)
            if is_trainable(leaf)
            and (gradients is None or hasattr(leaf, "dtype") or path in trained)
            and 0 not in np.shape(leaf)
            and (path in moments or name.split("_")[0] not in ("cosine", "momentum"))
            and (name in OF_LEAVES or forms[path] is not None)
        )
        return names, forms

    def measure(
        names: tuple[str, ...], leaves: dict[str, Leaf], forms: dict[str, Axes | None]
    ) -> tuple[jax.Array, jax.Array]:
        """All numbers, and which of them were measured: those of leaves with a gradient."""
        wanted = [(path, metric) for path, _, metric in (name.rpartition("/") for name in names)]
        there = [(path, name) for path, name in wanted if path in leaves]
        found = {(path, name): OF_LEAVES[name](leaves[path]) for path, name in there if name in OF_LEAVES}
        found |= _of_matrices([pair for pair in there if pair not in found], leaves, forms, exact)
        values = [jnp.asarray(found.get(pair, 0.0), jnp.float32) for pair in wanted]
        return jnp.stack(values), jnp.asarray([pair in found for pair in wanted])

    def init(params):
        state = inner.init(params)
        names, _ = names_of(params, state)
        if jax.tree.leaves(params):
            _warn_unmeasured(metrics, names)
        values, measured = jnp.zeros(len(names), jnp.float32), jnp.zeros(len(names), bool)
        return ProbeState(state, jnp.zeros([], jnp.int32), values, measured, _as_bytes(names))

    def update(updates, state, params=None, **extra):
        if any(name.startswith("weight") or name == "update_to_weight" for name in metrics):
            check_params("probe", params, "it is asked for numbers about weights")
        state = as_made(init, checked_state("probe", state, ProbeState), params)
        out, after = inner.update(updates, state.inner, params, **extra)
        names, forms = names_of(updates if params is None else params, state.inner, updates)
        if len(names) != state.values.shape[-1]:
            check_params("probe", params, "without them it cannot tell which gradients are missing")
        values, measured = state.values.astype(jnp.float32), state.measured.astype(bool)
        if names:
            due = state.probe_count % every == 0
            values, measured = cond(
                due,
                lambda: measure(names, _leaves(updates, out, params, after), forms),
                lambda: (values, measured),
            )
        names = state.names.astype(jnp.uint8)
        return out, ProbeState(after, increment(state.probe_count), values, measured, names)

    return optax.GradientTransformationExtraArgs(init, update)


def read(state: PyTree) -> dict[str, Any]:
    """Return the values that a state reports as a flat dictionary, for any logger.

    The keys are `path/metric` for every probe, `learning_rate` and `weight_decay`, `clip_norm` and
    `clip_factor`, `skipped` and `consecutive_skips`, and the names of injected hyperparameters. In a
    partition the name of the part comes first, as in `matrix/learning_rate`. The values are Python numbers.
    If the state has further axes, as after `jax.vmap`, they are NumPy arrays. If several parts report a key,
    as in `chain(adamw(1e-3), sgd(0.1))`, the last decides. A state that reports nothing, such as optax's,
    gives an empty dictionary.

    Raises:
      ValueError: a state that is traced, or has no arrays.
    """
    for x in jax.tree.leaves(state):
        if isinstance(x, Tracer):
            raise ValueError(
                "read: the state is traced by jax. Type the state that the compiled function returned."
            )
        if isinstance(x, jax.ShapeDtypeStruct) or not is_array(x):
            what = "shapes" if is_array(x) else shown(x)
            raise ValueError(
                f"read: the state has {what} and no arrays. "
                "Type the state that tx.init or tx.update returned."
            )
    found: dict[str, Any] = {}
    for path, node in jax.tree_util.tree_leaves_with_path(state, is_leaf=_speaks):
        if _speaks(node):
            part = "".join(f"{key.key}/" for key in path if isinstance(key, jax.tree_util.DictKey))
            inside = read(getattr(node, "inner", getattr(node, "inner_state", ())))
            found |= {part + name: value for name, value in (inside | _said(node)).items()}
    return found


def _said(node: Any) -> dict[str, Any]:
    """What one state says for itself."""
    if isinstance(node, ProbeState):
        values = np.where(np.asarray(node.values) == INFINITE, np.float32(np.inf), node.values)
        values = np.where(node.measured, values, np.float32(np.nan))
        return dict(zip(_as_names(node.names), map(_plain, np.moveaxis(values, -1, 0)), strict=True))
    if hasattr(node, "hyperparams"):
        return {name: _plain(value) for name, value in node.hyperparams.items()}
    return {role.reading: _plain(getattr(node, field)) for field, role in _readings(node).items()}


def _readings(node: Any) -> dict[str, Role]:
    return {field: role for field, role in getattr(node, "roles", {}).items() if role.reading}


def _speaks(node: Any) -> bool:
    return isinstance(node, ProbeState) or hasattr(node, "hyperparams") or bool(_readings(node))


def _as_bytes(names: Sequence[str]) -> jax.Array:
    return jnp.asarray(np.frombuffer("\n".join(names).encode(), np.uint8))


def _as_names(names: Any) -> list[str]:
    names = np.asarray(names, np.uint8)  # JSON has one type of integer
    while names.ndim > 1:  # of vmap
        names = names[0]
    return names.tobytes().decode().split("\n") if names.size else []


def _plain(x: Any) -> Any:
    array = np.asarray(x)
    return array.item() if array.ndim == 0 else array


def _of_matrices(
    pairs: list[tuple[str, str]],
    leaves: dict[str, Leaf],
    forms: dict[str, Any],
    exact: bool,
) -> dict[tuple[str, str], jax.Array]:
    """The metrics of matrices; those of one shape are one stack, and each is decomposed once."""
    found = {}
    for of in Leaf._fields:
        mine = [(path, name.removeprefix(of + "_")) for path, name in pairs if name.startswith(of + "_")]
        names = list(dict.fromkeys(name for _, name in mine))
        paths = list(dict.fromkeys(path for path, _ in mine))
        arrays = [undivided(upcast(getattr(leaves[path], of))) for path in paths]
        stacks = [forms[path].matrices(x) for path, x in zip(paths, arrays, strict=True)]
        numbers = iter(
            map_by_shape(
                functools.partial(_numbers, names=names, exact=exact),
                [x for each in stacks for x in each],
                transpose=False,
            )
        )
        for path, each in zip(paths, stacks, strict=True):
            rows = [next(numbers).reshape(-1, len(names)) for _ in each]
            means = jnp.mean(jnp.concatenate(rows), axis=0)
            found |= {(path, f"{of}_{name}"): means[k] for k, name in enumerate(names)}
    return found


def _numbers(stack: jax.Array, names: list[str], exact: bool) -> jax.Array:
    """`(batch, len(names))` of a stack `(batch, inputs, outputs)`."""
    by_gram = ("spectral_norm", "rms_to_rms_norm", "stable_rank")
    decomposed = linalg.spectrum(stack) if exact or not set(names) <= set(by_gram) else stack
    return jnp.stack([OF_MATRICES[name](decomposed) for name in names], axis=-1)


def _leaves(updates: PyTree, out: PyTree, params: PyTree, state: PyTree) -> dict[str, Leaf]:
    gradients, steps, weights = map(by_path, (updates, out, params))
    moments = _momenta(state, updates)
    return {
        path: Leaf(g, steps[path], weights.get(path), moments.get(path))
        for path, g in gradients.items()
        if path in steps and not is_missing(g)
    }


def _momenta(state: PyTree, tree: PyTree) -> dict[str, Any]:
    """The first moment or velocity of every leaf that has one of its own shape, by the leaf's path."""
    found: dict[str, Any] = {}
    shapes = {path: np.shape(leaf) for path, leaf in by_path(tree).items()}
    for kind, moment in moments_of(state):
        if kind == FIRST:
            own = {path: m for path, m in by_path(moment).items() if np.shape(m) == shapes.get(path)}
            found = own | found
    return found


def _warn_unmeasured(metrics: Sequence[str], names: Sequence[str]) -> None:
    measured = {name.rpartition("/")[-1] for name in names}
    for metric in metrics:
        if metric not in measured and (metric not in CHEAP or not measured):
            needs = "a first moment or velocity" if metric.startswith(("cosine", "momentum")) else "a matrix"
            warn(f"probe: no leaf has {metric!r}, which needs {needs}. Leave it out.", stacklevel=3)


def _check(metrics: Sequence[str], every: int) -> None:
    known = [*OF_LEAVES, *(f"{of}_{name}" for of in Leaf._fields for name in OF_MATRICES)]
    if unknown := [name for name in metrics if name not in known]:
        raise ValueError(f"probe: {unknown[0]!r} is not a metric. Type some of {', '.join(known)}.")
    check_integer("probe", "every", every, 25, below=2**31)


__all__ = ["CHEAP", "SPECTRAL", "ProbeState", "probe", "read"]
__dir__ = __all__.copy  # dir() shows the public names alone
