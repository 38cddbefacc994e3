"""Matrices that are divided over devices: as if they were whole, with the collectives that the plan says."""

import functools

import hlo
import jax
import numpy as np
import optax
import pytest
import rounding
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimorph as om
from optimorph._distributed.groups import Leaf
from optimorph._distributed.placement import place
from optimorph._distributed.roles import cost_of, division_of
from optimorph._distributed.shardings import spec_of
from optimorph.linalg import Axes, NewtonSchulz

pytestmark = pytest.mark.usefixtures("float64")
FREE = om.Hardware("cpu", 1.0, 1e30, 1e30, 8, 1e-30)
"""For devices that send in no time each computes its own rows of polynomials."""
SLOW = om.Hardware("cpu", 1.0, 1e30, 1e30, 8, 1e4)
"""Where a collective takes as long as ten thousand products, all repeat the polynomials of one matrix."""
SHAPES = {"wide": (3, 9, 40), "square": (5, 16, 16), "tall": (1, 40, 16), "zero": (1, 8, 16)}
SPECS = {"wide": P(None, None, "model"), "square": P(None, "data", "model"), "tall": P(), "zero": P()}
AXES = {"*": "bio"}


def drawn():
    rng = np.random.default_rng(0)
    g = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    return g | {"tall": 1e-200 * g["tall"], "zero": 0 * g["zero"]}


def mesh(mode=AxisType.Auto):
    return jax.make_mesh((2, 4), ("data", "model"), (mode,) * 2, devices=jax.devices()[:8])


def updated(tx, g):
    return tx.update(g, optax.EmptyState())[0]


@pytest.mark.examples("gram-FREE")
@pytest.mark.parametrize("divide", [FREE, SLOW], ids=["FREE", "SLOW"])
@pytest.mark.parametrize("iteration", ["gram", "standard"])
def test_updates_and_counts(iteration, divide):
    """Equal to those of whole matrices; counted in the program as planned from shapes."""
    polar, g = NewtonSchulz(steps=3, iteration=iteration), drawn()
    places = {name: NamedSharding(mesh(), spec) for name, spec in SPECS.items()}
    tx = om.orthogonalize(polar, AXES, places, divide=divide)
    there = {name: jax.device_put(x, places[name]) for name, x in g.items()}
    program = jax.jit(lambda g: updated(tx, g)).lower(there).compile()
    got, want = program(there), jax.jit(lambda g: updated(om.orthogonalize(polar, AXES), g))(g)
    for name, x in want.items():
        np.testing.assert_allclose(np.asarray(got[name]), np.asarray(x), rtol=0, atol=1e-11)
    found, plan = hlo.counted(program), planned(polar, places, divide)
    outside = sum(
        2 * bool(e.roles.all_to_all) + bool(e.roles.replica) + bool(e.roles.all_gather)
        for e in plan.exchanges
    )
    assert plan.divided == (10 if divide is FREE else 1)
    assert found.flops == pytest.approx(plan.flops, rel=0.01)
    assert sum(found.collectives.values()) == plan.collectives + outside
    assert {g.repeat for e in plan.exchanges for g in e.groups if g.part_slots} == {divide is SLOW}


def planned(polar, places, divide):
    sizes = dict(mesh().shape)
    leaves = [
        Leaf(shape, Axes("bio"), spec_of(places[name], 3, sizes), np.dtype(float))
        for name, shape in SHAPES.items()
    ]
    return place(sizes, leaves, cost=cost_of(polar, divide), division=division_of(polar, divide))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["compiler", "types", "inside shard_map", "vmap", "muon"])
def test_ways(way):
    """As those with whole matrices, however the shardings are known."""
    polar, g = NewtonSchulz(steps=2), drawn()
    over = mesh(AxisType.Explicit if way == "types" else AxisType.Auto)
    places = {name: NamedSharding(over, spec) for name, spec in SPECS.items()}
    there = {name: jax.device_put(x, places[name]) for name, x in g.items()}

    def updates(g, divide):
        given = {"compiler": None, "types": None, "inside shard_map": SPECS}.get(way, places)
        tx = om.orthogonalize(polar, AXES, given, divide=divide)
        tx = tx if way != "muon" else om.muon(1.0, axes=AXES, orthogonalizer=polar, scale=None, divide=divide)
        return tx.update(g, tx.init(g), g)[0]

    f = functools.partial(updates, divide=FREE)
    if way == "inside shard_map":
        f = jax.shard_map(f, mesh=over, in_specs=(SPECS,), out_specs=SPECS)
    if way == "vmap":
        there, f = jax.tree.map(lambda x: np.stack([x, x]), there), jax.vmap(f)
    program = jax.jit(f).lower(there).compile()
    assert "reduce-scatter" in program.as_text()
    got = jax.tree.map(lambda x: x[1], program(there)) if way == "vmap" else program(there)
    want = jax.jit(lambda g: updated(om.orthogonalize(polar, AXES), g))(g)
    want = jax.tree.map(lambda x: -x, want) if way == "muon" else want
    rounding.close(got, want, condition=polar.table.slope)
