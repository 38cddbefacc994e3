"""Norms of leaves and logits of heads over a mesh: the updates are those of one device."""

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

CLIPS = {"clip_norm": om.clip_norm(2.0), "clip_rms": om.clip_rms(0.5), "mars_adamw": om.mars_adamw(0.1)}
CLIPS |= {"cautious": om.cautious(om.ema(0.5))}


def stepped(tx, place, **extra):
    params, gradients = (place(trees.drawn(seed, np.float64)) for seed in (0, 1))
    return jax.jit(tx.update)(gradients, tx.init(params), params, **extra)[0]


@functools.cache
def clipped_on_one_device(name):
    return stepped(CLIPS[name], trees.on_one)


@pytest.mark.examples("auto-mixed-clip_norm")
@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("layout", ["fsdp x tensor", "mixed"])
@rounding.in_float64
def test_clipped_in_every_layout(layout, name, mode):
    places = trees.shardings(layout, 8, mode)
    got = stepped(CLIPS[name], lambda tree: trees.put(tree, places))
    rounding.close(got, clipped_on_one_device(name), units=256)
    for leaf, x in got.items():
        assert x.sharding.is_equivalent_to(places[leaf], x.ndim)


@pytest.mark.parametrize("name", ["clip_norm", "clip_rms", "cautious"])
@rounding.in_float64
def test_clipped_inside_shard_map(name):
    """Of whole leaves, whatever a device has of them."""
    shapes = {"up": (8, 24), "bias": (16,), "whole": (3,)}
    specs = {"up": P("data", "model"), "bias": P("data"), "whole": P()}
    mesh = trees.mesh_of(8, 2, jax.sharding.AxisType.Auto)
    g = trees.drawn(0, np.float64, shapes)

    def run(shardings):
        tx = getattr(om, name)(om.sign() if name == "cautious" else 0.3, shardings)
        return lambda g: tx.update(g, tx.init(g))[0]

    got = jax.jit(jax.shard_map(run(specs), mesh=mesh, in_specs=(specs,), out_specs=specs))(g)
    rounding.close(got, run(None)(trees.on_one(g)), units=64)
    unsaid = jax.shard_map(run(None), mesh=mesh, in_specs=(specs,), out_specs=specs)
    with pytest.raises(
        ValueError, match=rf"{name}: inside jax\.shard_map or pmap over .* such as shardings="
    ):
        jax.eval_shape(unsaid, g)


def test_collectives_of_clipping():
    """Two numbers for each leaf that is divided."""
    mesh = trees.mesh_of(8, 2, jax.sharding.AxisType.Auto)
    leaf = jax.ShapeDtypeStruct((64, 128), np.float32, sharding=NamedSharding(mesh, P("data", "model")))
    params = {f"w{k}": leaf for k in range(4)}
    tx = om.clip_norm(1.0)
    found = hlo.counted(jax.jit(lambda g: tx.update(g, tx.init(g))[0]).lower(params).compile())
    assert set(found.collectives) == {"all-reduce"}
    assert found.sent <= 2 * 4 * 2 * 4 * 2  # over two mesh axes


ATTENTION = {"query/kernel": (16, 8, 4), "key/kernel": (16, 4, 4), "query/bias": (8, 4), "other": (16, 16)}
PLACES = {
    "query/kernel": P("data", "model", None),
    "key/kernel": P(None, "model", "data"),
    "query/bias": P("model"),
    "other": P("data", "model"),
}
LOGITS = np.array([150.0, 80.0, 1e3, 5.0, -1.0, 100.0, 101.0, 400.0])


@rounding.in_float64
def test_logits_of_heads_over_a_mesh(mode):
    mesh = trees.mesh_of(8, 2, mode)
    places = {name: NamedSharding(mesh, spec) for name, spec in PLACES.items()}
    params, g = (trees.drawn(seed, np.float64, ATTENTION) for seed in (0, 1))
    tx = om.chain(om.adamw(0.1), om.clip_attention_logits())
    given = {"attention_logits": {"": jax.numpy.asarray(LOGITS)}}

    def step(place, logits):
        w, s = place(params), {"": logits}
        return jax.jit(tx.update)(place(g), tx.init(w), w, attention_logits=s)[0], jax.jit(om.qk_clip)(w, s)

    want = step(trees.on_one, LOGITS)
    for logits in (LOGITS, jax.device_put(LOGITS, NamedSharding(mesh, P("data")))):
        got = step(lambda tree: trees.put(tree, places), logits)
        rounding.close(got, want, units=64)
        for tree in got:
            for name, x in tree.items():
                assert x.sharding.is_equivalent_to(places[name], x.ndim), name
    w = trees.put(params, places)
    program = jax.jit(tx.update).lower(trees.put(g, places), tx.init(w), w, **given).compile()
    assert not hlo.counted(program).collectives
