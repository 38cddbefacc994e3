"""Two processes of four devices each train together; their checkpoint goes on over another mesh."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import pytest
import rounding
import trees
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimorph as om
from optimorph.linalg import NewtonSchulz

pytestmark = pytest.mark.usefixtures("float64")
ROOT = Path(__file__).parent.parent.parent

TRAIN = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import optimorph as om

SPECS = {"up": P(None, "data"), "down": P("model", "data"), "bias": P()}
SHAPES = {"up": (8, 24), "down": (24, 8), "bias": (16,)}
tx = om.muon(0.1, axes={"bias": None, "*": "io"})

def drawn(seed, places):
    rng = np.random.default_rng(seed)
    whole = {n: rng.standard_normal(s) for n, s in SHAPES.items()}
    made = jax.make_array_from_callback
    return {n: made(x.shape, places[n], lambda i, x=x: x[i]) for n, x in whole.items()}

def train(places, steps, params=None, state=None):
    params = drawn(0, places) if params is None else params
    state = jax.jit(tx.init)(params) if state is None else state
    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state
    for seed in steps:
        params, state = step(params, state, drawn(1 + seed, places))
    return params, state

if __name__ == "__main__":
    port, rank, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    assert (jax.local_device_count(), jax.device_count()) == (4, 8)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params, state = train({n: NamedSharding(mesh, s) for n, s in SPECS.items()}, [0, 1])
    with ocp.StandardCheckpointer() as keeper:
        keeper.save(folder, {"params": params, "state": state})
    jax.distributed.shutdown()
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_processes_and_a_checkpoint_on_another_mesh(tmp_path):
    script, folder, port = tmp_path / "train.py", tmp_path / "kept", str(free_port())
    script.write_text(TRAIN)
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    both = [
        subprocess.Popen(
            [sys.executable, str(script), port, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in both:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out[-3000:]

    names: dict = {"__name__": "train"}
    exec(script.read_text(), names)
    one = {n: jax.sharding.SingleDeviceSharding(jax.devices()[0]) for n in names["SHAPES"]}
    mesh = trees.mesh_of(8, 1, AxisType.Auto)
    other = {n: NamedSharding(mesh, P("data")) for n in names["SHAPES"]}
    params, state = names["train"](one, [0, 1])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, P("data") if x.ndim else P())
        ),
        {"params": params, "state": state},
    )
    with ocp.StandardCheckpointer() as keeper:
        kept = keeper.restore(folder, shapes)
    condition = NewtonSchulz().table.slope
    rounding.close(kept["params"], params, units=1, condition=condition)
    carried, _ = om.carry_state(kept["state"], names["tx"], kept["params"], strict=True)
    on = names["train"](other, [2], kept["params"], carried)[0]
    want = names["train"](one, [2], params, state)[0]
    rounding.close(on, want, units=1, condition=condition)
