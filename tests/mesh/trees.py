"""Parameters of every kind, and the ways in which they lie over meshes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

MODES = (AxisType.Auto, AxisType.Explicit)

SHAPES = {
    "query": (16, 16),
    "key": (16, 16),
    "out": (16, 16),
    "up": (16, 64),
    "down": (64, 16),
    "heads": (16, 8, 4),
    "fused": (16, 48),
    "grouped": (16, 64),
    "window": (2, 2, 4, 32),
    "layers": (16, 16, 32),
    "odd": (3, 6, 24),
    "lone": (6, 24),
    "bias": (16,),
}

AXES = {
    "heads": "ioo",
    "fused": "i(3o)",
    "grouped": "i(2+1+1 o)",
    "window": "iiio",
    "layers": "bio",
    "odd": "bio",
    "bias": None,
    "*": "io",
}

ROW_PARALLEL = ("out", "down")


def fsdp_first(name, shape):
    return P(*("data" if k == (len(shape) > 2) * (len(shape) - 2) else None for k in range(len(shape))))


def fsdp_last(name, shape):
    return P(*[None] * (len(shape) - 1), "data")


def tensor(name, shape):
    if name in ROW_PARALLEL:
        return P("data", None)
    return P(None, "data") if len(shape) == 2 else {"heads": P(None, "data", None)}.get(name, P())


def both(name, shape):
    if len(shape) == 1:
        return P("data")
    rows, columns = ("model", "data") if name in ROW_PARALLEL else ("data", "model")
    return P(*[None] * (len(shape) - 2), rows, columns)


def stacks(name, shape):
    return P("data") if name == "layers" else P()


def mixed(name, shape):
    return {
        "query": P("data", None),
        "key": P(None, "model"),
        "up": P(("data", "model"), None),
        "down": P(None, ("model", "data")),
        "heads": P("model", None, "data"),
        "fused": P(None, "model"),
        "grouped": P("data", "model"),
        "window": P(None, "model", None, "data"),
        "layers": P("model", "data", None),
    }.get(name, P())


LAYOUTS = {
    "replicated": (lambda name, shape: P(), 1),
    "fsdp, first axis": (fsdp_first, 1),
    "fsdp, last axis": (fsdp_last, 1),
    "tensor": (tensor, 1),
    "fsdp x tensor": (both, 2),
    "hybrid: data axis of two": (fsdp_last, 2),
    "stacks": (stacks, 1),
    "mixed": (mixed, 2),
}
"""Name → (name and shape of a leaf → its spec, axes of the mesh)."""


def mesh_of(devices, axes, mode):
    shape = (devices,) if axes == 1 else (devices // 2, 2)
    names = ("data", "model")[:axes]
    return jax.make_mesh(shape, names, axis_types=(mode,) * axes, devices=jax.devices()[:devices])


def shardings(layout, devices, mode, shapes=None):
    spec, axes = LAYOUTS[layout]
    mesh = mesh_of(devices, axes, mode)

    def fitting(name, shape):
        """Without the mesh axes that do not divide it, which arrays outside of programs must not have."""
        entries = tuple(spec(name, shape))
        entries += (None,) * (len(shape) - len(entries))
        kept = []
        for size, entry in zip(shape, entries, strict=True):
            names = (entry,) if isinstance(entry, str) else entry or ()
            count = int(np.prod([mesh.shape[n] for n in names]))
            kept.append(entry if size % count == 0 else None)
        return P(*kept)

    return {n: NamedSharding(mesh, fitting(n, s)) for n, s in (shapes or SHAPES).items()}


def drawn(seed, dtype=jnp.float32, shapes=None):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in (shapes or SHAPES).items()}


def put(tree, places):
    return {name: jax.device_put(x, places[name]) for name, x in tree.items()}


def on_one(tree):
    return {name: jax.device_put(x, jax.devices()[0]) for name, x in tree.items()}
