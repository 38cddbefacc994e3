"""How leaves lie over a mesh, where it must be said: by rules, as everything else of leaves."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from optimorph.core.types import Rules, Shape
from optimorph.linalg.meshes import Layout, manual_axes, partition_spec, spec_names, spec_of, whole_shape
from optimorph.linalg.placement import Spec, devices
from optimorph.routing.rules import UNSAID, LeafError, lookup


def layouts_of(
    who: str, rules: Rules | None, paths: Sequence[str], arrays: Sequence[jax.Array]
) -> list[Layout] | None:
    """How arrays lie, by rules: path → `PartitionSpec` or `NamedSharding`; None where nothing is to be said.

    Raises:
      ValueError: naming `who`, and every leaf of which nothing is said, or what cannot be: names that the
        mesh does not have, more axes than the leaf's, sizes that do not divide; inside `jax.shard_map`,
        no rules.
    """
    manual = manual_axes()
    if rules is None:
        if manual and paths:
            raise ValueError(
                f"{who}: inside jax.shard_map or pmap over {', '.join(manual)} {paths[0]!r} has shape "
                f"{arrays[0].shape}, which may be a shard of a matrix. Type shardings=, with the in_specs of "
                "the parameters, such as shardings={'*/kernel': P('data', None), '*': P()}; P() is whole."
            )
        return None
    say = lookup(rules)
    layouts = [say(path, x.shape) for path, x in zip(paths, arrays, strict=True)]
    layouts = [PartitionSpec() if layout is None else layout for layout in layouts]
    meshes = {layout.mesh for layout in layouts if isinstance(layout, NamedSharding)}
    mesh = jax.sharding.get_abstract_mesh() if manual or not meshes else next(iter(meshes))
    faults = [
        _fault(path, x.shape, layout, mesh, manual)
        for path, x, layout in zip(paths, arrays, layouts, strict=True)
    ]
    faults = [fault for fault in faults if fault is not None]
    if len(meshes) > 1:
        faults.append(f"shardings name {len(meshes)} meshes. Type one for all leaves.")
    if faults:
        raise ValueError("\n".join(f"{who}: {fault}" for fault in faults))
    return layouts


def of_whole(who: str, rules: Rules | None, say: Callable[[str, Shape], Any]) -> Callable[[str, Shape], Any]:
    """`say` of a leaf's path and its whole shape, where only shards are seen."""
    cut = cuts(who, rules)
    return say if rules is None else lambda path, shape: say(path, cut(path, shape)[1])


def cuts(who: str, rules: Rules | None) -> Callable[[str, Shape], tuple[Spec, Shape]]:
    """(path, shape) → how this device's shard is cut from a leaf, and the whole's shape.

    Raises:
      LeafError: when called inside `jax.shard_map`, naming `who` and a leaf of which the rules say nothing.
    """
    layout = lookup({} if rules is None else rules)

    def cut(path: str, shape: Shape) -> tuple[Spec, Shape]:
        manual = manual_axes() if rules is not None else {}
        said = layout(path, shape) if manual else None
        if said is UNSAID:
            raise LeafError(f"{who}: {_unsaid(path)}")
        spec = spec_of(PartitionSpec() if said is None else said, len(shape), manual)
        return spec, whole_shape(manual, spec, shape)

    return cut


def _fault(path: str, shape: Shape, layout: Any, mesh: Any, manual: dict[str, int]) -> str | None:
    if layout is UNSAID:
        return _unsaid(path)
    if not isinstance(layout, NamedSharding | PartitionSpec):
        return f"{path!r} is said to lie as {layout!r}. Type a jax.sharding.PartitionSpec or NamedSharding."
    spec = partition_spec(layout)
    if not mesh.shape:
        return f"{path!r} is to lie as {spec}, but over no mesh. Type a NamedSharding, or use jax.set_mesh."
    if len(tuple(spec)) > len(shape):
        return f"{path!r} has shape {shape}, and {spec} is of {len(tuple(spec))} axes."
    if unknown := [name for name in spec_names(spec) if name not in mesh.shape]:
        return f"{path!r} is to lie as {spec}, but the mesh has no {unknown[0]!r}, only {[*mesh.shape]}."
    for size, divided in zip(shape, spec_of(spec, len(shape), mesh.shape), strict=True):
        count = devices(mesh.shape, divided)
        if not manual and size % count:
            return f"{path!r} has shape {shape}, and {spec} divides {size} by {count}, which leaves a rest."
    return None


def _unsaid(path: str) -> str:
    return f"shardings say nothing of {path!r}. Add it, or, last, '*': P() for leaves that are whole."
