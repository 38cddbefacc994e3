"""Stateful functions of whole matrices: all matrices of one size are a stack, divided over the mesh.

The first axis of a stack are slots, one for each matrix of any leaf. Over a mesh every device owns equally
many slots. What a transformation keeps of matrices are stacks too, and stays at the owners: in a step only
gradients are sent to them, and updates back.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from optimorph._core.numbers import in_dtype_of, upcast_dtype
from optimorph._core.types import PyTree, Shape
from optimorph._distributed import hints
from optimorph._distributed.shardings import explicit_axes, inside_shard_map
from optimorph.linalg import Axes

Stack = dict[str, Any]
"""For each size of matrix, such as "64x256", arrays whose first axis are slots."""


@dataclasses.dataclass(frozen=True)
class Slots:
    """Where the matrices of leaves are in stacks.

    Args:
      forms: how the leaves that are matrices read, by their index.
      parts: for each size, the leaf, the number of the stack in the leaf, and its shape.
    """

    forms: Mapping[int, Axes]
    shapes: Mapping[int, Shape]
    parts: Mapping[str, Sequence[tuple[int, int, Shape]]]

    @classmethod
    def of(cls, forms: Mapping[int, Axes], values: Sequence[Any]) -> "Slots":
        """Of these leaves; complex matrices are in stacks of their own."""
        parts = collections.defaultdict(list)
        for k, form in forms.items():
            kind = "complex" if jnp.iscomplexobj(values[k]) else ""
            for j, shape in enumerate(form.stacks(np.shape(values[k]))):
                parts[f"{shape[-2]}x{shape[-1]}{kind}"].append((k, j, shape))
        return cls(forms, {k: np.shape(values[k]) for k in forms}, parts)

    @property
    def counts(self) -> dict[str, int]:
        return {key: sum(math.prod(s[:-2]) for _, _, s in parts) for key, parts in self.parts.items()}

    @property
    def of_leaves(self) -> dict[int, dict[str, int]]:
        """The number of matrices of each size that each leaf has."""
        found: dict[int, dict[str, int]] = {k: {} for k in self.forms}
        for key, parts in self.parts.items():
            for k, _, shape in parts:
                found[k][key] = found[k].get(key, 0) + math.prod(shape[:-2])
        return found

    def size(self, key: str) -> tuple[int, int]:
        n, m = self.parts[key][0][2][-2:]
        return n, m

    def dtypes(self, values: Sequence[Any]) -> dict[str, Any]:
        """In which the matrices of leaves can be together: float32, or wider."""
        kinds = {k: upcast_dtype(jnp.result_type(values[k])) for k in self.forms}
        return {key: np.result_type(*(kinds[k] for k, _, _ in p)) for key, p in self.parts.items()}

    def missing(self, arrays: Mapping[int, Any]) -> dict[str, np.ndarray]:
        """Which matrices have no array, for the sizes of which some have none."""
        gone = {
            key: np.repeat([k not in arrays for k, _, _ in parts], [math.prod(s[:-2]) for _, _, s in parts])
            for key, parts in self.parts.items()
        }
        return {key: each for key, each in gone.items() if each.any()}

    def stacked(self, arrays: Mapping[int, jax.Array], slots: Mapping[str, int]) -> Stack:
        """The matrices of arrays; slots without one are 0."""
        matrices = {k: self.forms[k].matrices(x) for k, x in arrays.items()}
        kinds = {key: [matrices[k][j].dtype for k, j, _ in p if k in arrays] for key, p in self.parts.items()}

        def stack(key, parts):
            kind = np.result_type(*kinds[key]) if kinds[key] else jnp.result_type(float)
            each = [
                matrices[k][j].reshape(-1, *shape[-2:]).astype(kind) if k in arrays else _zeros(shape, kind)
                for k, j, shape in parts
            ]
            return resized(jnp.concatenate(each), slots[key])

        return {key: stack(key, parts) for key, parts in self.parts.items()}

    def unstacked(self, stacks: Stack) -> dict[int, jax.Array]:
        found = collections.defaultdict(dict)
        for key, parts in self.parts.items():
            ends = np.cumsum([0, *(math.prod(shape[:-2]) for _, _, shape in parts)])
            for (k, j, shape), (start, end) in zip(parts, itertools.pairwise(ends), strict=True):
                found[k][j] = stacks[key][start:end].reshape(shape)
        return {
            k: form.array([found[k][j] for j in sorted(found[k])], self.shapes[k])
            for k, form in self.forms.items()
        }


def resized(x: jax.Array, slots: int) -> jax.Array:
    if slots == len(x):
        return x
    return jnp.pad(x, [(0, slots - len(x)), *[(0, 0)] * (x.ndim - 1)]) if slots > len(x) else x[:slots]


def filled(count: int, mesh: Any) -> int:
    """The least number of slots for so many matrices that a mesh divides evenly."""
    return count if mesh is None else -(-count // mesh.size) * mesh.size


def mesh_of(arrays: Sequence[Any]) -> Mesh | AbstractMesh | None:
    """The mesh that arrays or their types name; None of one device, and inside `shard_map`."""
    for x in () if inside_shard_map() else arrays:
        sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def mesh_in_use(arrays: Sequence[Any]) -> AbstractMesh | None:
    """The mesh over which a program computes, if all its axes are `Auto` and it is known."""
    mesh: Any = mesh_of([x for x in arrays if isinstance(x, Tracer)])
    return None if mesh is None or AxisType.Explicit in mesh.axis_types else mesh


def placed(x: jax.Array, mesh: Mesh | AbstractMesh | None) -> jax.Array:
    """A stack that is made, with its slots at their owners.

    Beside `Explicit` axes of a mesh the compiler chooses what its `Auto` axes divide. In a `vmap` outside of
    `jit` a mesh is known without its devices, and nothing is placed.
    """
    if mesh is None or len(x) % mesh.size:
        return x
    place = of_owners(mesh)
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, place)
    if isinstance(x, Tracer):
        return jax.lax.with_sharding_constraint(x, place)
    return jax.device_put(x, place) if isinstance(mesh, Mesh) else x


def of_owners(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of a stack whose slots are at their owners, as far as types say."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind is AxisType.Explicit)
    return NamedSharding(mesh, PartitionSpec(explicit or mesh.axis_names))


def to_owners(mesh: AbstractMesh | None, stacks: Stack) -> Stack:
    """Stacks with each slot at its owner.

    A stack is made with all slots first. The compiler would send replicated arrays otherwise.
    """
    return _moved(hints.to_owners, mesh, _moved(hints.whole, mesh, stacks))


def from_owners(mesh: AbstractMesh | None, stacks: Stack) -> Stack:
    return _moved(hints.from_owners, mesh, stacks)


def at_owners(mesh: AbstractMesh | None, f: Callable[..., Any], *stacks: Any, about: Any = ()) -> Any:
    """`f(*stacks, *about)`; over a mesh each device computes its slots.

    `f` works slot by slot on trees of stacks, and returns several trees like the first; `about` are numbers.
    """
    if mesh is None:
        return f(*stacks, *about)
    sizes = jax.tree.map(len, stacks[0])
    full = jax.tree.map(lambda x: resized(x, filled(len(x), mesh)), stacks)
    here, everywhere = PartitionSpec(mesh.axis_names), PartitionSpec()
    specs = (*(here for _ in stacks), *(everywhere for _ in about))
    made = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=here, check_vma=False)(*full, *about)
    return tuple(jax.tree.map(resized, tree, sizes) for tree in made)


def divided_like(arrays: Sequence[jax.Array], others: Sequence[jax.Array]) -> list[jax.Array]:
    """Arrays that the compiler divides over a mesh as others, since an operation by elements has both.

    An element is NaN where the other's is.
    """
    return [jnp.where(jnp.isnan(y), y.astype(x.dtype), x) for x, y in zip(arrays, others, strict=True)]


def where_missing(missing: dict[str, np.ndarray], old: PyTree, new: PyTree) -> PyTree:
    """Arrays of the slots whose gradient is missing as they were."""

    def keep(path, old, new):
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        gone = next((missing[key] for key in keys if key in missing), None)
        if gone is None or not new.ndim:
            return new
        gone = np.pad(gone, (0, len(new) - len(gone)))
        return jnp.where(gone.reshape(-1, *[1] * (new.ndim - 1)), in_dtype_of(old, new), new)

    return jax.tree_util.tree_map_with_path(keep, old, new) if missing else new


def _moved(move: Callable[..., jax.Array], mesh: AbstractMesh | None, stacks: Stack) -> Stack:
    """Those stacks moved that the mesh divides evenly."""
    return {key: x if mesh is None or len(x) % mesh.size else move(x, mesh) for key, x in stacks.items()}


def _zeros(shape: Shape, dtype: Any) -> jax.Array:
    return jnp.zeros((math.prod(shape[:-2]), *shape[-2:]), dtype)


def in_the_compilers_hands(f: Callable[..., Any], like: PyTree, *others: PyTree) -> Any:
    """`f(like, *others)`, a tree as `like`, over `Explicit` mesh axes as over `Auto` ones.

    The results have the shardings of `like`.
    """
    arrays = [x for x in jax.tree.leaves((like, others)) if isinstance(x, jax.Array)]
    names = explicit_axes(arrays) if arrays else ()
    if not names:
        return f(like, *others)
    context = jax.sharding.get_abstract_mesh()
    meshes = [jax.typeof(x).sharding.mesh for x in arrays]
    mesh = next((mesh for mesh in meshes if not mesh.empty), context)

    def place(x):
        spec = jax.typeof(x).sharding.spec if isinstance(x, jax.Array) else PartitionSpec()
        return NamedSharding(mesh, spec)

    function: Any = f
    run: Any = jax.sharding.auto_axes(function, axes=names, out_sharding=jax.tree.map(place, like))
    if inside_shard_map():
        return jax.jit(run)(like, *others)  # without jit jax mixes up the two types of an axis
    if not context.empty:
        return run(like, *others)
    with _using(mesh, arrays):
        return run(like, *others)


def _using(mesh: Any, arrays: Sequence[jax.Array]) -> contextlib.AbstractContextManager[Any]:
    """The context of a mesh: while programs are traced only its axes are known, and outside its devices."""
    if any(isinstance(x, Tracer) for x in (*arrays, jnp.zeros([]))):
        return jax.sharding.use_abstract_mesh(mesh)
    devices: Any = next(
        m for x in arrays if (m := getattr(x.sharding, "mesh", None)) and m.abstract_mesh == mesh
    )
    return jax.set_mesh(devices)
