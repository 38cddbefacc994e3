"""Norms over a mesh are those of whole matrices, by one small all_reduce."""

import functools

import hlo
import jax
import numpy as np
import pytest
import rounding
import trees
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optimorph as om

ZEROS = {"layers": np.s_[3], "fused": np.s_[:, 16:32], "grouped": np.s_[:, :32]}
"""One matrix of each of these leaves, which takes the plain step."""


def stepped(place):
    tx = om.hyperball(0.1, trees.AXES)
    params, gradients = (trees.drawn(seed, np.float64) for seed in (0, 1))
    for name, where in ZEROS.items():
        params[name][where] = 0
    params, gradients = place(params), place(gradients)
    return jax.jit(tx.update)(gradients, tx.init(params), params)[0]


@functools.cache
def on_one_device():
    updates = stepped(trees.on_one)
    for name, where in ZEROS.items():
        rounding.close(updates[name][where], -0.1 * trees.drawn(1, np.float64)[name][where])
    return updates


@pytest.mark.examples("auto-fsdp x tensor", "explicit-mixed")
@pytest.mark.parametrize("layout", trees.LAYOUTS)
@rounding.in_float64
def test_in_every_layout(layout, mode):
    places = trees.shardings(layout, 8, mode)
    got = stepped(lambda tree: trees.put(tree, places))
    rounding.close(got, on_one_device(), units=64)
    for name, x in got.items():
        assert x.sharding.is_equivalent_to(places[name], x.ndim)


@rounding.in_float64
def test_inside_shard_map():
    """Where local shards have their own sums, which are added over the mesh axes of a matrix alone."""
    shapes = {"up": (8, 24), "layers": (8, 4, 16), "bias": (16,)}
    specs = {"up": P("data", "model"), "layers": P("data", None, "model"), "bias": P("data")}
    tx = om.hyperball(0.1, {"layers": "bio", "bias": None, "*": "io"}, specs)
    mesh = trees.mesh_of(8, 2, jax.sharding.AxisType.Auto)
    params, gradients = (trees.drawn(seed, np.float64, shapes) for seed in (0, 1))

    def run(g, p):
        return tx.update(g, tx.init(p), p)[0]

    got = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(specs, specs), out_specs=specs))(gradients, params)
    rounding.close(got, run(trees.on_one(gradients), trees.on_one(params)), units=64)
    unsaid = om.adamh(0.1, axes={"layers": "bio", "bias": None, "*": "io"})
    step = jax.shard_map(
        lambda g, p: unsaid.update(g, unsaid.init(p), p)[0],
        mesh=mesh,
        in_specs=(specs, specs),
        out_specs=specs,
    )
    with pytest.raises(
        ValueError, match=r"adamh: inside jax\.shard_map or pmap over .*, 'bias' .* such as shardings="
    ):
        jax.eval_shape(step, gradients, params)


def test_collectives():
    """One all_reduce of six numbers for each matrix, with that of the others: no sum waits for another."""
    mesh = trees.mesh_of(8, 2, jax.sharding.AxisType.Auto)
    places = {
        f"w{k}": NamedSharding(mesh, P(*[("data", "model"), None][:: 1 - 2 * (k % 2)])) for k in range(4)
    }
    params = {k: jax.ShapeDtypeStruct((64, 128), np.float32, sharding=place) for k, place in places.items()}
    tx = om.hyperball(0.1, {"*": "io"})
    program = jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0]).lower(params, params).compile()
    found = hlo.counted(program)
    assert found.collectives == {"all-reduce": 1}
    assert found.sent <= 2 * 4 * 6 * 4


@pytest.mark.parametrize("spec", ["i(3o)", "i(12o)", "i(2+1 o)"])
def test_blocks_that_lie_on_several_devices(spec):
    """Also then one all_reduce: no block is sent."""
    place = NamedSharding(trees.mesh_of(8, 2, jax.sharding.AxisType.Auto), P(None, ("data", "model")))
    w = jax.ShapeDtypeStruct((64, 192), np.float32, sharding=place)
    for tx in (om.hyperball(0.1, {"*": spec}), om.keep_norm(om.sign(), {"*": spec})):
        program = jax.jit(lambda g, w, tx=tx: tx.update(g, tx.init(w), w)[0]).lower(w, w).compile()
        assert hlo.counted(program).collectives == {"all-reduce": 1}
