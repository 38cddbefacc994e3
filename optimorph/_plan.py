"""What an optimizer makes of every parameter, before a step is taken."""

import collections
import dataclasses
import difflib
import functools
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._core.checks import not_an_array
from optimorph._core.numbers import is_array, kind
from optimorph._core.paths import distinct_paths
from optimorph._core.types import PyTree, Shape
from optimorph._recipes.muon import muon
from optimorph._recipes.route_matrices import Routes
from optimorph._routing.alike import apart_from_numbers, listed, starred
from optimorph._routing.names import by_name
from optimorph._routing.reading import Reading
from optimorph._routing.rules import unused
from optimorph._transforms.matrices import SCALES
from optimorph.linalg import Axes


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One leaf.

    Args:
      path: its keys, joined by slashes.
      shape: its sizes.
      dtype: its numbers.
      role: what the default rules take it for, or the rule that decides.
      spec: how it reads as matrices, None if it does not.
      matrices: (how many, inputs, outputs), for each size that it holds.
      transform: "muon", "adamw" or "others", or "optimizer"; "none" of integers; "?" if it is undecided.
      scales: of the update of each size, by its shape.
      state_bytes: what its optimizer state takes, counts and the like aside.
      question: what must be decided, if anything.
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
    question: str | None = None

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every leaf becomes; `print` shows it as a table.

    Args:
      rows: one for each leaf, in the tree's order.
      unused: rules that no leaf matches.
    """

    rows: tuple[PlanRow, ...]
    unused: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[PlanRow]:
        """The rows, leaf by leaf."""
        return iter(self.rows)

    def __len__(self) -> int:
        """How many leaves there are."""
        return len(self.rows)

    def __getitem__(self, path: str) -> PlanRow:
        """The row of one leaf."""
        found = next((row for row in self.rows if row.path == path), None)
        if found is None:
            close = difflib.get_close_matches(path, [row.path for row in self.rows])
            raise KeyError(f"no leaf is called {path!r}; close to it: {close}")
        return found

    def __str__(self) -> str:
        """The table: leaves that differ in an index only share a line."""
        lines = _aligned(_TITLES, [_cells(rows) for rows in _alike(self.rows)])
        lines += ["", *_aligned(_TOTALS, _totals(self.rows))]
        lines += [f"\nNo leaf matches the rule {pattern!r}." for pattern in self.unused]
        asked = [(row.path, row.question) for row in self.rows if row.question is not None]
        lines += [f"\n{text}" for text in listed(asked, [row.path for row in self.rows])]
        return "\n".join(lines)


def plan(params: PyTree, optimizer: optax.GradientTransformation | None = None, **arguments: Any) -> Plan:
    """What an optimizer makes of every parameter.

        print(optimorph.plan(jax.eval_shape(init, key)))                    # of muon
        print(optimorph.plan(params, optimorph.adamw(1e-3, state="int8")))  # of any optimizer

    Args:
      params: any tree of arrays, or of their shapes: nothing is computed.
      optimizer: any transformation; without one, `muon` with these arguments.
      arguments: of `muon`; `axes`, `scale`, `others`, `state` and `mu_dtype` make a difference.

    Raises:
      ValueError: axes that are no rules, a leaf that is no array, arguments beside an optimizer. A leaf that
        nobody described, or whose spec does not fit, is a row with a question, where `muon` would refuse the
        tree.
    """
    if optimizer is not None and arguments:
        raise ValueError(f"plan: {[*arguments]} are arguments of muon. Give them to the optimizer instead.")
    paths, leaves = distinct_paths("plan", params), jax.tree.leaves(params)
    shapes = [_shape(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
    if optimizer is None:
        given: dict[str, Any] = {"learning_rate": 0.0} | arguments
        optimizer = muon(**given)
    routes = getattr(optimizer, "routes", None)
    readings = [_reading(routes, path, leaf) for path, leaf in zip(paths, shapes, strict=True)]
    held = _state_bytes(optimizer, paths, shapes, readings)

    def row(path: str, leaf: jax.ShapeDtypeStruct, reading: Reading) -> PlanRow:
        matrices = _matrices(reading.axes, leaf.shape)
        scale = None if routes is None else routes.scale
        return PlanRow(
            path=path,
            shape=leaf.shape,
            dtype=leaf.dtype,
            role=reading.role,
            spec=None if reading.axes is None else reading.axes.spec,
            matrices=matrices,
            transform=_transform(routes, reading),
            scales=tuple(
                1.0 if scale is None else SCALES[scale](*size) for _, *size in matrices if 0 not in size
            ),
            state_bytes=held.get(path, 0),
            question=reading.question,
        )

    rows = tuple(row(*each) for each in zip(paths, shapes, readings, strict=True))
    rules = None if routes is None else routes.rules
    return Plan(rows, tuple(unused(rules, paths)) if rules is not None else ())


def _reading(routes: Routes | None, path: str, leaf: jax.ShapeDtypeStruct) -> Reading:
    if kind(leaf) == "integer":
        return Reading(None, "integer")
    return Reading(None, by_name(path, leaf.shape)[0]) if routes is None else routes.read(path, leaf.shape)


@functools.lru_cache(maxsize=1 << 10)
def _matrices(axes: Axes | None, shape: Shape) -> tuple[tuple[int, int, int], ...]:
    """(how many, inputs, outputs), for each size of a leaf's matrices."""
    sizes = collections.Counter()
    for *batch, inputs, outputs in () if axes is None else axes.stacks(shape):
        sizes[inputs, outputs] += math.prod(batch)
    return tuple((count, *size) for size, count in sizes.items())


def _shape(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
    if not is_array(leaf):
        raise ValueError(not_an_array("plan", path, leaf))
    known = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype if known else jnp.result_type(leaf))


def _transform(routes: Routes | None, reading: Reading) -> str:
    if reading.question is not None:
        return "?"
    if reading.role == "integer":
        return "none"
    return "optimizer" if routes is None else routes.names[reading.axes is None]


def _state_bytes(
    optimizer: optax.GradientTransformation,
    paths: list[str],
    shapes: list[jax.ShapeDtypeStruct],
    readings: list[Reading],
) -> dict[str, int]:
    """Path → bytes of the arrays of the state that belong to the leaf, whatever their shape.

    Leaves that nobody decided are left out: the optimizer would refuse them. Scalars belong to no leaf.
    """
    decided = {p: s for p, s, r in zip(paths, shapes, readings, strict=True) if r.question is None}
    held = dict.fromkeys(decided, 0)
    with warnings.catch_warnings(action="ignore"):  # the plan reports rules that match nothing
        state = jax.eval_shape(optimizer.init, decided)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if own := [key for key in keys if key in held]:
            held[own[-1]] += leaf.size * leaf.dtype.itemsize
    return held


_TITLES = ("path", "leaves", "shape", "dtype", "role", "spec", "matrices", "to", "scale", "state")
_TOTALS = ("to", "leaves", "matrices", "parameters", "state")


def _alike(rows: Iterable[PlanRow]) -> Iterable[list[PlanRow]]:
    """Rows that differ in the numbers of their paths only."""
    groups: dict[Any, list[PlanRow]] = {}
    for row in rows:
        same = (
            apart_from_numbers(row.path),
            row.shape,
            row.dtype,
            row.role,
            row.spec,
            row.transform,
            row.state_bytes,
        )
        groups.setdefault(same, []).append(row)
    return groups.values()


def _cells(rows: list[PlanRow]) -> tuple[str, ...]:
    first = rows[0]
    return (
        starred(row.path for row in rows),
        str(len(rows)),
        " x ".join(map(str, first.shape)) or "scalar",
        first.dtype.name,
        first.role,
        first.spec or ("-" if first.question is None else "?"),
        " + ".join(f"{len(rows) * n} of {i} x {o}" for n, i, o in first.matrices) or "-",
        first.transform,
        ", ".join(f"{scale:.3g}" for scale in first.scales) or "-",
        _bytes(sum(row.state_bytes for row in rows)),
    )


def _totals(rows: Iterable[PlanRow]) -> list[tuple[str, ...]]:
    groups: dict[str, list[PlanRow]] = {}
    for row in rows:
        groups.setdefault(row.transform, []).append(row)
        groups.setdefault("all", []).append(row)
    groups["all"] = groups.pop("all", [])  # last
    return [
        (
            name,
            f"{len(group):,}",
            f"{sum(n for row in group for n, _, _ in row.matrices):,}",
            f"{sum(row.size for row in group):,}",
            _bytes(sum(row.state_bytes for row in group)),
        )
        for name, group in groups.items()
    ]


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def _aligned(titles: tuple[str, ...], cells: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    lines = [titles, tuple("-" * width for width in widths), *cells]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
