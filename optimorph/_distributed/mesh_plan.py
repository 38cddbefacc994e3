"""What each device of a mesh computes and sends when matrices are divided over it, from shapes alone."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from optimorph._distributed.placement import Leaf, Placement, place
from optimorph._distributed.shardings import Match, misfit, spec_of
from optimorph.linalg import Axes, NewtonSchulz


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """How matrices are divided over a mesh.

    Args:
      mesh: the names and sizes of its axes.
      platform: of its devices, or "" if the mesh does not name it.
      way: "exchange", "custom_partitioning" or "hints".
      flops: multiplications and additions of the busiest device, for five steps of `NewtonSchulz`.
      least_flops: those of a device if the matrices could be divided evenly.
      sent: bytes that a device sends, in float32.
    """

    mesh: tuple[tuple[str, int], ...]
    platform: str
    way: str
    flops: float
    least_flops: float
    sent: float

    def __str__(self) -> str:
        """What happens, in words."""
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh)
        ways = {
            "exchange": "by all_to_all and all_gather, from the shardings that are given",
            "custom_partitioning": "by all_to_all and all_gather, when the compiler has chosen shardings",
            "hints": "by sharding hints; with shardings= by fewer collectives",
        }
        share = self.flops / max(self.least_flops, 1)
        platform = f" ({self.platform})" if self.platform else ""
        return (
            f"Over the mesh {axes}{platform} matrices are divided {ways[self.way]}.\n"
            f"The busiest device computes {self.flops / 1e9:,.3g} Gflop ({share:.2f} of an even share) and "
            f"sends {self.sent / 1e6:,.3g} MB."
        )


def plan_mesh(
    mesh: Mesh | AbstractMesh,
    match: Match | None,
    paths: Sequence[str],
    leaves: Sequence[Any],
    forms: Sequence[Axes | None],
) -> MeshPlan:
    """The plan for leaves over a mesh.

    Args:
      mesh: devices, or names and sizes alone.
      match: the user's rules of shardings, or None.
      paths: of the leaves.
      leaves: arrays or their shapes, with their shardings.
      forms: how leaves read as matrices; None for no matrix.

    Raises:
      ValueError: a sharding over axes that the mesh does not have, or that does not fit its leaf.
    """
    sizes, matrices, faults = dict(mesh.shape), [], []
    for path, leaf, form in zip(paths, leaves, forms, strict=True):
        if form is not None:
            sharding = getattr(leaf, "sharding", None) if match is None else match(path, leaf.shape)
            known = isinstance(sharding, NamedSharding | PartitionSpec)
            if known and (fault := misfit(path, leaf.shape, sharding, mesh)) is not None:
                faults.append(f"plan: {fault}")
                continue
            spec = spec_of(sharding if known else PartitionSpec(), len(leaf.shape), sizes)
            matrices.append(Leaf(leaf.shape, form, spec, jnp.dtype(jnp.float32)))
    if faults:
        raise ValueError("\n".join(faults))
    found: Placement = place(sizes, matrices, cost=NewtonSchulz().flops)
    platform = _platform(mesh)
    explicit = all(kind is AxisType.Explicit for kind in mesh.axis_types)
    way = (
        "exchange"
        if match is not None or explicit
        else "hints"
        if platform == "tpu"
        else "custom_partitioning"
    )
    return MeshPlan(tuple(sizes.items()), platform, way, found.flops, found.least_flops, found.sent)


def _platform(mesh: Mesh | AbstractMesh) -> str:
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    return getattr(mesh.abstract_device, "platform", None) or ""
