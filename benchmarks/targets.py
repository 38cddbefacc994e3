"""Compile for TPUs and GPUs that are not there, and count what their compilers made.

    pip install 'jax[tpu]'                                  TPUs: libtpu, .7 GB on disk
    pip install 'jax[cuda12-local]' nvidia-cuda-nvcc-cu12   GPUs: .6 GB; a description replaces the device

    mesh = mesh_of("v5p:2x2x2", {"data": 4, "model": 2})
    counted(compiled(f, *arguments, mesh=mesh))

`JAX_PLATFORMS=cpu` must be set before jax is imported, as this module does: the CUDA plugin refuses to load
without a driver.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
if "autotune_level" not in os.environ.get("XLA_FLAGS", "") and not os.environ.get("TARGETS_WITHOUT_GPU"):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"

import collections
import importlib.util
import math
import re

import hlo
import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

H100 = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "shared_memory_per_core": 233472,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "memory_bandwidth": 3352320000000,
    "l2_cache_size": 52428800,
    "clock_rate_ghz": 1.98,
    "device_memory_size": 84942979072,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}
"""An H100 SXM, as XLA describes devices."""

GPU = (
    "gpu_device_info { "
    + " ".join(f"{name}: {value}" for name, value in H100.items())
    + ' cuda_compute_capability { major: 9 minor: 0 } } platform_name: "CUDA" '
    + 'dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3"'
)


def available(target):
    """Whether the compiler for a target is installed."""
    return importlib.util.find_spec("jax_cuda12_plugin" if target == "H100" else "libtpu") is not None


def mesh_of(target, axes, mode=AxisType.Auto):
    """A mesh of devices that are not there.

    Args:
      target: "H100", or a TPU with its topology: "v5e:2x4", "v5p:2x2x2", "v6e:4x4".
      axes: name → size.
      mode: of all axes.
    """
    count = math.prod(axes.values())
    if target == "H100":
        shape = f"1x1x{count}"
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=shape, target_config=GPU, topology=shape
        )
    else:
        found = topologies.get_topology_desc(platform="tpu", topology_name=target)
    devices = np.array(found.devices[:count]).reshape([*axes.values()])
    return Mesh(devices, tuple(axes), axis_types=(mode,) * len(axes))


def compiled(f, *arguments, mesh, **options):
    """The program of a function for the devices of a mesh; options are those of `jax.jit`."""
    platform = "cuda" if mesh.devices.flat[0].platform in ("gpu", "cuda") else "tpu"
    return jax.jit(f, **options).trace(*arguments).lower(lowering_platforms=(platform,)).compile()


def counted(program):
    """Of one device: collectives, Gflop, temporaries, and TPU cycles or GPU kernels.

    Cycles are the compiler's estimate for products and for the rest; they hold no communication.
    """
    text, memory = program.as_text(), program.memory_analysis()
    cost = program.cost_analysis() or {}
    found = hlo.counted(program)
    cycles = _cycles(text)
    return {
        "collectives": dict(found.collectives),
        "in_loops": found.in_loops,
        "sent": found.sent,
        "gflop": (cost.get("flops", 0) or found.flops) / 1e9,
        "temporary": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "mcycles": {kind: count / 1e6 for kind, count in cycles.items()},
        "kernels": hlo.launched(program)[0] if not cycles else 0,
    }


def product_dtypes(text):
    """The dtypes of what is multiplied in products of matrices, as HLO names them."""
    types = dict(re.findall(r"^\s+(?:ROOT )?(%[\w.\-]+) = ([a-z]+\d+)\[", text, re.MULTILINE))
    products = re.findall(r" (?:convolution|dot)\((%[\w.\-]+), (%[\w.\-]+)\)", text)
    products += re.findall(r" custom-call\((%[\w.\-]+), (%[\w.\-]+)\), custom_call_target=\"__cublas", text)
    return {types[operand] for pair in products for operand in pair if operand in types}


def _cycles(text):
    """The sum of the compiler's estimates over the entry computation; loops as often as they run."""
    bodies, name, entry = {}, None, None
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) ?\(.*\{$", line):
            name = head.group(2)
            bodies[name] = []
            entry = name if head.group(1) else entry
        elif name is not None:
            bodies[name].append(line)
    found = collections.Counter()

    def turns(line):
        """Those that the compiler writes down, or, on TPUs, the number that the condition compares with."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        condition = re.search(r"condition=%?([\w.\-]+)", line).group(1)
        known = known or re.search(r" constant\((\d+)\)", "\n".join(bodies[condition]))
        return int(known.group(1)) if known else 1

    def add(body, times):
        for line in bodies.get(body, ()):
            if estimate := re.search(r'"estimated_cycles":"(\d+)"', line):
                kind = "products" if "convolution" in line else "rest"
                found[kind] += int(estimate.group(1)) * times
            if loop := re.search(r"while\(.*body=%?([\w.\-]+)", line):
                add(loop.group(1), times * turns(line))

    add(entry, 1)
    return found
