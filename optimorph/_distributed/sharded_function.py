"""A function of whole matrices, applied to arrays that may be sharded over a mesh.

The shardings come from, in this order: the caller; the arrays' types, for `Explicit` mesh axes; the compiler,
for `Auto` mesh axes, when it partitions the program (`custom_partitioning`). On TPUs and in exported programs
there is no `custom_partitioning`: sharding hints divide the work. Inside `jax.shard_map` arrays are local
shards, and the caller must give the shardings.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from optimorph._core.numbers import varies_over
from optimorph._core.target import Target, for_target
from optimorph._core.warn import warn
from optimorph._distributed.exchange import execute
from optimorph._distributed.groups import Leaf
from optimorph._distributed.hardware import AUTO, NEVER, Hardware, hardware_for
from optimorph._distributed.hints import execute_by_hints
from optimorph._distributed.map_by_shape import map_matrices
from optimorph._distributed.placement import place
from optimorph._distributed.roles import cost_of, division_of
from optimorph._distributed.shardings import (
    Sharding,
    Spec,
    explicit_axes,
    inside_shard_map,
    manual_axes,
    mesh_of,
    partition_spec,
    spec_of,
    whole_shape,
)
from optimorph._distributed.stacks import in_the_compilers_hands
from optimorph.linalg import Axes, NewtonSchulz


@dataclasses.dataclass(frozen=True)
class ShardedFunction:
    """A function of stacks of matrices as a function of arrays, whatever their sharding.

    Args:
      f: a hashable function of stacks `(batch, n, m)` that treats each matrix independently.
      equivariant: whether f(P x Q) = P f(x) Q for permutations, f(xᴴ) = f(x)ᴴ, and f of x padded with zeros
        is f(x) padded with zeros, as for polar factors.
      divide: what decides whether a matrix is divided over devices, as `hardware_for` says.
    """

    f: Callable[[jax.Array], jax.Array]
    forms: tuple[Axes, ...]
    equivariant: bool = True
    comm_dtype: jnp.dtype | None = None
    bytes_at_once: int = 2**28
    divide: str | Hardware = AUTO

    def __call__(
        self, arrays: Sequence[jax.Array], shardings: Sequence[Sharding] | None = None
    ) -> list[jax.Array]:
        """f of every matrix; the results have the arrays' shardings.

        Inside `jax.shard_map` the arrays are this device's local shards, and the shardings, which must be
        given there, are those of the global arrays.
        """
        if inside_shard_map():
            local = functools.partial(self._inside_shard_map, shardings)
            return in_the_compilers_hands(local, [*arrays])
        if shardings is not None:
            return self._over(mesh_of(shardings), shardings, arrays)
        eager = all(not isinstance(x, Tracer) and len(x.devices()) == 1 for x in arrays)
        if eager and not explicit_axes(arrays):
            return self.on_one_device(arrays)
        return [*_dispatch(self, *arrays)]

    def on_one_device(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        return map_matrices(self.f, self.forms, arrays, transpose=self.equivariant)

    def _inside_shard_map(
        self, shardings: Sequence[Sharding] | None, shards: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """What mesh axes that are not manual divide is the compiler's.

        An array that varies over a mesh axis which does not divide it is another one on each device, as in
        an ensemble of runs. These devices exchange nothing.
        """
        if not (manual := manual_axes()):
            return self.on_one_device(shards)
        if shardings is None:
            raise ValueError("inside jax.shard_map arrays are local shards: shardings must be given")
        specs = [spec_of(sharding, x.ndim, manual) for sharding, x in zip(shardings, shards, strict=True)]
        mesh, results = jax.sharding.get_abstract_mesh(), {}
        runs = [varies_over(x).difference(*spec) for x, spec in zip(shards, specs, strict=True)]
        for run in dict.fromkeys(runs):
            own = [k for k, other in enumerate(runs) if other == run]
            sizes = {name: size for name, size in manual.items() if name not in run}
            part = dataclasses.replace(self, forms=tuple(self.forms[k] for k in own))
            found = part._of_shards(
                sizes, mesh, [specs[k] for k in own], [shards[k] for k in own], "invarying"
            )
            results |= dict(zip(own, found, strict=True))
        return [results[k] for k in range(len(shards))]

    def _of_shards(
        self,
        sizes: Mapping[str, int],
        mesh: Mesh | AbstractMesh,
        specs: Sequence[Spec],
        shards: Sequence[jax.Array],
        to: str,
    ) -> list[jax.Array]:
        """One device's program: from its local shards to those of the results."""
        hardware = hardware_for(self.divide, mesh)
        leaves = [
            Leaf(whole_shape(sizes, spec, x.shape), form, spec, np.dtype(x.dtype))
            for spec, form, x in zip(specs, self.forms, shards, strict=True)
        ]
        plan = place(
            sizes,
            leaves,
            cost=cost_of(self.f, hardware),
            equivariant=self.equivariant,
            comm_dtype=self.comm_dtype,
            bytes_at_once=self.bytes_at_once,
            division=division_of(self.f, hardware, self.divide != NEVER),
        )
        return execute(plan, self.f, shards, equivariant=self.equivariant, to=to)

    def _over(
        self, mesh: Mesh | AbstractMesh, shardings: Sequence[Sharding], arrays: Sequence[jax.Array]
    ) -> list[jax.Array]:
        specs = tuple(map(partition_spec, shardings))

        def body(*shards):
            sizes = manual_axes()  # without the mesh axes that a vmap is over
            local_specs = [spec_of(spec, x.ndim, sizes) for spec, x in zip(specs, shards, strict=True)]
            return tuple(self._of_shards(sizes, mesh, local_specs, shards, "varying"))

        run = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
        return [*run(*arrays)]


@functools.partial(jax.jit, static_argnums=0)
def _dispatch(task: ShardedFunction, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """With the shardings of the arrays' types if all mesh axes are `Explicit`, else with the compiler's."""
    names = explicit_axes(arrays)
    if not names:
        return _auto(task, *arrays)
    shardings = [jax.typeof(x).sharding for x in arrays]
    context = jax.sharding.get_abstract_mesh()
    mesh = shardings[0].mesh if context.empty else context
    if len(names) == len(mesh.axis_names):
        return tuple(task._over(mesh, shardings, arrays))
    function: Any = functools.partial(_auto, task)
    function = jax.sharding.auto_axes(function, axes=names, out_sharding=tuple(shardings))
    return function(*arrays)


def _auto(task: ShardedFunction, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(for_target(_of_compiler, task, *arrays, results=len(arrays)))


def _of_compiler(task: ShardedFunction, target: Target, *arrays: jax.Array) -> Sequence[jax.Array]:
    """By hints where `custom_partitioning` does not work: on TPUs, and in programs that are exported."""
    if target.platform == "tpu":
        return _narrowed(task, target, arrays)
    if target.devices > 1 and not target.exported:
        return _custom_partitioned(task, *arrays)
    return _divided_by_hints(task, target, arrays)


def _narrowed(task: ShardedFunction, target: Target, arrays: Sequence[jax.Array]) -> Sequence[jax.Array]:
    """On TPUs, in the dtype of their iteration, bfloat16, so that half the bytes are moved and sent."""
    polar = task.f if isinstance(task.f, NewtonSchulz) else None
    form = _row_major if target.devices == 1 and not target.exported else lambda x: x
    narrow = [form(x if polar is None else x.astype(polar.dtype_on(x.dtype, "tpu"))) for x in arrays]
    results = _divided_by_hints(task, target, narrow)
    return [form(y).astype(x.dtype) for y, x in zip(results, arrays, strict=True)]


def _row_major(x: jax.Array) -> jax.Array:
    """x in this order in memory: else one transpose of x has the compiler copy what x is made of."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _divided_by_hints(
    task: ShardedFunction, target: Target, arrays: Sequence[jax.Array]
) -> Sequence[jax.Array]:
    if target.devices > 1 and target.mesh is None:
        warn(_NO_MESH, stacklevel=2)
    if target.devices == 1 or target.mesh is None:
        return task.on_one_device(arrays)
    return execute_by_hints(task.f, task.forms, arrays, target.mesh, equivariant=task.equivariant)


_NO_MESH = (
    "every device computes every matrix, because the program says nothing of its mesh. Type "
    "orthogonalize(shardings=...) or muon(shardings=...), or jit with jax.sharding.NamedSharding."
)


def _custom_partitioned(task: ShardedFunction, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`_of_shards` with the shardings that the compiler chose."""

    x64 = jnp.result_type(float) == np.float64

    @jax.jit  # so that constants stay inside
    def whole(*arrays):
        return tuple(task.on_one_device(arrays))

    def partition(mesh, operands, results):
        del results  # have the operands' shardings
        shardings = [_even(mesh, x) for x in operands[1:]]

        def local_program(digest, *shards):
            specs = [spec_of(s, x.ndim, mesh.shape) for s, x in zip(shardings, shards, strict=True)]
            with jax.enable_x64(x64):  # the compiler calls this outside the caller's context
                return tuple(task._of_shards(mesh.shape, mesh, specs, shards, "varying"))

        replicated = NamedSharding(mesh, PartitionSpec())
        return mesh, local_program, tuple(shardings), (replicated, *shardings)

    def infer(mesh, operands, results):
        return tuple(x.sharding for x in operands[1:])

    sides = [" ".join(f"x{k}y{axis}" for axis in range(x.ndim)) for k, x in enumerate(arrays)]
    rule = f"{', '.join(['mark', *sides])} -> {', '.join(sides)}"
    partitioned = custom_partitioning(lambda digest, *arrays: whole(*arrays))
    partitioned.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)

    @custom_vmap
    def mapped(*arrays):
        return partitioned(_digest(task), *arrays)

    @mapped.def_vmap
    def batched(size, in_batched, *arrays):
        stacked = [
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(arrays, in_batched, strict=True)
        ]
        forms = tuple(Axes("b" + form.spec) for form in task.forms)
        out = _custom_partitioned(dataclasses.replace(task, forms=forms), *stacked)
        return out, (True,) * len(out)

    return mapped(*arrays)


def _digest(task: ShardedFunction) -> np.ndarray:
    """Hash of the task: compilation caches ignore the body of custom_partitioning."""
    return np.frombuffer(hashlib.sha256(repr(task).encode()).digest(), np.int32)


def _even(mesh: Mesh, operand: jax.ShapeDtypeStruct) -> NamedSharding:
    """An operand's sharding without the mesh axes that do not divide its sizes."""
    spec = []
    for size, names in zip(operand.shape, spec_of(operand.sharding, operand.ndim, mesh.shape), strict=True):
        even = []
        for name in names:
            if size % mesh.shape[name]:
                break
            size //= mesh.shape[name]
            even.append(name)
        spec.append(tuple(even) or None)
    return NamedSharding(mesh, PartitionSpec(*spec))
