"""In an eigenbasis: over a mesh the same numbers as on one device, and factors that are divided evenly."""

import jax
import numpy as np
import optax
import pytest
import rounding
import trees
from jax.sharding import AxisType

import optimorph as om

AXES = {"bias": None, "*": "io"} | {k: v for k, v in trees.AXES.items() if k != "*"}
FULL_RANK = {"every": 2, "max_dim": 16, "axes": trees.AXES}
"""Of longer sides the first gradients do not tell all eigenvectors; only rounding errors would."""


def steps(tx, place, dtype=np.float64, count=4):
    params = place(trees.drawn(0, dtype))
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(count):
        updates, state = update(place(trees.drawn(1 + seed, dtype)), state, params)
        params = optax.apply_updates(params, updates)
    return params, updates, state


EXPLICIT = [(layout, 8, AxisType.Explicit) for layout in trees.LAYOUTS]
AUTO = [(layout, 8, AxisType.Auto) for layout in trees.LAYOUTS]


@pytest.mark.examples("fsdp x tensor-8-AxisType.Auto", "mixed-8-AxisType.Explicit")
@pytest.mark.parametrize(("layout", "devices", "mode"), AUTO + EXPLICIT)
@rounding.in_float64
def test_in_every_layout(layout, devices, mode):
    places = trees.shardings(layout, devices, mode)
    tx = om.soap(0.1, eps=1e-2, **FULL_RANK)
    got, want = (steps(tx, place) for place in (lambda tree: trees.put(tree, places), trees.on_one))
    rounding.close(got, want, condition=1e5)
    for name, x in got[1].items():
        assert x.sharding.is_equivalent_to(places[name], x.ndim), (name, x.sharding)
