"""Arrays divided evenly over a mesh, whatever their parameters' shardings are."""

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.shard_alike import shard_alike
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from optimorph._core.target import Target, for_target
from optimorph._core.types import PyTree, Shape
from optimorph._distributed.hints import hint
from optimorph._distributed.shardings import explicit_axes, manual_axes


def even_spec(mesh: Mapping[str, int], shape: Shape) -> PartitionSpec:
    """Over all mesh axes that divide it, the first axes first: stacks by their matrices, matrices by rows.

    The last axis stays whole.
    """
    left, spec = list(mesh), []
    for size in shape[:-1]:
        own = []
        for name in [*left]:
            if size % mesh[name] == 0:
                own.append(name)
                left.remove(name)
                size //= mesh[name]
        spec.append(tuple(own) or None)
    return PartitionSpec(*spec)


def evenly(x: jax.Array, like: Any) -> jax.Array:
    """`x` divided evenly over the mesh of another array, if that is known; by a hint over `Auto` axes."""
    mesh = _mesh_of(like)
    if mesh is None or mesh.size == 1 or manual_axes():
        return x
    place = NamedSharding(mesh, even_spec(dict(mesh.shape), x.shape))
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, place)
    return jax.lax.with_sharding_constraint(x, place) if isinstance(x, Tracer) else jax.device_put(x, place)


def mesh_in_use(arrays: Sequence[Any]) -> Any:
    """The mesh that the types of arrays in a program name, if all its axes are `Auto` and it is known."""
    meshes = [mesh for x in arrays if isinstance(x, Tracer) and (mesh := _mesh_of(x)) is not None]
    if not meshes or manual_axes() or meshes[0].size == 1 or AxisType.Explicit in meshes[0].axis_types:
        return None
    return meshes[0]


def together(
    mesh: AbstractMesh | None, f: Callable[..., PyTree], items: Sequence[PyTree], batches: Sequence[Shape]
) -> list[PyTree]:
    """`f(*item)` of every item; over a mesh each device computes a share of the matrices.

    Args:
      mesh: what `mesh_in_use` found. Without one each item is computed by itself.
      f: a function of arrays `(*batch, ...)` that treats each index of the batch by itself.
      items: tuples of trees of arrays.
      batches: the batch of each.
    """
    if mesh is None:
        return [f(*item) for item in items]
    alike: dict[Any, list[int]] = {}
    flat = []
    for k, (item, batch) in enumerate(zip(items, batches, strict=True)):
        count = math.prod(batch)
        n = len(batch)
        item = jax.tree.map(lambda x, c=count, n=n: x.reshape(c, *x.shape[n:]), item)
        flat.append(item)
        kinds = [(x.shape[1:], x.dtype) for x in jax.tree.leaves(item)]
        alike.setdefault((jax.tree.structure(item), tuple(kinds)), []).append(k)
    results: list[PyTree] = [None] * len(items)
    for members in alike.values():
        stack = jax.tree.map(lambda *x: jnp.concatenate(x), *(flat[k] for k in members))
        made = _shared_out(mesh, f, stack)
        ends = np.cumsum([0, *(math.prod(batches[k]) for k in members)])
        for k, (i, j) in zip(members, itertools.pairwise(ends), strict=True):
            results[k] = jax.tree.map(
                lambda x, i=i, j=j, b=batches[k]: x[i:j].reshape(*b, *x.shape[1:]), made
            )
    return results


def _shared_out(mesh: AbstractMesh, f: Callable[..., PyTree], stack: PyTree) -> PyTree:
    """f of stacks, whose first axis is divided over all devices."""
    count = len(jax.tree.leaves(stack)[0])
    empty = -count % mesh.size
    prefixes = [mesh.axis_names[: k + 1] for k in range(len(mesh.axis_names))]

    def divided(x):
        x = jnp.pad(x, [(0, empty), *[(0, 0)] * (x.ndim - 1)])
        for names in prefixes:
            x = hint(x, mesh, names)
        return x

    batch = PartitionSpec(mesh.axis_names)
    run = jax.shard_map(f, mesh=mesh, in_specs=batch, out_specs=batch, check_vma=False)

    def undivided(x):
        for names in [*prefixes[::-1], ()]:
            x = hint(x, mesh, names)
        return x[:count]

    return jax.tree.map(undivided, run(*jax.tree.map(divided, stack)))


def divided_like(tree: PyTree, other: PyTree) -> PyTree:
    """Arrays divided over the mesh as those of another tree are, which over `Auto` axes is not known here."""
    leaves, structure = jax.tree.flatten(tree)
    pairs = {
        k: (evenly(x, like), like.astype(x.dtype))
        for k, (x, like) in enumerate(zip(leaves, jax.tree.leaves(other), strict=True))
        if x.ndim and _mesh_of(like) is not None
    }
    if not pairs or manual_axes():
        return tree
    arrays, others = zip(*pairs.values(), strict=True)
    for k, x in zip(
        pairs, for_target(_for_compiler, None, *arrays, *others, results=len(arrays)), strict=True
    ):
        leaves[k] = x
    return structure.unflatten(leaves)


def _for_compiler(about: None, target: Target, *arrays: jax.Array) -> Sequence[jax.Array]:
    n = len(arrays) // 2
    if target.devices == 1:
        return arrays[:n]
    if target.platform == "tpu" or target.exported:
        return [shard_alike(*pair)[0] for pair in zip(arrays[:n], arrays[n:], strict=True)]
    return _custom_partitioned(*arrays)


@custom_vmap
def _custom_partitioned(*arrays):
    """The first half of the arrays, with the shardings of the second."""
    n = len(arrays) // 2

    def partition(mesh, operands, results):
        del results
        places = tuple(x.sharding for x in operands[n:])
        return mesh, lambda *shards: shards[:n], places, places * 2

    def infer(mesh, operands, results):
        return tuple(x.sharding for x in operands[n:])

    sides = [" ".join(f"x{k}y{axis}" for axis in range(x.ndim)) for k, x in enumerate(arrays)]
    rule = f"{', '.join(sides)} -> {', '.join(sides[n:])}"
    tied = custom_partitioning(lambda *arrays: arrays[:n])
    tied.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return tied(*arrays)


@_custom_partitioned.def_vmap
def _mapped(size, in_batched, *arrays):
    stacked = [
        x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
        for x, is_batched in zip(arrays, in_batched, strict=True)
    ]
    return _custom_partitioned(*stacked), (True,) * (len(arrays) // 2)


def _mesh_of(x: Any) -> Mesh | AbstractMesh | None:
    """The mesh that an array's sharding or type names."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else getattr(x, "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else None


def in_the_compilers_hands(f: Callable[..., Any], updates: PyTree, state: PyTree, params: PyTree) -> Any:
    """`f(updates, state, params)` → (updates, state), over `Explicit` mesh axes as over `Auto` ones.

    The results have the shardings of `updates` and `state`.
    """
    arrays = [x for x in jax.tree.leaves((updates, state, params)) if isinstance(x, jax.Array)]
    names = explicit_axes(arrays) if arrays and not manual_axes() else ()
    if not names:
        return f(updates, state, params)
    context = jax.sharding.get_abstract_mesh()
    meshes = [jax.typeof(x).sharding.mesh for x in arrays]
    mesh = next((mesh for mesh in meshes if not mesh.empty), context)

    def place(x):
        spec = jax.typeof(x).sharding.spec if isinstance(x, jax.Array) else PartitionSpec()
        return NamedSharding(mesh, spec)

    places = jax.tree.map(place, (updates, state))
    function: Any = f
    run: Any = jax.sharding.auto_axes(function, axes=names, out_sharding=places)
    with contextlib.nullcontext() if not context.empty else jax.sharding.use_abstract_mesh(mesh):
        return run(updates, state, params)
