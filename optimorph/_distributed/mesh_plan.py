"""What each device of a mesh computes and sends when matrices are divided over it, from shapes alone."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from optimorph._distributed.groups import Leaf
from optimorph._distributed.hardware import NEVER, Hardware, hardware_for
from optimorph._distributed.placement import Placement, place
from optimorph._distributed.roles import cost_of, division_of
from optimorph._distributed.shardings import Match, misfit, spec_of
from optimorph.linalg import Axes, NewtonSchulz


@dataclasses.dataclass(frozen=True)
class MeshPlan(Placement):
    """The placement of matrices of float32 over a mesh, in one update.

    Args:
      platform: the platform of the mesh's devices, or "" if the mesh does not name it.
      way: how matrices are sent: "exchange" (the shardings are given), "custom_partitioning" (the compiler
        chooses the shardings) or "hints" (sharding hints to the compiler).
      hardware: the numbers of the devices; None if nothing is known of the devices.
    """

    platform: str
    way: str
    hardware: Hardware | None

    def __str__(self) -> str:
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh)
        ways = {
            "exchange": "by all_to_all and all_gather, from the shardings that are given",
            "custom_partitioning": "by all_to_all and all_gather, when the compiler has chosen shardings",
            "hints": "by sharding hints; with shardings= by fewer collectives",
        }
        share = self.flops / max(self.least_flops, 1)
        platform = f" ({self.platform})" if self.platform else ""
        lines = [
            f"Over the mesh {axes}{platform} matrices are distributed {ways[self.way]}.",
            f"The busiest device computes {_short(self.flops / 1e9)} Gflop ({share:.2f} of an even share) "
            f"and sends {_short(self.sent / 1e6)} MB.",
        ]
        if self.divided:
            lines.append(
                f"{self.divided:,} matrices are each divided over several devices, which send "
                f"{_short(self.inside / 1e6)} MB more in {self.collectives} collectives of the iteration."
            )
        if self.hardware is None:
            lines.append(
                "The speed of the devices is not known, so no matrix is divided. Type divide= with the name "
                "of a device, such as 'v5p', or an optimorph.Hardware."
            )
        else:
            near, far = self.hardware.bytes_near / 1e9, self.hardware.bytes_far / 1e9
            computing, sending = (_short(seconds * 1e3) for seconds in self.seconds)
            lines.append(
                f"Expected at {_short(self.hardware.flops / 1e12)} Tflop/s and {_short(near)} GB/s, "
                f"{_short(far)} between nodes: {computing} ms of products and {sending} ms of sending."
            )
        return "\n".join(lines)


def plan_mesh(
    mesh: Mesh | AbstractMesh,
    match: Match | None,
    polar: Callable[..., Any] | None,
    divide: str | Hardware,
    paths: Sequence[str],
    leaves: Sequence[Any],
    forms: Sequence[Axes | None],
) -> MeshPlan:
    """The plan for leaves over a mesh; shardings that do not fit it or their leaves are refused.

    Args:
      match: the user's rules of shardings; without them the shardings are those of the leaves.
      polar: the function of matrices; None for `NewtonSchulz`.
      divide: what decides whether matrices are divided, as `hardware_for` says.
      forms: how leaves read as matrices; None for no matrix.
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
    platform = _platform(mesh)
    explicit = all(kind is AxisType.Explicit for kind in mesh.axis_types)
    by_compiler = "hints" if platform == "tpu" else "custom_partitioning"
    way = "exchange" if match is not None or explicit else by_compiler
    hardware, method = hardware_for(divide, mesh), NewtonSchulz() if polar is None else polar
    division = division_of(method, hardware, divide != NEVER and way != "hints")
    found = place(sizes, matrices, cost=cost_of(method, hardware), division=division)
    return MeshPlan(**vars(found), platform=platform, way=way, hardware=hardware)


def _short(x: float) -> str:
    return f"{x:,.3g}" if x < 1000 else f"{x:,.0f}"


def _platform(mesh: Mesh | AbstractMesh) -> str:
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    return getattr(mesh.abstract_device, "platform", None) or ""
