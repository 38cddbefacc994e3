"""The speed of devices, which decides which matrices are divided over several of them."""

import dataclasses

from jax.sharding import AbstractMesh, Mesh

from optimorph._core.shown import shown

AUTO, NEVER = "auto", "never"
"""Values of `divide`: by the mesh's devices, or not at all."""

PLATFORMS = ("cpu", "gpu", "tpu")


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The speed of one device of a mesh and of its links, for the argument `divide` of `muon`.

    Args:
      platform: "cpu", "gpu" or "tpu".
      flops: floating-point operations per second, in matrix products in the dtype of the iteration.
      bytes_near: bytes per second that a device sends to devices of its own node.
      bytes_far: bytes per second that a device sends to other nodes.
      node: the number of devices in a node. Neighbours in the mesh are in the same node.
      seconds: the least time that a collective takes.

    Raises:
      ValueError: an unknown platform, or a number that is not positive.
    """

    platform: str
    flops: float
    bytes_near: float
    bytes_far: float
    node: int
    seconds: float = 1e-5

    def __post_init__(self):
        if self.platform not in PLATFORMS:
            names = ", ".join(map(repr, PLATFORMS))
            raise ValueError(f"Hardware: platform must be one of {names}, but is {shown(self.platform)}.")
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if not (isinstance(value, int | float) and value > 0):
                raise ValueError(f"Hardware: {field.name} must be a positive number, but is {shown(value)}.")

    def bytes_over(self, span: int) -> float:
        """Bytes per second in a group of devices whose first and last are `span` devices apart."""
        return self.bytes_near if span <= self.node else self.bytes_far


HARDWARE = {
    # Peaks in bfloat16. Near: both links along one axis of the torus, of the four or six links of a chip.
    # Far: the network of the data center. A node is the largest slice. docs.cloud.google.com/tpu/docs/v5e,
    # v5p, v6e (197, 459, 918 Tflop/s; 400, 1200, 800 GB/s of a chip, both directions together; 25, 50,
    # 100 Gb/s of a chip).
    "v5e": Hardware("tpu", 197e12, 100e9, 3.1e9, 256),
    "v5p": Hardware("tpu", 459e12, 200e9, 6.25e9, 6144),
    "v6e": Hardware("tpu", 918e12, 200e9, 12.5e9, 256),
    # Peaks in float16 without sparsity, NVLink each way, and one 400 Gb/s port a GPU between nodes of eight:
    # NVIDIA's data sheets of H100 SXM, H200 SXM and DGX H100.
    "H100": Hardware("gpu", 989e12, 450e9, 50e9, 8, 2e-5),
    "H200": Hardware("gpu", 989e12, 450e9, 50e9, 8, 2e-5),
    # A few cores in float32 and their memory; not of any data sheet.
    "cpu": Hardware("cpu", 100e9, 5e9, 1e9, 64, 2e-4),
}
"""Name → published numbers."""

_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "cpu": "cpu",
}
"""Kind of device → its name in the table. The variants for PCIe have other numbers, and are not in it."""


def hardware_for(divide: str | Hardware, mesh: Mesh | AbstractMesh) -> Hardware | None:
    """The numbers given or named, or else those of the mesh's devices; None if these are not known."""
    if isinstance(divide, Hardware) or divide in HARDWARE:
        return divide if isinstance(divide, Hardware) else HARDWARE[divide]
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device
    return None if device is None else HARDWARE.get(_KINDS.get(device.device_kind, ""))


def check_divide(who: str, divide: object) -> None:
    names = (AUTO, NEVER, *HARDWARE)
    if not (isinstance(divide, Hardware) or (isinstance(divide, str) and divide in names)):
        raise ValueError(
            f"{who}: divide must be one of {', '.join(map(repr, names))}, or a Hardware, but is "
            f"{shown(divide)}."
        )
