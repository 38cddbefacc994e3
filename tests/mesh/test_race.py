"""A race on parameters and batches that are divided over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimorph as om


@pytest.fixture(autouse=True)
def _standard_promotion():
    """Matplotlib is not written for strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] - y) ** 2)


@pytest.mark.slow
def test_a_race_is_that_of_one_device():
    rng = np.random.default_rng(0)
    params = {"up": rng.standard_normal((16, 32)), "down": rng.standard_normal((32, 3))}
    params = {name: jnp.asarray(value / 4, jnp.float32) for name, value in params.items()}
    batches = [
        (rng.standard_normal((32, 16)).astype(np.float32), rng.standard_normal((32, 3)).astype(np.float32))
        for _ in range(4)
    ]
    mesh = jax.make_mesh((16,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    results = [
        om.race(
            loss,
            tree,
            given,
            {"adamw": om.adamw, "muon": om.muon(0.02, axes={"*": "io"})},
            learning_rates={"adamw": [1e-3, 1e-2]},
            held_out=given[-1:],
            steps=6,
            progress=False,
        )
        for tree, given in ((params, batches), jax.device_put((params, batches), rows))
    ]
    alone, divided = (dict(sorted((row.name, row) for row in result.rows)) for result in results)
    for name, row in alone.items():
        assert divided[name].loss == pytest.approx(row.loss, rel=1e-4)
        assert divided[name].steps == 6
        assert divided[name].state_bytes_per_parameter == pytest.approx(row.state_bytes_per_parameter)
