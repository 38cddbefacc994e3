"""Sharding hints: they divide the work on TPUs, without `custom_partitioning`, and in exported programs."""

import re

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
import sharding
import trees
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optimorph as om
from optimorph._core.target import Target
from optimorph._distributed.sharded_function import ShardedFunction, _of_compiler
from optimorph.linalg import Axes, NewtonSchulz

POLAR = NewtonSchulz(steps=2)
TX = om.orthogonalize(POLAR, trees.AXES)
SHAPES = sharding.transformer(width=32)


def orthogonalized(gradients):
    return TX.update(gradients, TX.init(gradients))[0]


@pytest.mark.examples("mixed", "fsdp x tensor")
@pytest.mark.parametrize("layout", trees.LAYOUTS)
@rounding.in_float64
def test_an_exported_update(layout):
    """It runs elsewhere, and is the update of one device."""
    gradients, places = trees.drawn(0, np.float64), trees.shardings(layout, 8, jax.sharding.AxisType.Auto)
    placed = trees.put(gradients, places)
    exported = jax.export.export(jax.jit(orthogonalized, out_shardings=places))(placed)
    rounding.close(
        jax.jit(exported.call)(placed), orthogonalized(trees.on_one(gradients)), condition=POLAR.table.slope
    )


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_exported_for_any_platform(platform):
    """From any host: 8 devices, and the iteration in the dtype that suits the platform."""
    places = trees.shardings("fsdp x tensor", 8, jax.sharding.AxisType.Auto)
    shapes = {n: jax.ShapeDtypeStruct(s, jnp.float32, sharding=places[n]) for n, s in trees.SHAPES.items()}
    update = jax.jit(lambda g: om.orthogonalize(None, trees.AXES).update(g, optax.EmptyState())[0])
    exported = jax.export.export(update, platforms=[platform])(shapes)
    assert exported.nr_devices == 8
    text = exported.mlir_module()
    assert ("CustomSPMDPartitioning" in text, "bf16" in text, "xf16>" in text) == (
        False,
        platform == "tpu",
        platform == "cuda",
    )


@pytest.mark.examples("FSDP 4 x TP 2")
@pytest.mark.parametrize("layout", sharding.LAYOUTS)
def test_the_work_is_divided(layout):
    """As evenly as by the exchange; nothing is sent within the iteration."""
    places, least = sharding.shardings(layout, SHAPES), sharding.least(layout, SHAPES)
    leaves = jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place),
        SHAPES,
        places,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    tx = sharding.ours()
    exported = jax.export.export(jax.jit(lambda g: tx.update(g, tx.init(g))[0], out_shardings=places))(leaves)
    found = hlo.counted(jax.jit(exported.call).lower(leaves).compile())
    assert least["flops"] <= found.flops <= 1.09 * least["flops"]
    assert found.in_loops == 0


def test_the_mesh_may_stand_in_in_shardings_alone():
    place = NamedSharding(trees.mesh_of(8, 1, jax.sharding.AxisType.Auto), P("data"))
    shape = jax.ShapeDtypeStruct((16, 24), jnp.float32)
    tx = om.orthogonalize(POLAR, {"*": "io"})
    update = jax.jit(lambda *g: tx.update(g, tx.init(g))[0], in_shardings=place)
    text = jax.export.export(update, platforms=["tpu"])(*[shape] * 8).mlir_module()
    assert "sdy.sharding_constraint" in text
    assert "manual_axes" in text


def alone(f):
    return f


@pytest.mark.parametrize("way", [alone, jax.vmap])
def test_one_device_exports_for_a_tpu(way):
    """What is moved is in bfloat16, and no constraint on layouts, which cannot be saved."""
    tx = om.muon(0.1, axes={"*": "io"})
    update = jax.jit(way(lambda g: tx.update(g, tx.init(g), g)[0]))
    shapes = [jax.ShapeDtypeStruct((24, 8) if way is alone else (3, 24, 8), jnp.float32)] * 2
    text = jax.export.export(update, platforms=["tpu"])(shapes).mlir_module()
    assert re.search(r"concatenate.*xbf16>", text)


def test_a_mesh_that_is_not_known():
    task = ShardedFunction(POLAR, (Axes("io"),))
    x = jnp.ones((8, 24))
    with pytest.warns(UserWarning, match=r"every device computes every matrix.*shardings="):
        (got,) = _of_compiler(task, Target("cpu", 8, exported=True), x)
    rounding.close(got, POLAR(x), condition=POLAR.table.slope)
