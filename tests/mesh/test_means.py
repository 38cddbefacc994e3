"""Means and norms over a mesh are those of whole matrices, by few small all_reduces."""

import functools

import hlo
import jax
import numpy as np
import pytest
import rounding
import sharding
import trees
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimorph as om
from optimorph.linalg import NewtonSchulz

POLAR = NewtonSchulz(steps=2)
SHAPES = {"up": (8, 24), "layers": (8, 4, 16), "down": (24, 8), "fused": (16, 48), "bias": (16,)}
SPECS = {
    "up": P("data", "model"),
    "layers": P("data", None, "model"),
    "down": P("model", "data"),
    "fused": P("data"),
    "bias": P("data"),
}
AXES = {name: trees.AXES.get(name, "io") for name in SHAPES}
TX = {
    "normuon": om.normuon,
    "shorter": functools.partial(om.normuon, average="shorter"),
    "adamuon": om.adamuon,
    "muon2": om.muon2,
}
each = pytest.mark.parametrize("name", TX)


def stepped(name, place):
    """Two updates."""
    tx = TX[name](0.1, axes=trees.AXES, orthogonalizer=POLAR)
    params, *gradients = (place(trees.drawn(seed, np.float64)) for seed in range(3))
    state, update = tx.init(params), jax.jit(tx.update)
    for g in gradients:
        updates, state = update(g, state, params)
    return updates


@functools.cache
def on_one_device(name):
    return stepped(name, trees.on_one)


LAYOUTS = [("normuon", layout) for layout in ("replicated", "tensor", "fsdp x tensor", "mixed")]
LAYOUTS += [(name, "mixed") for name in TX if name != "normuon"]


@pytest.mark.examples("explicit-shorter-mixed")
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
@rounding.in_float64
def test_in_every_layout(layout, name, mode):
    places = trees.shardings(layout, 8, mode)
    got = stepped(name, lambda tree: trees.put(tree, places))
    rounding.close(got, on_one_device(name), condition=20 * POLAR.table.slope)
    for leaf, x in got.items():
        assert x.sharding.is_equivalent_to(places[leaf], x.ndim)


@pytest.mark.examples("shorter")
@each
@rounding.in_float64
def test_inside_shard_map(name):
    make = functools.partial(TX[name], 0.1, axes=AXES, orthogonalizer=POLAR)
    mesh = trees.mesh_of(8, 2, jax.sharding.AxisType.Auto)
    params, gradients = (trees.drawn(seed, np.float64, SHAPES) for seed in (0, 1))

    def run(g, p, **shardings):
        tx = make(**shardings)
        return tx.update(g, tx.init(p), p)[0]

    local = functools.partial(run, shardings=SPECS)
    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(SPECS, SPECS), out_specs=SPECS))(
        gradients, params
    )
    want = run(trees.on_one(gradients), trees.on_one(params))
    rounding.close(got, want, condition=20 * POLAR.table.slope)


def factored(g, p, jit=jax.jit, **arguments):
    tx = om.factored(0.9, **arguments)
    state = tx.init(p)
    for _ in range(2):
        updates, state = jit(tx.update)(jax.tree.map(lambda x: x * x, g), state, p)
    return updates


@pytest.mark.parametrize("specs", [SPECS, dict.fromkeys(SHAPES, P())], ids=["divided", "replicated"])
@rounding.in_float64
def test_factored_inside_shard_map(specs):
    """Rows and columns have the means of whole matrices."""
    params, gradients = (trees.drawn(seed, np.float64, SHAPES) for seed in (0, 1))
    local = functools.partial(factored, axes=AXES, shardings=specs)
    mesh = trees.mesh_of(8, 2, AxisType.Auto)
    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs, specs), out_specs=specs))(
        gradients, params
    )
    want = factored(trees.on_one(gradients), trees.on_one(params), axes=AXES)
    rounding.close(got, want, condition=20)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@rounding.in_float64
def test_factored_convolutions(jit, mode):
    """Their inputs, of which one axis is divided, are one side of a matrix."""
    g = trees.drawn(1, np.float64, {"kernel": (3, 3, 16, 8)})
    place = NamedSharding(trees.mesh_of(8, 2, mode), P(None, None, "data"))
    got = factored(*[jax.device_put(g, place)] * 2, jit)
    rounding.close(got, factored(*[trees.on_one(g)] * 2), condition=20)
    assert mode == AxisType.Auto or got["kernel"].sharding.is_equivalent_to(place, 4)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_rows_and_columns_are_divided_as_batches(jit, mode):
    """Of experts each device has its own, also in the first state."""
    tx, mesh = (
        om.factored(0.9, axes={"experts": "bio", "kernel": "io", "fused": "bi(2o)"}),
        trees.mesh_of(8, 1, mode),
    )
    shapes = {"experts": (16, 8, 4), "kernel": (8, 4), "fused": (8, 4, 6)}
    place = NamedSharding(mesh, P("data"))
    params = {name: jax.device_put(np.ones(shape, np.float32), place) for name, shape in shapes.items()}
    init = jit(tx.init) if mode == AxisType.Explicit else tx.init  # Auto axes are not in the types of arrays
    with jax.set_mesh(mesh):
        state = init(params)
        after = jit(tx.update)(params, state, params)[1]
    assert {name: x.shape for name, x in state.rows.items()} == {
        "experts": (16, 8),
        "kernel": (8,),
        "fused": (8, 2, 4),
    }
    assert {name: x.shape for name, x in state.columns.items()} == {
        "experts": (16, 4),
        "kernel": (4,),
        "fused": (8, 2, 3),
    }
    for side in (state.rows, state.columns, after.rows, after.columns):
        assert side["experts"].sharding.is_equivalent_to(place, 2)


def test_the_average_of_a_vector_is_divided_as_the_vector(mode):
    place = NamedSharding(trees.mesh_of(8, 2, mode), P("data"))
    state = om.factored(0.9).init({"bias": jax.device_put(np.ones(16, np.float32), place)})
    assert state.rows["bias"].sharding.is_equivalent_to(place, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rows", "norms"), [("normuon", 1, 2), ("adamuon", 0, 1), ("muon2", 0, 0)])
def test_collectives(name, rows, norms):
    """Beside the exchange all_reduces of a number for each output, and of as many as two for each matrix."""
    shapes = sharding.transformer(width=32)
    places = sharding.shardings("FSDP 4 x TP 2", shapes)
    leaves = [x for layer in shapes.values() for x in layer.values()]
    muon, other = (
        sharding.counts(getattr(om, own)(0.02, axes={"*": "io"}, weight_decay=0.0), shapes, places)
        for own in ("muon", name)
    )
    assert other["collectives"].pop("all-reduce", 0) <= (len(leaves) + 4 if rows else 4 * norms)
    assert other["collectives"] == muon["collectives"]
    numbers = rows * sum(outputs for _, outputs in leaves) + norms * len(leaves)
    each = (
        4 * 2 * (3 / 4 + 1 / 2)
    )  # bytes of a number over 4 devices and then over 2; over all 8 at once it is less
    assert other["sent"] - muon["sent"] <= each * numbers


@pytest.mark.parametrize(
    ("spec", "over"), [("i(3o)", "o"), ("(3i)o", "i"), ("i(2o)", "o"), ("i(2+1 o)", "o")]
)
def test_blocks_that_lie_on_several_devices(spec, over):
    """One all-reduce of one number for each mean: no block is sent."""
    mesh = trees.mesh_of(8, 2, jax.sharding.AxisType.Auto)
    sides = [None, ("data", "model")][:: 1 if over == "o" else -1]
    w = jax.ShapeDtypeStruct((192, 192), np.float32, sharding=NamedSharding(mesh, P(*sides)))
    tx = om.mean(over, axes={"*": spec})
    found = hlo.counted(jax.jit(lambda g: tx.update(g, tx.init(g))[0]).lower(w).compile())
    assert found.collectives == {"all-reduce": 1}
    assert found.sent <= 2 * 4 * 192 * 3
