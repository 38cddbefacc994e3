"""Functions of matrices, wherever their arrays are: on one device, or over a mesh that need not be named.

How arrays lie is known, in this order: by what the caller says; by their types, where a mesh's axes are
`Explicit`; by the compiler alone, where they are `Auto`, which is asked when it divides the program
(`custom_partitioning`). Inside `jax.shard_map` arrays are shards, and only the caller can say of what.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from optimorph.linalg.axes import Axes, Shape
from optimorph.linalg.buckets import of_matrices
from optimorph.linalg.exchange import Executor
from optimorph.linalg.placement import Leaf, Names, Spec, devices, place

Layout = NamedSharding | PartitionSpec


@dataclasses.dataclass(frozen=True)
class Everywhere:
    """A function of stacks of matrices as one of arrays, however these are spread.

    Args:
      f: a function of stacks `(batch, n, m)` that treats each matrix by itself; hashable.
      forms: how each array reads as matrices.
      free: whether f(P x Q) = P f(x) Q for permutations, f(xᴴ) = f(x)ᴴ, and zeros around x are zeros around
        f(x), as of polar factors.
      wire: the dtype of what devices send each other, if narrower than the arrays'.
      bytes_at_once: of whole matrices that a device holds at a time.
    """

    f: Callable[[jax.Array], jax.Array]
    forms: tuple[Axes, ...]
    free: bool = True
    wire: jnp.dtype | None = None
    bytes_at_once: int = 2**28

    def __call__(
        self, arrays: Sequence[jax.Array], layouts: Sequence[Layout] | None = None
    ) -> list[jax.Array]:
        """f of every matrix; results lie as the arrays do.

        Args:
          arrays: whole ones, or, inside `jax.shard_map`, this device's shards.
          layouts: how they lie; inside `jax.shard_map`, of what they are shards.

        Raises:
          ValueError: inside `jax.shard_map`, no layouts.
        """
        if manual := manual_axes():
            if layouts is None:
                raise ValueError("inside jax.shard_map only shards are seen, and layouts are not given")
            specs = [spec_of(layout, x.ndim, manual) for layout, x in zip(layouts, arrays, strict=True)]
            return self._of_shards(manual, specs, arrays, "invarying")
        if layouts is not None:
            return self._over(_mesh(layouts), layouts, arrays)
        if jax.device_count() == 1 and not explicit_axes(arrays):
            return self.of_whole(arrays)
        return [*_anywhere(self, *arrays)]

    def of_whole(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """f of every matrix of whole arrays, on one device."""
        return of_matrices(self.f, self.forms, arrays, turn=self.free)

    def _of_shards(
        self, mesh: Mapping[str, int], specs: Sequence[Spec], shards: Sequence[jax.Array], to: str
    ) -> list[jax.Array]:
        leaves = [
            Leaf(whole_shape(mesh, spec, x.shape), form, spec, np.dtype(x.dtype))
            for spec, form, x in zip(specs, self.forms, shards, strict=True)
        ]
        cost = getattr(self.f, "flops", lambda n, m: 2.0 * n * n * m)
        plan = place(
            mesh, leaves, cost=cost, free=self.free, wire=self.wire, bytes_at_once=self.bytes_at_once
        )
        return Executor(self.f, self.free, to)(plan, shards)

    def _over(
        self, mesh: Mesh | AbstractMesh, layouts: Sequence[Layout], arrays: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """Over a mesh, and layouts, that are known."""
        specs = tuple(map(partition_spec, layouts))

        def body(*shards):
            sizes = manual_axes()  # of the mesh those that no vmap is over
            read = [spec_of(spec, x.ndim, sizes) for spec, x in zip(specs, shards, strict=True)]
            return tuple(self._of_shards(sizes, read, shards, "varying"))

        run = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
        return [*run(*arrays)]


@functools.partial(jax.jit, static_argnums=0)
def _anywhere(task: Everywhere, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Over a mesh that types name, or the compiler; where types name some axes only, it is asked for all."""
    names = explicit_axes(arrays)
    if not names:
        return _divided_by_the_compiler(task, *arrays)
    shardings = [jax.typeof(x).sharding for x in arrays]
    context = jax.sharding.get_abstract_mesh()
    mesh = shardings[0].mesh if context.empty else context
    if len(names) == len(mesh.axis_names):
        return tuple(task._over(mesh, shardings, arrays))
    asked: Any = functools.partial(_divided_by_the_compiler, task)
    asked = jax.sharding.auto_axes(asked, axes=names, out_sharding=tuple(shardings))
    return asked(*arrays)


def _divided_by_the_compiler(task: Everywhere, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Over a mesh that only the compiler knows; on one device this is `of_whole`."""

    x64 = jnp.result_type(float) == np.float64

    @jax.jit  # which keeps constants to itself
    def whole(*arrays):
        return tuple(task.of_whole(arrays))

    def partition(mesh, operands, results):
        del results  # lie as the operands do
        layouts = [_even(mesh, x) for x in operands[1:]]

        def shards(mark, *arrays):
            specs = [spec_of(layout, x.ndim, mesh.shape) for layout, x in zip(layouts, arrays, strict=True)]
            with jax.enable_x64(x64):  # the compiler asks when the caller's context has been left
                return tuple(task._of_shards(mesh.shape, specs, arrays, "varying"))

        everywhere = NamedSharding(mesh, PartitionSpec())
        return mesh, shards, tuple(layouts), (everywhere, *layouts)

    def infer(mesh, operands, results):
        return tuple(x.sharding for x in operands[1:])

    sides = [" ".join(f"x{k}y{axis}" for axis in range(x.ndim)) for k, x in enumerate(arrays)]
    rule = f"{', '.join(['mark', *sides])} -> {', '.join(sides)}"
    divided = custom_partitioning(lambda mark, *arrays: whole(*arrays))
    divided.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)

    @custom_vmap
    def mapped(*arrays):
        return divided(_mark(task), *arrays)

    @mapped.def_vmap
    def batched(size, where, *arrays):
        stacked = [
            x if has else jnp.broadcast_to(x, (size, *x.shape)) for x, has in zip(arrays, where, strict=True)
        ]
        forms = tuple(Axes("b" + form.spec) for form in task.forms)
        out = _divided_by_the_compiler(dataclasses.replace(task, forms=forms), *stacked)
        return out, (True,) * len(out)

    @jax.custom_jvp
    def differentiable(*arrays):
        return mapped(*arrays)

    @differentiable.defjvp
    def slope(primals, tangents):
        return differentiable(*primals), jax.jvp(whole, primals, tangents)[1]

    return differentiable(*arrays)


def _mark(task: Everywhere) -> np.ndarray:
    """Told apart by compilation caches that leave out what is done when a program is divided."""
    return np.frombuffer(hashlib.sha256(repr(task).encode()).digest(), np.int32)


def manual_axes() -> dict[str, int]:
    """The mesh axes of more than one device over which this is one device's program: `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: mesh.shape[name] for name in mesh.manual_axes if mesh.shape[name] > 1}


def explicit_axes(arrays: Sequence[jax.Array]) -> tuple[str, ...]:
    """The mesh axes over which types say how arrays lie."""
    mesh = jax.sharding.get_abstract_mesh()
    mesh = jax.typeof(arrays[0]).sharding.mesh if mesh.empty else mesh
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in pairs if kind is AxisType.Explicit)


def partition_spec(layout: Layout) -> PartitionSpec:
    """A layout without its mesh."""
    return layout if isinstance(layout, PartitionSpec) else layout.spec


def spec_of(layout: Layout, ndim: int, mesh: Mapping[str, int]) -> Spec:
    """For each axis of an array the mesh axes that divide it, of those in `mesh`."""
    entries = tuple(partition_spec(layout))
    entries += (None,) * (ndim - len(entries))
    return tuple(tuple(n for n in _names(entry) if mesh.get(n, 1) > 1) for entry in entries)


def spec_names(spec: PartitionSpec) -> Names:
    """All mesh axes that it names."""
    return tuple(name for entry in spec for name in _names(entry))


def own_part(x: np.ndarray, spec: Spec) -> jax.Array:
    """Inside `jax.shard_map`, this device's part of a constant, whose axes of size 1 are everyone's."""
    part = jnp.asarray(x)
    for k, names in enumerate(spec):
        if names and x.shape[k] > 1:
            size = x.shape[k] // devices(manual_axes(), names)
            part = jax.lax.dynamic_slice_in_dim(part, jax.lax.axis_index(names) * size, size, k)
    return part


def whole_shape(mesh: Mapping[str, int], spec: Spec, shard: Shape) -> Shape:
    """The shape of an array, from that of its shards."""
    return tuple(size * devices(mesh, names) for size, names in zip(shard, spec, strict=True))


def _names(entry: str | Names | None) -> Names:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _mesh(layouts: Sequence[Layout]) -> Mesh | AbstractMesh:
    """The mesh that layouts name, or else the one in use."""
    found = {layout.mesh for layout in layouts if isinstance(layout, NamedSharding)}
    return found.pop() if found else jax.sharding.get_abstract_mesh()


def _even(mesh: Mesh, operand: jax.ShapeDtypeStruct) -> NamedSharding:
    """How an operand is to lie: as it does, but over no mesh axes that do not divide it."""
    spec = []
    for size, names in zip(operand.shape, spec_of(operand.sharding, operand.ndim, mesh.shape), strict=True):
        kept = []
        for name in names:
            if size % mesh.shape[name]:
                break
            size //= mesh.shape[name]
            kept.append(name)
        spec.append(tuple(kept) or None)
    return NamedSharding(mesh, PartitionSpec(*spec))
