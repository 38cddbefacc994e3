"""What `muon` makes of every parameter, before a step is taken."""

import collections
import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph.core.checks import is_array, kind, not_an_array
from optimorph.core.tree import distinct_paths
from optimorph.core.types import PyTree, Shape
from optimorph.linalg import Axes
from optimorph.muon import muon
from optimorph.routing.alike import apart_from_numbers, listed, starred
from optimorph.routing.reading import Reading, reader
from optimorph.routing.rules import unused
from optimorph.storage.choice import by_default
from optimorph.storage.moments import FIRST
from optimorph.transforms.scale_by_shape import SCALES


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
      transform: "muon", "adamw" or "others"; "none" of integers; "?" as long as nothing is decided.
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


def plan(params: PyTree, **arguments: Any) -> Plan:
    """What `muon`, called with the same arguments, makes of every parameter.

        print(optimorph.plan(jax.eval_shape(init, key)))

    Args:
      params: any tree of arrays, or of their shapes: nothing is computed.
      arguments: those of `muon`; `axes`, `scale`, `others`, `state` and `mu_dtype` make a difference.

    Raises:
      ValueError: axes that are no rules, a leaf that is no array. A leaf that nobody described, or whose spec
        does not fit, is a row with a question, where `muon` would refuse the tree.
    """
    given = inspect.signature(muon).bind(**{"learning_rate": 0.0} | arguments)
    given.apply_defaults()
    axes, scale, others, state = (given.arguments[name] for name in ("axes", "scale", "others", "state"))
    read, paths, leaves = reader("plan", axes), distinct_paths("plan", params), jax.tree.leaves(params)
    shapes = [_shape(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]
    readings = [
        read(path, leaf.shape) if kind(leaf) != "integer" else Reading(None, "integer")
        for path, leaf in zip(paths, shapes, strict=True)
    ]
    decided = {path: reading.axes for path, reading in zip(paths, readings, strict=True)}
    given.arguments["axes"] = lambda path, _: decided[path]
    optimizer = muon(*given.args, **given.kwargs)

    def same(path: str, form: Axes | None, leaf: jax.ShapeDtypeStruct) -> Any:
        """One leaf tells what a number's state takes in those alike, unless rules may tell them apart."""
        if (form is None and others is not None) or not (state is None or isinstance(state, str)):
            return path
        codec = None if state is None else (leaf.shape, by_default(FIRST, path, leaf.shape))
        return leaf.dtype, form is None, leaf.size > 0, codec

    alike = [same(path, decided[path], leaf) for path, leaf in zip(paths, shapes, strict=True)]
    first = dict(zip(alike, zip(paths, shapes, strict=True), strict=True))
    held = _state_bytes(optimizer, dict(first.values()))

    def state_bytes(same: Any, leaf: jax.ShapeDtypeStruct) -> int:
        path, known = first[same]
        return held[path] * leaf.size // max(1, known.size)

    def row(path: str, leaf: jax.ShapeDtypeStruct, reading: Reading, same: Any) -> PlanRow:
        form, matrices = reading.axes, _matrices(reading.axes, leaf.shape)
        return PlanRow(
            path=path,
            shape=leaf.shape,
            dtype=leaf.dtype,
            role=reading.role,
            spec=None if form is None else form.spec,
            matrices=matrices,
            transform="none" if kind(leaf) == "integer" else _transform(reading, others),
            scales=tuple(
                1.0 if scale is None else SCALES[scale](*size) for _, *size in matrices if 0 not in size
            ),
            state_bytes=0 if reading.question is not None else state_bytes(same, leaf),
            question=reading.question,
        )

    rows = tuple(row(*each) for each in zip(paths, shapes, readings, alike, strict=True))
    return Plan(rows, tuple(unused(axes, paths)) if axes is not None else ())


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


def _transform(reading: Reading, others: optax.GradientTransformation | None) -> str:
    if reading.question is not None:
        return "?"
    if reading.axes is not None:
        return "muon"
    return "adamw" if others is None else "others"


def _state_bytes(optimizer: optax.GradientTransformation, params: Mapping[str, Any]) -> dict[str, int]:
    """Path → bytes of the state that carries the path on its own; counts and the like belong to none."""
    state = jax.eval_shape(optimizer.init, params)
    held = dict.fromkeys(params, 0)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        last = path[-1]
        if isinstance(last, jax.tree_util.DictKey) and last.key in held:
            held[last.key] += leaf.size * leaf.dtype.itemsize
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
