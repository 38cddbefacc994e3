"""A function of whole matrices over a mesh by sharding hints, where nothing says how arrays are sharded.

All matrices of one shape are one stack, whose batch axis is divided over all devices. The compiler moves the
data. One mesh axis after the other is given to the batch axis, and taken from the axis that had it.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from optimorph._distributed.map_by_shape import map_matrices
from optimorph.linalg import Axes

Function = Callable[[jax.Array], jax.Array]


def execute_by_hints(
    f: Function, forms: Sequence[Axes], arrays: Sequence[jax.Array], mesh: AbstractMesh, *, equivariant: bool
) -> list[jax.Array]:
    def divided(stack: jax.Array) -> jax.Array:
        empty = -len(stack) % mesh.size
        x = jnp.pad(stack, [(0, empty), *[(0, 0)] * (stack.ndim - 1)])
        batch = PartitionSpec(mesh.axis_names)
        y = jax.shard_map(f, mesh=mesh, in_specs=batch, out_specs=batch, check_vma=False)(to_owners(x, mesh))
        return from_owners(y, mesh)[: len(stack)]

    return map_matrices(divided, forms, arrays, transpose=equivariant)


def to_owners(x: jax.Array, mesh: AbstractMesh) -> jax.Array:
    """A stack with its batch axis divided over all devices, by one mesh axis after the other."""
    for k in range(len(mesh.axis_names)):
        x = _hint(x, mesh, mesh.axis_names[: k + 1])
    return x


def from_owners(x: jax.Array, mesh: AbstractMesh) -> jax.Array:
    """A stack with its batch axis whole on every device, by one mesh axis after the other."""
    for k in reversed(range(len(mesh.axis_names) + 1)):
        x = _hint(x, mesh, mesh.axis_names[:k])
    return x


def whole(x: jax.Array, mesh: AbstractMesh) -> jax.Array:
    """A stack whose batch axis is not divided; the other axes as the compiler likes."""
    return _hint(x, mesh, ())


def _hint(x: jax.Array, mesh: AbstractMesh, names: Sequence[str]) -> jax.Array:
    free = itertools.repeat(PartitionSpec.UNCONSTRAINED, x.ndim - 1)
    return jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, PartitionSpec(tuple(names) or None, *free))
    )
