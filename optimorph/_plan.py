"""What an optimizer does with every parameter, before any step is taken."""

import collections
import dataclasses
import difflib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh

from optimorph._carry.slots import stacked_leaves
from optimorph._core.checks import check_transforms, not_an_array
from optimorph._core.moments import nodes_with
from optimorph._core.numbers import is_array, made_once
from optimorph._core.paths import distinct_paths
from optimorph._core.rule import handed_down
from optimorph._core.shown import shown
from optimorph._core.types import PyTree, Shape
from optimorph._core.warn import quietly, warn
from optimorph._distributed.mesh_plan import MeshPlan, plan_mesh
from optimorph._recipes.muon import muon
from optimorph._recipes.route_matrices import MATRIX, OTHER, Routes
from optimorph._routing.by_siblings import by_siblings
from optimorph._routing.default_roles import INTEGER
from optimorph._routing.grouping import glob_of, group_by, table, without_numbers
from optimorph._routing.leaf_spec import LeafSpec
from optimorph._routing.questions import questions
from optimorph._routing.readings import Readings
from optimorph._routing.resolve import resolve_trained
from optimorph._transforms.matrices import SCALES
from optimorph.linalg import Axes


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """What an optimizer does with one leaf.

    Args:
      path: the leaf's keys, joined by slashes.
      shape: the leaf's shape.
      dtype: the leaf's dtype.
      role: the kind of leaf that the default rules found, such as "embedding", or the user's rule that
        decides.
      spec: how the leaf reads as matrices; None if it is not a matrix.
      matrices: (number of matrices, inputs, outputs), for each size of matrix in the leaf.
      transform: the transformation that updates the leaf: "muon", "adamw" or "others"; the label of
        `partition`; "optimizer" if all leaves have the same; "none" for integers; "?" if the leaf is
        unresolved.
      scales: the factor from `scale_by_shape` for each size in `matrices`; empty if it is not known, as for a
        chain of your own.
      state_bytes: the bytes of the leaf's optimizer state, without counts and other scalars.
      unresolved: why the optimizer would refuse the leaf, and what to type; None if it is resolved.
      answers: possible values of `axes` for an unresolved leaf, the likeliest first.
    """

    path: str
    shape: Shape
    dtype: jnp.dtype
    role: str
    spec: str | None
    matrices: tuple[tuple[int, int, int], ...]
    transform: str
    scales: tuple[float, ...]
    state_bytes: int
    unresolved: str | None = None
    answers: tuple[str | None, ...] = ()

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an optimizer does with every leaf; `print` shows it as a table.

    Args:
      rows: one row for each leaf, in the order of the tree.
      unused: the rules of all transformations that decide for no leaf: no leaf matches them, or they are
        behind "*".
      learning_rates: transformation → its learning rate at the first step, if different leaves have different
        transformations.
      over_mesh: how matrices are divided over a mesh, if one was given.
    """

    rows: tuple[PlanRow, ...]
    unused: tuple[str, ...] = ()
    learning_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    over_mesh: MeshPlan | None = None

    def __iter__(self) -> Iterator[PlanRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, path: str | SupportsIndex) -> PlanRow:
        """The row of a leaf, by its path or its number."""
        if not isinstance(path, str):
            return self.rows[path]
        for row in self.rows:
            if row.path == path:
                return row
        similar = difflib.get_close_matches(path, [row.path for row in self.rows])
        raise KeyError(f"no leaf has the path {path!r}. Similar paths: {similar}")

    def __str__(self) -> str:
        """The table. Leaves that differ only in the numbers of their paths share a line."""
        lines = table(_TITLES, [_cells(rows) for rows in group_by(self.rows, _line)])
        lines += ["", *table(*_totals(self.rows, self.learning_rates))]
        lines += [] if self.over_mesh is None else ["", str(self.over_mesh)]
        lines += [f"\nThe rule {pattern!r} decides for no leaf." for pattern in self.unused]
        asked = {row.path: (row.unresolved, row.answers) for row in self.rows if row.unresolved is not None}
        lines += [f"\n{text}" for text in questions(asked, [row.path for row in self.rows])]
        return "\n".join(lines)


def plan(
    params: PyTree,
    optimizer: optax.GradientTransformation | None = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    **arguments: Any,
) -> Plan:
    """Show what an optimizer will do with every parameter, before the first step.

        print(optimorph.plan(jax.eval_shape(init, key)))                    # for Muon
        print(optimorph.plan(params, optimorph.adamw(1e-3, state="int8")))  # for any optimizer

    Args:
      params: a tree of arrays or of `jax.ShapeDtypeStruct`. Nothing is computed.
      optimizer: any transformation. The default is `muon` with `arguments`.
      mesh: if given, the plan of an optimizer of matrices also says what each device of this mesh computes
        and sends. The shardings are those of the optimizer's `shardings`, or else those of the leaves. A leaf
        without a sharding is replicated. The numbers are those of polar factors. For `soap`, `klsoap` and
        `shampoo` they only show how evenly matrices are distributed.
      arguments: arguments of `muon`. The plan depends on `axes`, `scale`, `others`, `state` and `mu_dtype`,
        and with a mesh on `shardings`, `orthogonalizer` and `divide`.

    Raises:
      ValueError: shardings that do not fit the mesh, a spec in place of rules for `axes`, a leaf that is not
        an array, or `arguments` together with an optimizer. An ambiguous leaf or a spec that does not fit
        raises no error; its row is `unresolved`.
    """
    if optimizer is not None and arguments:
        raise ValueError(
            f"plan: {', '.join(arguments)}: these arguments are for muon, but an optimizer was given. Pass "
            "them to the function that makes the optimizer."
        )
    if optimizer is not None:
        check_transforms("plan", optimizer)
    if mesh is not None and not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(f"plan: mesh must be a jax.sharding.Mesh or AbstractMesh, but is {shown(mesh)}.")
    paths, leaves = distinct_paths("plan", params), jax.tree.leaves(params)
    shapes = [_shape(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
    rated = optimizer is not None or "learning_rate" in arguments
    if optimizer is None:
        muon_arguments: dict[str, Any] = {"learning_rate": 0.0} | arguments
        optimizer = muon(**muon_arguments)
    state, readings = _state(optimizer, params, paths, shapes)
    specs = _specs(readings, paths, shapes)
    state_bytes = _state_bytes(state, _places(params, paths), readings.stacked)

    def row(path: str, leaf: jax.ShapeDtypeStruct, spec: LeafSpec) -> PlanRow:
        matrices = _matrices(spec.axes, leaf.shape)
        sizes = [size for _, *size in matrices if 0 not in size]
        routes = _routes(readings, path)
        scale = SCALES[routes.scale] if isinstance(routes.scale, str) else routes.scale
        return PlanRow(
            path=path,
            shape=leaf.shape,
            dtype=leaf.dtype,
            role=spec.role,
            spec=None if spec.axes is None else spec.axes.spec,
            matrices=matrices,
            transform=_transform(routes, spec),
            scales=() if scale is None else tuple(scale(*size) for size in sizes),
            state_bytes=0 if spec.unresolved is not None else state_bytes[path],
            unresolved=spec.question(path),
            answers=() if spec.unresolved is None else spec.answers,
        )

    rows = tuple(map(row, paths, shapes, specs))
    routed = getattr(optimizer, "routes", None)
    rates = _learning_rates(optimizer, params, routed) if rated and routed is not None else {}
    over_mesh = None
    if mesh is not None and not readings.routes:
        warn(
            "plan: mesh is for optimizers of matrices, and this one works element by element. Leave it "
            "out, or type plan(params, optimorph.muon(0.02), mesh=mesh).",
            stacklevel=2,
        )
    elif mesh is not None:
        first, forms = readings.routes[0], [spec.axes for spec in specs]
        over_mesh = plan_mesh(mesh, first.match, first.polar, first.divide, paths, leaves, forms)
    return Plan(rows, tuple(dict.fromkeys(readings.unused)), rates, over_mesh)


def _specs(
    readings: Readings, paths: Sequence[str], shapes: Sequence[jax.ShapeDtypeStruct]
) -> list[LeafSpec]:
    """How the optimizer reads leaves; those that no optimizer routes have their roles alone."""
    known = {path: spec for path, (_, spec) in readings.routed.items()} | readings.unresolved
    if {*paths} <= {*known}:
        return [known[path] for path in paths]
    others = dict(zip(paths, resolve_trained(_roles, paths, shapes, LeafSpec(None, INTEGER)), strict=True))
    return [known.get(path, others[path]) for path in paths]


def _roles(paths: Sequence[str], shapes: Sequence[Shape]) -> list[LeafSpec]:
    """How leaves read of an optimizer that does not route: their roles alone."""
    return [LeafSpec(None, spec.role) for spec in by_siblings(paths, shapes)]


@functools.lru_cache(maxsize=1 << 10)
def _matrices(axes: Axes | None, shape: Shape) -> tuple[tuple[int, int, int], ...]:
    counts = collections.Counter()
    for *batch, inputs, outputs in () if axes is None else axes.stacks(shape):
        counts[inputs, outputs] += math.prod(batch)
    return tuple((count, *size) for size, count in counts.items())


def _shape(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
    if not is_array(leaf):
        raise ValueError(not_an_array("plan", path, leaf))
    has_dtype = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype if has_dtype else jnp.result_type(leaf))


def _routes(readings: Readings, path: str) -> Routes:
    """Those of the optimizer that routes a leaf; of another leaf only the name of its transformation."""
    if path in readings.routed:
        return readings.routes[readings.routed[path][0]]
    name = str(readings.labels.get(path, "optimizer"))
    return Routes(lambda paths, shapes: [], (name, name))


def _transform(routes: Routes, spec: LeafSpec) -> str:
    if spec.unresolved is not None:
        return "?"
    return "none" if spec.role == INTEGER else routes.names[spec.axes is None]


def _places(params: PyTree, paths: list[str]) -> PyTree:
    """A tree like the parameters with the paths of the leaves, in which every leaf has a key."""
    return jax.tree.structure({"": 0} if paths == [""] else params).unflatten(paths)


def _state(
    optimizer: optax.GradientTransformation, params: PyTree, paths: list[str], shapes: list[Any]
) -> tuple[PyTree, Readings]:
    """The shapes of the state that `init` makes, and how it reads the leaves."""
    tree, readings = jax.tree.structure(_places(params, paths)), Readings()
    kinds = {(x.shape, x.dtype): k for k, x in enumerate(shapes)}  # leaves of one kind are one array

    def init(each):
        found = dict(zip(kinds, each, strict=True))
        return optimizer.init(tree.unflatten(found[x.shape, x.dtype] for x in shapes))

    with quietly(), handed_down(readings=readings), made_once():  # the plan reports unused rules
        return jax.eval_shape(init, [shapes[k] for k in kinds.values()]), readings


def _state_bytes(state: PyTree, places: PyTree, stacked: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Path → bytes of the state's arrays that belong to the leaf. Scalars such as counts belong to no leaf.

    Of an array with the matrices of several leaves, each leaf has the bytes of its own.
    """
    path_of = dict(jax.tree_util.tree_leaves_with_path(places))
    found = dict.fromkeys(path_of.values(), 0)
    for node in nodes_with(state, "stacked"):
        by_size = collections.defaultdict(dict)
        for path in filter(stacked.get, stacked_leaves(node) or stacked):
            for size, count in stacked[path].items():
                by_size[size][path] = count
        for place, x in jax.tree_util.tree_leaves_with_path(node):
            counts = by_size.get(getattr(place[-1], "key", None), {})
            total = sum(counts.values())
            for path, count in counts.items():
                found[path] += _nbytes(x) * count // total
    for place, x in jax.tree_util.tree_leaves_with_path(state):
        ends = (place[k:] for k in range(len(place)))  # it is in a tree like the parameters
        if (end := next((end for end in ends if end in path_of), None)) is not None:
            found[path_of[end]] += _nbytes(x)
    return found


def _nbytes(x: jax.ShapeDtypeStruct) -> int:
    return x.size * x.dtype.itemsize


def _learning_rates(
    optimizer: optax.GradientTransformation, params: PyTree, routes: Routes
) -> dict[str, float]:
    with quietly():  # there is no matrix
        parts = optimizer.init(jax.tree.map(lambda _: None, params)).inner_states  # pyright: ignore[reportAttributeAccessIssue]
    found = {}
    for name, part in zip(routes.names, (MATRIX, OTHER), strict=True):
        rates = [rate for _, rate in optax.tree.get_all_with_path(parts[part], "last_learning_rate")]
        if len(rates) == 1 and not isinstance(rates[0], Tracer):
            found[name] = float(rates[0])
    return found


_TITLES = ("path", "leaves", "shape", "dtype", "role", "spec", "matrices", "to", "scale", "state")
_TOTALS = ("to", "leaves", "matrices", "parameters", "state")


def _line(row: PlanRow) -> tuple[Any, ...]:
    """A key that is equal for rows that share a line of the table."""
    fields = (row.shape, row.dtype, row.role, row.spec, row.transform, row.state_bytes)
    return without_numbers(row.path), *fields


def _cells(rows: list[PlanRow]) -> tuple[str, ...]:
    first = rows[0]
    return (
        glob_of(row.path for row in rows),
        str(len(rows)),
        " x ".join(map(str, first.shape)) or "scalar",
        first.dtype.name,
        first.role,
        first.spec or ("-" if first.unresolved is None else "?"),
        " + ".join(f"{len(rows) * n} of {i} x {o}" for n, i, o in first.matrices) or "-",
        first.transform,
        ", ".join(f"{scale:.3g}" for scale in first.scales) or "-",
        _bytes(sum(row.state_bytes for row in rows)),
    )


def _totals(
    rows: Iterable[PlanRow], rates: Mapping[str, float]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    groups = {group[0].transform: group for group in group_by(rows, lambda row: row.transform)}
    groups["all"] = list(rows)
    cells = [
        (
            name,
            f"{len(group):,}",
            f"{sum(n for row in group for n, _, _ in row.matrices):,}",
            f"{sum(row.size for row in group):,}",
            _bytes(sum(row.state_bytes for row in group)),
            *([f"{rates[name]:.3g}" if name in rates else "-"] if rates else []),
        )
        for name, group in groups.items()
    ]
    return (*_TOTALS, *(["learning_rate, step 0"] if rates else [])), cells


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
