"""In an eigenbasis: over a mesh the same numbers as on one device, one exchange for each size of matrix."""

import functools
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
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimorph as om

FULL_RANK = {"every": 2, "max_dim": 16, "axes": trees.AXES}
"""Of longer sides the first gradients do not tell all eigenvectors; only rounding errors would."""
TX = om.soap(0.1, eps=1e-2, **FULL_RANK)
SPREAD = om.soap(0.1, eps=1e-2, **FULL_RANK | {"every": 3, "spread": True})


def steps(place, count=4, state=None, first=0, tx=TX):
    params = place(trees.drawn(0, np.float64))
    state, update = tx.init(params) if state is None else state, jax.jit(tx.update)
    for seed in range(first, first + count):
        updates, state = update(place(trees.drawn(1 + seed, np.float64)), state, params)
        params = optax.apply_updates(params, updates)
    return updates, state


def of_the_same_slots(state, other):
    """Without the slots that are there to fill a mesh."""
    return jax.tree.map(lambda x, y: np.asarray(x)[: len(y)] if jnp.ndim(x) else x, state, other)


LAYOUTS = ("replicated", "tensor", "fsdp x tensor", "mixed")


@pytest.mark.examples("auto-mixed")
@pytest.mark.parametrize("layout", LAYOUTS)
@rounding.in_float64
def test_as_on_one_device(layout, mode):
    """The same updates, where the gradients are, and states whose slots are at their owners."""
    places = trees.shardings(layout, 8, mode)
    got, state = steps(lambda tree: trees.put(tree, places), 3)
    want, whole = steps(trees.on_one, 3)
    rounding.close(got, want, condition=1e5)
    rounding.close(of_the_same_slots(state, whole), whole, condition=1e5)
    for name, x in got.items() if mode == AxisType.Explicit else ():
        assert x.sharding.is_equivalent_to(places[name], x.ndim), (name, x.sharding)
    for x in jax.tree.leaves(optax.tree.get(state, "left_basis")):
        assert x.sharding.shard_shape(x.shape)[0] == len(x) / 8


@pytest.mark.examples("auto-mixed")
@pytest.mark.parametrize("layout", LAYOUTS)
@rounding.in_float64
def test_spread_as_on_one_device(layout, mode):
    """The turn of a matrix does not depend on the mesh, wherever its bases are computed."""
    places = trees.shardings(layout, 8, mode)
    got, state = steps(lambda tree: trees.put(tree, places), 5, tx=SPREAD)
    want, whole = steps(trees.on_one, 5, tx=SPREAD)
    rounding.close(got, want, condition=1e5)
    rounding.close(of_the_same_slots(state, whole), whole, condition=1e5)


@pytest.mark.slow
@pytest.mark.parametrize("tx", [TX, SPREAD], ids=["together", "spread"])
@rounding.in_float64
def test_resumed_on_another_mesh(tx):
    """A state of eight devices goes on over four, over three that do not divide it, and on one."""
    places = trees.shardings("fsdp, last axis", 8, AxisType.Auto)
    _, state = steps(lambda tree: trees.put(tree, places), 3, tx=tx)
    was = NamedSharding(jax.sharding.AbstractMesh((8,), ("data",)), P())
    params = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=was) for k, x in trees.drawn(0, float).items()
    }
    assert jax.tree.map(jnp.shape, jax.eval_shape(tx.init, params)) == jax.tree.map(jnp.shape, state)
    want, _ = steps(trees.on_one, 2, jax.tree.map(np.asarray, state), 3, tx)
    for devices in (4, 3):
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
        everywhere = NamedSharding(mesh, P())
        place = functools.partial(jax.device_put, device=everywhere)
        got, _ = steps(place, 2, jax.tree.map(np.asarray, state), 3, tx)
        rounding.close(got, want, condition=1e5)


SHAPES = sharding.transformer(width=16)


@pytest.mark.examples("auto-FSDP 4 x TP 2")
@pytest.mark.parametrize("layout", ["replicated", "FSDP, last axis", "FSDP 4 x TP 2"])
def test_collectives_and_decompositions(layout, mode):
    """Of 84 matrices in three sizes: gradients go to the owners and updates back, and QR is of own slots."""
    places = sharding.shardings(layout, SHAPES, mode)
    params = jax.tree.map(lambda s, p: jax.device_put(jnp.zeros(s), p), SHAPES, places, is_leaf=_is_shape)
    tx, everywhere = om.soap(0.1, axes={"*": "io"}), NamedSharding(params["layer0"]["up"].sharding.mesh, P())

    def described(x):
        place = x.sharding if len(x.sharding.device_set) > 1 else everywhere
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    state = jax.tree.map(described, tx.init(params))
    program = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
    found, exchanged = hlo.counted(program), sum(x.nbytes for x in jax.tree.leaves(params))
    if layout == "FSDP, last axis":  # where "out" lies as the other matrices of its size do
        assert found.collectives == {"all-to-all": 6}
        assert found.sent <= 1.1 * 2 * exchanged / sharding.DEVICES
    elif layout == "replicated":  # which has the gradients everywhere
        assert found.collectives == {"all-gather": 3}
    assert found.sent <= (1.1 if layout == "replicated" else 0.6) * exchanged
    shapes = re.findall(r"lapack_sgeqrf.*?operand_layout_constraints={f32\[(\d+),(\d+),", program.as_text())
    assert sorted(shapes) == [("17", "16"), ("5", "64")]  # of (48 + 48 + 24 + 16) / 8, and of (24 + 16) / 8


def _is_shape(x):
    return isinstance(x, tuple)


def test_inside_shard_map():
    """Whole matrices pass, and what may be local shards is refused."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.eye(8)}

    def inside(spec, **arguments):
        tx = om.in_eigenbasis(om.ema(0.9), decay=0.9, axes={"*": "io"}, **arguments)
        state = tx.init(params)
        return jax.shard_map(
            lambda g: tx.update(g, state)[0], mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )(params)

    assert inside(P(), shardings={"*": P()})["w"].shape == (8, 8)
    for arguments in ({}, {"shardings": {"*": P("data")}}):
        with pytest.raises(ValueError, match=r"in_eigenbasis: inside jax.shard_map or pmap, 'w' of shape"):
            inside(P("data"), **arguments)


@pytest.mark.parametrize("name", ["soap", "soap_muon", "shampoo"])
@rounding.in_float64
def test_eager_and_inside_shard_map(name):
    """Without a program over explicit axes, and in `jax.shard_map` with replicated parameters."""
    make = functools.partial(getattr(om, name), 0.1, axes={"w": "io"})
    w = trees.drawn(0, np.float64, {"w": (16, 16), "bias": (16,)})

    def update(w, **arguments):
        tx = make(**arguments)
        return tx.update(w, tx.init(w), w)[0]

    want = update(trees.on_one(w))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    for spec in (P(), P("data")):
        place = NamedSharding(mesh, spec)
        got = update(jax.device_put(w, place))
        rounding.close(got, want, condition=1e5)
        assert all(x.sharding.is_equivalent_to(place, x.ndim) for x in got.values())
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    inside = functools.partial(update, shardings={"*": P()})
    rounding.close(
        jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=P(), out_specs=P()))(w), want, condition=1e5
    )


@pytest.mark.parametrize("spread", [False, True])
def test_gradients_that_vary_inside_shard_map(spread):
    """Where types say so, beside bases that begin alike everywhere."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.stack([jnp.eye(8)] * 8)}
    tx = om.soap(0.1, every=2, spread=spread, axes={"*": "io"}, shardings={"*": P()})

    def inside(params):
        w = jax.tree.map(lambda x: x[0], params)
        return jax.tree.map(lambda x: x[None], tx.update(w, tx.init(w), w)[0])

    jax.eval_shape(jax.shard_map(inside, mesh=mesh, in_specs=P("data"), out_specs=P("data")), params)


@pytest.mark.parametrize(
    "kinds", [(AxisType.Explicit, AxisType.Auto), (AxisType.Auto, AxisType.Explicit)], ids=str
)
@rounding.in_float64
def test_over_axes_of_both_types(kinds):
    """The types of arrays say how `Explicit` axes divide them, and the compiler sees to `Auto` ones."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds, devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        got, _ = steps(lambda tree: jax.device_put(tree, NamedSharding(mesh, P())), 3)
    rounding.close(jax.tree.map(np.asarray, got), steps(trees.on_one, 3)[0], condition=1e5)


def test_an_ensemble_outside_of_jit():
    """The mesh of its members is known, but not the devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])
    params = jax.device_put({"w": jnp.stack([jnp.eye(8)] * 8)}, NamedSharding(mesh, P("data")))
    tx = om.soap(0.1, axes={"*": "io"})
    state = jax.vmap(tx.init)(params)
    updates, _ = jax.jit(jax.vmap(tx.update))(params, state, params)
    assert updates["w"].shape == (8, 8, 8)
