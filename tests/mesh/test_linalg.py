"""Functions of matrices whose types or places say that they are divided: what one device computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
import trees
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optimorph import linalg

pytestmark = pytest.mark.usefixtures("float64")

POLAR = {"polynomial": linalg.NewtonSchulz(), "exact": linalg.Exact()}
NUMBERS = {
    "spectral_norm": linalg.spectral_norm,
    "rms_to_rms_norm": lambda x: linalg.rms_to_rms_norm(x, "svd"),
    "stable_rank": linalg.stable_rank,
    "effective_rank": linalg.effective_rank,
    "top_energy": lambda x: linalg.top_energy(x, 2),
    "orthogonality_error": linalg.orthogonality_error,
}
PLACES = [
    ((16, 24), P("data", "model")),
    ((16, 24), P(None, ("data", "model"))),
    ((4, 24, 16), P("data", "model")),
    ((4, 2, 16, 24), P(None, "model", "data")),
    ((2, 4, 16, 24), P("model", "data")),
]


@pytest.mark.examples("explicit-*place0")
@pytest.mark.parametrize("place", PLACES, ids=[f"place{k}" for k in range(len(PLACES))])
@pytest.mark.parametrize("name", [*POLAR, *NUMBERS])
def test_any_sharding(name, place, mode):
    """A polar factor is sharded as the matrices are."""
    f, (shape, spec) = (POLAR | NUMBERS)[name], place
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape))
    there = jax.device_put(x, NamedSharding(trees.mesh_of(8, 2, mode), spec))
    for program in (f, jax.jit(f)):
        got = program(there)
        rounding.close(jax.device_get(got), jax.device_get(f(x)), condition=1e4)
        if name in POLAR and mode is AxisType.Explicit:
            assert got.sharding.is_equivalent_to(there.sharding, x.ndim)
