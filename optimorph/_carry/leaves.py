"""What `carry_state` is told of leaves: their new names, which begin anew, where the old part is, devices."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from optimorph._carry.slots import HYPERPARAMETER, Slot
from optimorph._core.checks import check_flags, check_function
from optimorph._core.paths import by_path, leaf_paths
from optimorph._core.rule import arrays
from optimorph._core.shown import shown
from optimorph._core.types import Mask, PyTree, Shape
from optimorph._distributed.stacks import of_owners
from optimorph._routing.rules import check_mask, first_match, masked_leaves, warn_unused
from optimorph._storage.encoding import beside
from optimorph._storage.stored import Stored

WHO = "carry_state"

Renamed = Mapping[str, str | None] | Callable[[str], str | None]

Place = Callable[[str, Shape], Any]
"""Path, and the shape of the old part → where it is in the new leaf, as an index; None if it is nowhere."""


def leaves_of(slot: Slot) -> tuple[str, ...]:
    """The paths of the leaves to which an array of a state belongs; none of a count's."""
    return slot.leaves or ((slot.path,) if slot.path and slot.kind != HYPERPARAMETER else ())


def with_names(slot: Slot, name: Callable[[str], str | None]) -> Slot | None:
    """An array of the state under the new paths of its leaves; None if it is to be dropped."""
    new = [path for path in map(name, leaves_of(slot)) if path is not None]
    if slot.leaves:
        return slot._replace(leaves=tuple(new))
    return slot._replace(path=new[0]) if new else None if leaves_of(slot) else slot


def that_fit(slot: Slot, params: PyTree) -> tuple[str, ...]:
    """The leaves of a stack that may have matrices of its size, "nxm"; those that are gone may too."""
    rows, columns = map(int, slot.path.split("/")[-1].split("x"))
    sizes = {path: np.size(x) for path, x in by_path(params).items()}
    return tuple(path for path in slot.leaves if sizes.get(path, 0) % (rows * columns) == 0)


def new_names(renamed: Renamed | None, paths: list[str]) -> Callable[[str], str | None]:
    """Path in the state → path in the parameters; None for what is to be dropped."""
    if renamed is None:
        return lambda path: path
    if callable(renamed):
        check_function(WHO, "renamed", renamed, "paths in the state", "")
        return renamed
    if not isinstance(renamed, Mapping) or not all(
        isinstance(old, str) and isinstance(new, str | None) for old, new in renamed.items()
    ):
        raise ValueError(
            f"{WHO}: renamed must map paths in the state to paths in the parameters, but is "
            f"{shown(renamed)}. Type renamed={{'encoder': 'backbone/encoder', 'old_head': None}}."
        )

    def starts(path: str, old: str) -> bool:
        return path == old or path.startswith(old + "/")

    for old in renamed:
        if not any(starts(path, old) for path in paths):
            similar = difflib.get_close_matches(old, paths, 3, 0.3)
            raise ValueError(
                f"{WHO}: renamed has {old!r}, but no path of the state is {old!r} or begins with '{old}/'. "
                f"Similar paths: {', '.join(map(repr, similar)) or 'none'}."
            )

    def name(path: str) -> str | None:
        for old, new in renamed.items():
            if starts(path, old):
                return None if new is None else new + path[len(old) :]
        return path

    return name


def under_old_names(params: PyTree, paths: list[str], name: Callable[[str], str | None]) -> dict[str, Any]:
    """The parameters under the paths that the state has; two leaves that become one are refused."""
    leaves, old = by_path(params), {}
    for path in paths:
        if (new := name(path)) is None:
            continue
        if new in old:
            raise ValueError(f"{WHO}: renamed gives both {old[new]!r} and {path!r} the path {new!r}.")
        old[new] = path
    return {path: leaves[new] for new, path in old.items() if new in leaves}


def chosen(fresh: Mask | None, params: PyTree) -> set[str]:
    """The paths of leaves that begin anew."""
    if fresh is None:
        return set()
    leaves = arrays(WHO, params)
    check_mask(WHO, fresh, leaves, "fresh")
    selected = masked_leaves(WHO, fresh, leaves, "fresh")
    return {path for path, so in zip(leaves.paths, selected, strict=True) if so}


def places(grown: bool | Mapping[str, Any], params: PyTree) -> Place:
    """Where the old part of a leaf is in the new one."""
    if not isinstance(grown, Mapping):
        check_flags(WHO, grown=grown)
        return lambda path, old: tuple(map(slice, old)) if grown else None
    warn_unused(WHO, "grown", dict.fromkeys(grown, True), leaf_paths(params))
    found, first = [*map(_index, grown.values())], first_match(grown)
    return lambda path, old: None if (k := first(path)) is None else found[k]


def _index(place: Any) -> tuple[Any, ...]:
    axes = place if isinstance(place, tuple) else (place,)
    return tuple(np.asarray(axis) if isinstance(axis, list) else axis for axis in axes)


def _is_placed(x: Any) -> bool:
    """Whether somebody chose the devices of an array."""
    return isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.committed


def to_the_devices_of(params: PyTree) -> Callable[[Slot], Slot]:
    """Slots with arrays that are on the devices of the parameters: if they are on others, they are moved.

    An array with the shape of its parameter is divided as that is, scales as their codes, and stacks of
    matrices as `init` divides them. All else is on every device.
    """
    there = {path: x.sharding for path, x in by_path(params).items() if _is_placed(x)}
    if not there:
        return lambda slot: slot
    one = next(iter(there.values()))
    mesh = one.mesh if isinstance(one, NamedSharding) else None
    everywhere = one if mesh is None else NamedSharding(mesh, PartitionSpec())
    shapes = {path: np.shape(x) for path, x in by_path(params).items()}

    def place(slot: Slot, shape: Shape) -> Any:
        if shape == shapes.get(slot.path):
            return there.get(slot.path, one)
        if mesh is None or not slot.leaves or not shape or shape[0] % mesh.size:
            return everywhere
        return of_owners(mesh)

    def put(x: Any, place: Any) -> Any:
        same = not _is_placed(x) or x.sharding.device_set == one.device_set
        return x if same else jax.device_put(x, place)

    def moved(slot: Slot) -> Slot:
        array = slot.array
        if not isinstance(array, Stored):
            return slot._replace(array=put(array, place(slot, np.shape(array))))
        codes, shape = place(slot, np.shape(array.codes)), np.shape(array.scales)
        scales = beside(codes, shape) if mesh is not None and shape else everywhere
        codes, scales = put(array.codes, codes), put(array.scales, scales)
        return slot._replace(array=dataclasses.replace(array, codes=codes, scales=scales))

    return moved
