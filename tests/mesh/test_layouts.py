"""However leaves lie, updates and states are those of one device, and lie as the leaves do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
import trees
from jax.sharding import AxisType

import optimorph as om
from optimorph.linalg import NewtonSchulz

MUON = {"axes": trees.AXES, "weight_decay": 0.1, "orthogonalizer": NewtonSchulz(steps=2)}
CONDITION = NewtonSchulz(steps=2).table.slope


def spread(places):
    return lambda tree: trees.put(tree, places)


def steps(tx, place, dtype, count=2):
    params = place(trees.drawn(0, dtype))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for seed in range(count):
        updates, state = update(place(trees.drawn(1 + seed, dtype)), state, params)
        params = optax.apply_updates(params, updates)
    return updates, state


@functools.cache
def muon_on_one_device():
    return steps(om.muon(0.1, **MUON), trees.on_one, np.float64)


def close(got, want):
    rounding.close(got, want, condition=CONDITION)


EXPLICIT = [(layout, 8, AxisType.Explicit) for layout in ("replicated", "fsdp x tensor", "mixed")]
AUTO = [(layout, 8, AxisType.Auto) for layout in trees.LAYOUTS]
AUTO += [(layout, n, AxisType.Auto) for n in (2, 4, 16) for layout in ("fsdp x tensor", "mixed")]


@pytest.mark.examples("fsdp x tensor-8-AxisType.Auto")
@pytest.mark.parametrize(("layout", "devices", "mode"), AUTO + EXPLICIT)
def test_muon_in_float64(layout, devices, mode):
    with jax.enable_x64(True):
        tx, places = om.muon(0.1, **MUON), trees.shardings(layout, devices, mode)
        got = steps(tx, spread(places), np.float64)
        close(got, muon_on_one_device())
        for name, x in got[0].items():
            assert x.sharding.is_equivalent_to(places[name], x.ndim), (name, x.sharding)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["replicated", "fsdp x tensor"])
def test_muon_in_float32(layout, mode):
    tx, places = om.muon(0.1, **MUON), trees.shardings(layout, 8, mode)
    got = steps(tx, spread(places), np.float32)
    close(got, steps(tx, trees.on_one, np.float32))
    state = jax.tree_util.tree_flatten_with_path(got[1])[0]
    for path, x in state:
        name = getattr(path[-1], "key", None)
        if name in places and x.ndim:
            assert x.sharding.is_equivalent_to(places[name], x.ndim), (path, x.sharding)


def middle(x):
    """Sees where rows and columns stand."""
    n, m = x.shape[-2:]
    return x * jnp.arange(n)[:, None].astype(x.dtype) + jnp.arange(m).astype(x.dtype)


@pytest.mark.examples("auto-mixed")
@pytest.mark.parametrize("layout", ["replicated", "mixed"])
def test_matrices_come_as_they_are_to_functions_that_may_mind(layout, mode):
    with jax.enable_x64(True):
        tx, places = om.orthogonalize(middle, trees.AXES), trees.shardings(layout, 8, mode)
        got, want = (steps(tx, place, np.float64, 1)[0] for place in (spread(places), trees.on_one))
        close(got, want)


@pytest.mark.examples("auto-fsdp x tensor")
@pytest.mark.parametrize("layout", ["fsdp x tensor", "replicated", "hybrid: data axis of two"])
def test_in_several_goes(layout, mode):
    """Of one matrix at a time."""
    with jax.enable_x64(True):
        places = trees.shardings(layout, 8, mode)
        small = om.orthogonalize(NewtonSchulz(steps=2), trees.AXES, bytes_at_once=1)
        got = steps(small, spread(places), np.float64, 1)[0]
        whole = om.orthogonalize(NewtonSchulz(steps=2), trees.AXES)
        close(got, steps(whole, trees.on_one, np.float64, 1)[0])


@pytest.mark.examples("auto-fsdp, last axis")
@pytest.mark.parametrize("layout", ["fsdp x tensor", "replicated", "fsdp, last axis"])
def test_bfloat16_between_devices(layout, mode):
    """Rounded to 8 bits on the way in and on the way out: no matrix is further off than that allows."""
    places = trees.shardings(layout, 8, mode)
    shapes = {name: shape for name, shape in trees.SHAPES.items() if name != "bias"}
    tx = om.orthogonalize(NewtonSchulz(steps=2), trees.AXES, comm_dtype=jnp.bfloat16)
    g = {name: x for name, x in trees.drawn(1).items() if name in shapes}
    got = jax.jit(tx.update)(trees.put(g, places), optax.EmptyState())[0]
    want = jax.jit(om.orthogonalize(NewtonSchulz(steps=2), trees.AXES).update)(
        trees.on_one(g), optax.EmptyState()
    )[0]
    worst = max(
        float(np.linalg.norm(np.asarray(got[n]) - np.asarray(want[n])) / np.linalg.norm(want[n])) for n in got
    )
    assert 1e-4 < worst < 2e-2


ELEMENTWISE = ("sgd", "adagrad", "rmsprop", "adam", "nadam", "adamw", "nadamw", "ademamix")


@pytest.mark.examples("auto-adamw")
@pytest.mark.parametrize("name", [*ELEMENTWISE])
def test_elementwise_recipes(name, mode):
    tx, places = getattr(om, name)(0.1), trees.shardings("mixed", 8, mode)
    with jax.enable_x64(True):
        got = steps(tx, spread(places), np.float64)
        rounding.close(got, steps(tx, trees.on_one, np.float64))
    params = trees.put(trees.drawn(0), places)
    text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    assert not [
        op for op in ("all-gather", "all-reduce", "all-to-all", "permute", "scatter") if f" {op}" in text
    ]
    for leaf, x in got[0].items():
        assert x.sharding.is_equivalent_to(places[leaf], x.ndim)


def test_uneven_sizes():
    """That no mesh axis divides: only within a program can arrays lie so."""
    mesh = trees.mesh_of(8, 1, AxisType.Auto)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None))
    tx = om.orthogonalize(None, {"*": "io"})
    g = trees.drawn(0, np.float64, {"w": (12, 20), "v": (13, 7)})

    @jax.jit
    def update(g):
        g = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place), g)
        return tx.update(g, optax.EmptyState())[0]

    with jax.enable_x64(True):
        want = tx.update(trees.on_one(g), optax.EmptyState())[0]
        rounding.close(update(g), want, units=1, condition=NewtonSchulz().table.slope)
