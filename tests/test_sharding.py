"""On 8 devices the updates are those of one device, and elementwise recipes talk to nobody."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

import optimorph as om

name = sys.argv[1]
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
tx = getattr(om, name)(0.1)
rng = np.random.default_rng(0)
draw = lambda: {"w": jnp.asarray(rng.standard_normal((16, 24)), jnp.float32), "b": jnp.ones(24)}
layouts = {"rows": {"w": P("data", None), "b": P("data")}, "columns": {"w": P(None, "data"), "b": P()}}
params, steps = draw(), [draw() for _ in range(3)]
update = jax.jit(tx.update)

def run(place):
    p = place(params)
    state = tx.init(p)
    for g in steps:
        updates, state = update(place(g), state, p)
    return updates, state

expected = run(lambda tree: tree)
for layout in layouts.values():
    place = lambda tree: {k: jax.device_put(x, NamedSharding(mesh, layout[k])) for k, x in tree.items()}
    updates, state = run(place)
    for got, want in zip(jax.tree.leaves((updates, state)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    if name == "muon":
        continue
    for k, x in updates.items():
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, layout[k]), x.ndim), (k, x.sharding)
    text = update.lower(place(steps[0]), state, place(params)).compile().as_text()
    assert not [op for op in ("all-gather", "all-reduce", "all-to-all", "permute") if op in text]
print("same")
"""


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rmsprop", "adam", "nadam", "adamw", "nadamw", "muon"])
def test_sharded_equals_unsharded(name):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, name],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout.strip() == "same", process.stderr[-2000:]
