"""Shardings of leaves over a mesh, from array types and the caller's rules."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from optimorph._core.checks import LeafError
from optimorph._core.shown import shown
from optimorph._core.types import Shape

Names = tuple[str, ...]
"""Names of mesh axes."""

Spec = tuple[Names, ...]
"""For each axis of an array the mesh axes that shard it, the outermost first."""

Sharding = NamedSharding | PartitionSpec

Match = Callable[[str, Shape], Any]
"""(path, shape) → the sharding of that leaf; None for replicated, ... where no rule matches."""


def devices(mesh: Mapping[str, int], names: Iterable[str]) -> int:
    return math.prod(mesh[name] for name in names)


def manual_axes() -> dict[str, int]:
    """The mesh axes of more than one device that are manual here, as inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: mesh.shape[name] for name in mesh.manual_axes if mesh.shape[name] > 1}


def inside_shard_map() -> bool:
    """Whether any mesh axes are manual here, if only of one device."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def explicit_axes(arrays: Sequence[jax.Array]) -> tuple[str, ...]:
    """The `Explicit` mesh axes: those over which array types carry the sharding."""
    mesh = jax.sharding.get_abstract_mesh()
    mesh = jax.typeof(arrays[0]).sharding.mesh if mesh.empty else mesh
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, axis_type in pairs if axis_type is AxisType.Explicit)


def in_mesh(x: jax.Array) -> jax.Array:
    """`x`, replicated over the mesh in use if that has `Explicit` axes and the array's type has no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Explicit not in mesh.axis_types or not jax.typeof(x).sharding.mesh.empty:
        return x
    return jax.sharding.reshard(x, PartitionSpec())


def undivided(x: jax.Array) -> jax.Array:
    """An array whose type says how it is divided over a mesh, undivided; others the compiler sees to."""
    if not explicit_axes([x]):
        return x
    return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec()))


def partition_spec(sharding: Sharding) -> PartitionSpec:
    return sharding if isinstance(sharding, PartitionSpec) else sharding.spec


def mesh_of(shardings: Sequence[Sharding]) -> Mesh | AbstractMesh:
    """The mesh that shardings name, or else the one in use."""
    meshes = {sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)}
    return meshes.pop() if meshes else jax.sharding.get_abstract_mesh()


def spec_of(sharding: Sharding, ndim: int, mesh: Mapping[str, int]) -> Spec:
    """For each axis of an array the mesh axes that shard it, restricted to those in `mesh`."""
    entries = tuple(partition_spec(sharding))
    entries += (None,) * (ndim - len(entries))
    return tuple(tuple(n for n in _names(entry) if mesh.get(n, 1) > 1) for entry in entries)


def whole_shape(mesh: Mapping[str, int], spec: Spec, shard: Shape) -> Shape:
    return tuple(size * devices(mesh, names) for size, names in zip(shard, spec, strict=True))


def local_shard(x: np.ndarray, spec: Spec) -> jax.Array:
    """Inside `jax.shard_map`, this device's shard of a constant; axes of size 1 are replicated."""
    shard = jnp.asarray(x)
    for k, names in enumerate(spec):
        if names and x.shape[k] > 1:
            size = x.shape[k] // devices(manual_axes(), names)
            shard = jax.lax.dynamic_slice_in_dim(shard, jax.lax.axis_index(names) * size, size, k)
    return shard


def shardings_of(
    who: str, match: Match | None, paths: Sequence[str], arrays: Sequence[jax.Array]
) -> list[Sharding] | None:
    """The shardings that the caller gave for arrays; None if the caller gave none.

    Raises:
      ValueError: naming `who`, and every leaf that no rule matches or whose sharding does not fit: unknown
        mesh axes, too many axes, sizes that do not divide; inside `jax.shard_map`, no rules.
    """
    manual = manual_axes()
    if match is None:
        if manual and paths:
            raise undecided(who, paths[0], arrays[0].shape)
        return None
    shardings = [match(path, x.shape) for path, x in zip(paths, arrays, strict=True)]
    shardings = [PartitionSpec() if sharding is None else sharding for sharding in shardings]
    if not manual and all(sharding == PartitionSpec() for sharding in shardings):
        return None  # replicated, as any array is without a mesh
    meshes = {sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)}
    mesh = jax.sharding.get_abstract_mesh() if manual or not meshes else next(iter(meshes))
    leaves = zip(paths, arrays, shardings, strict=True)
    faults = [misfit(path, x.shape, sharding, mesh, manual) for path, x, sharding in leaves]
    faults = [fault for fault in faults if fault is not None]
    if len(meshes) > 1:
        faults.append(f"shardings name {len(meshes)} meshes. Type one for all leaves.")
    if faults:
        raise ValueError("\n".join(f"{who}: {fault}" for fault in faults))
    return shardings


def undecided(who: str, path: str, shape: Shape) -> ValueError:
    """The error where nothing says how a leaf is divided inside `jax.shard_map`."""
    first, *_ = manual = [*manual_axes()]
    return ValueError(
        f"{who}: inside jax.shard_map or pmap over {', '.join(manual)}, {path!r} of shape {shape} may be a "
        "local shard. If every device has the whole leaf, and the same one, type shardings={'*': P()}. If "
        "leaves are divided, give the in_specs of the parameters, such as "
        f"shardings={{'*/kernel': P({first!r}, None), '*': P()}}."
    )


def whole_shapes(
    who: str, match: Match | None, paths: Sequence[str], shapes: Sequence[Shape]
) -> Sequence[Shape]:
    """The global shapes of leaves, of which local shards have these."""
    if match is None or not manual_axes():
        return shapes
    pairs = zip(paths, shapes, strict=True)
    return [local_shard_spec(who, match, path, shape)[1] for path, shape in pairs]


def local_shard_spec(who: str, match: Match | None, path: str, shape: Shape) -> tuple[Spec, Shape]:
    """Inside `jax.shard_map` the mesh axes that divide each axis of a leaf; and the leaf's global shape.

    A leaf that no rule matches, or whose sharding does not fit, is refused by a `LeafError`.
    """
    if match is None or not (manual := manual_axes()):
        return (), shape
    sharding = match(path, shape)
    sharding = PartitionSpec() if sharding is None else sharding
    if fault := misfit(path, shape, sharding, jax.sharding.get_abstract_mesh(), manual):
        raise LeafError(f"{who}: {fault}")
    spec = spec_of(sharding, len(shape), manual)
    return spec, whole_shape(manual, spec, shape)


def misfit(path: str, shape: Shape, sharding: Any, mesh: Any, manual: Iterable[str] = ()) -> str | None:
    if sharding is ...:
        return _unmatched(path)
    if not isinstance(sharding, NamedSharding | PartitionSpec):
        return f"{path!r} has sharding {shown(sharding)}. Type a jax.sharding.PartitionSpec or NamedSharding."
    spec = partition_spec(sharding)
    if not mesh.shape:
        return f"{path!r} has sharding {spec} without a mesh. Type a NamedSharding, or use jax.set_mesh."
    if len(tuple(spec)) > len(shape):
        return f"{path!r} has shape {shape}, but its sharding {spec} has {len(tuple(spec))} axes."
    unknown = [name for entry in spec for name in _names(entry) if name not in mesh.shape]
    if unknown:
        return f"{path!r} has sharding {spec}, but the mesh has no {unknown[0]!r}, only {[*mesh.shape]}."
    for size, names in zip(shape, spec_of(spec, len(shape), mesh.shape), strict=True):
        count = devices(mesh.shape, names)
        if not manual and size % count:
            return f"{path!r} has shape {shape}, but {spec} divides {size} by {count}, with a remainder."
    return None


def _unmatched(path: str) -> str:
    return f"no sharding rule matches {path!r}. Add one. If all other leaves are replicated, add '*': P()."


def _names(entry: str | Names | None) -> Names:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
