"""Codes and scales lie as the parameters do: updates send nothing, and no bit is other than on one device."""

import functools

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
import trees
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimorph as om
from optimorph._core.moments import moments_of
from optimorph._storage import slabs
from optimorph.codecs import Signed8

SHAPES = {"up": (96, 1024), "down": (1024, 256), "stack": (4, 32, 1024), "bias": (256,)}
EXACT = {"xla_disable_hlo_passes": "algsimp"}
"""With it products are done in the order in which they are written, however much a device has of an array.

With no optimization of the backend, as in these processes, no product is fused with a sum.
"""

LAYOUTS = {
    "fsdp": ((8,), lambda n, shape: P(*[None] * (len(shape) - 1), "a") if n != "down" else P("a", None)),
    "tensor": ((4, 2), lambda n, shape: P(*[None] * (len(shape) - 1), "b")),
    "both": ((4, 2), lambda n, shape: P(*[None] * (len(shape) - 2), *("a", "b")[-len(shape) :])),
    "three axes": (
        (4, 2, 2),
        lambda n, shape: (
            P("b", ("a", "c"), None) if len(shape) == 3 else P(*(("c", "a"), "b")[-len(shape) :])
        ),
    ),
}


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    monkeypatch.setitem(slabs.SIZES, "cpu", (1 << 12, 1 << 13))


def tree(seed):
    return trees.drawn(seed, shapes=SHAPES)


def placed(layout, mode, shapes=SHAPES):
    sizes, spec = layout
    names = "abc"[: len(sizes)]
    count = int(np.prod(sizes))
    mesh = jax.make_mesh(sizes, tuple(names), axis_types=(mode,) * len(sizes), devices=jax.devices()[:count])
    return {name: NamedSharding(mesh, spec(name, shape)) for name, shape in shapes.items()}


@functools.cache
def alone(build):
    """Two steps on one device."""
    tx = build()
    params, state = trees.on_one(tree(0)), tx.init(trees.on_one(tree(0)))
    update = jax.jit(tx.update, compiler_options=EXACT)
    for k in (1, 2):
        updates, state = update(trees.on_one(tree(k)), state, params)
    return updates, state


def default():
    return om.compress_state(om.adamw(0.1), elementwise=True)


def light():
    return om.compress_state(om.sgd(0.1, 0.9), elementwise=True)


def whole():
    return om.compress_state(om.sgd(0.1, 0.9))


def coarse():
    return om.compress_state(om.sgd(0.1, 0.9), {"first/*": Signed8(1024)})


def stepped(build, places):
    """Two steps over a mesh: the program, the first state, the last, and the updates."""
    tx = build()
    params = trees.put(tree(0), places)
    first = state = tx.init(params)
    program = (
        jax.jit(tx.update, compiler_options=EXACT).lower(trees.put(tree(1), places), state, params).compile()
    )
    for k in (1, 2):
        updates, state = program(trees.put(tree(k), places), state, params)
    return program, first, state, updates


def lie_alike(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert not a.ndim or a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.examples("auto-fsdp-light")
@pytest.mark.parametrize(
    ("layout", "build"),
    [("fsdp", light), ("tensor", light), ("both", whole), ("three axes", default)],
)
def test_nothing_is_sent(layout, build, mode):
    """Slab by slab and not: state and updates; what is not in codes lies as it did too."""
    places = placed(LAYOUTS[layout], mode)
    program, first, last, updates = stepped(build, places)
    assert not hlo.counted(program).collectives
    for _, moment in moments_of(first.inner):
        for name, place in places.items():
            assert moment[name].sharding.is_equivalent_to(place, moment[name].ndim)
    for scales in first.scales:
        for name in ("up", "down", "stack"):
            assert scales[name].sharding.is_equivalent_to(places[name], scales[name].ndim)
    lie_alike(last, first)
    expected, state = alone(build)
    for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    for name, place in places.items():
        assert updates[name].sharding.is_equivalent_to(place, updates[name].ndim)
        rounding.close(updates[name], expected[name])


@pytest.mark.examples("auto")
def test_blocks_that_devices_share(mode):
    """Rows in one block over 8 devices: codes are those of one device all the same."""
    places = placed(((8,), lambda n, shape: P(*[None] * (len(shape) - 1), "a")), mode)
    _, first, last, _ = stepped(coarse, places)
    assert first.scales[0]["down"].shape[-1] == 1
    for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(alone(coarse)[1]), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("width", [256, 768, 1152, 3072])
def test_rows_that_8_devices_share(width):
    """Codes and scales are divided as the parameter is, also where init is jitted and knows no sharding."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    params = {"w": jax.device_put(np.ones((64, width), np.float32), NamedSharding(mesh, P(None, "a")))}
    tx = om.adamw(0.1, state="int8")
    _, state = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
    codes = [x for x in jax.tree.leaves(state) if x.dtype.itemsize == 1]
    assert len(codes) == 2
    for x in [*codes, *jax.tree.leaves(state.scales)]:
        assert x.sharding.is_equivalent_to(params["w"].sharding, x.ndim)


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("sizes", [(8, 1), (1, 1)])
def test_rows_over_an_axis_of_one_device(sizes, width):
    """Also if a row is one block: the mesh axis then divides the blocks of a row, not the numbers of one."""
    mesh = jax.make_mesh(
        sizes, ("a", "b"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[: sizes[0]]
    )
    values = np.random.default_rng(0).standard_normal((512, width)).astype(np.float32)
    params = {"w": jax.device_put(values, NamedSharding(mesh, P("a", "b")))}
    tx = om.adamw(0.1, state="int8")
    with jax.set_mesh(mesh):
        found = jax.jit(tx.update)(params, tx.init(params), params)
    on_one = {"w": jnp.asarray(values)}
    expected = jax.jit(tx.update)(on_one, tx.init(on_one), on_one)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_model_with_sharding_metadata():
    """Flax gives codes and scales the sharding of their parameter: it must divide both."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "a"))
            self.up = nnx.Linear(64, 1152, use_bias=False, kernel_init=init, rngs=rngs)

    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: (m.up(np.ones((8, 64), np.float32)) ** 2).mean())(model))

    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        model = Model(nnx.Rngs(0))
        before = np.asarray(model.up.kernel[...])
        nnx.jit(step)(model, nnx.Optimizer(model, om.adamw(1e-3, state="int8"), wrt=nnx.Param))
    np.testing.assert_allclose(np.abs(np.asarray(model.up.kernel[...]) - before), 1e-3, rtol=1e-2)


@pytest.mark.examples("auto")
def test_init_under_jit(mode):
    """The same state; where types say how parameters lie, it lies so too."""
    places = placed(LAYOUTS["both"], mode)
    params, tx = trees.put(tree(0), places), light()
    state = tx.init(params)
    with jax.set_mesh(places["up"].mesh):
        found = jax.jit(tx.init)(params)
    if mode == AxisType.Explicit:
        lie_alike(found, state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    """Each device's own shards, in 8 bits, with and without types that track what varies."""
    mesh = trees.mesh_of(8, 1, AxisType.Auto)
    params, tx = (
        {"w": np.linspace(-1, 1, 512 * 256, dtype=np.float32).reshape(512, 256)},
        om.adamw(0.1, state="int8"),
    )
    state = tx.init(params)
    specs = jax.tree.map(lambda x: P("data") if x.ndim else P(), state)
    step = jax.shard_map(
        lambda p, s: tx.update(p, s, p)[0],
        mesh=mesh,
        in_specs=(P("data"), specs),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    rounding.close(jax.jit(step)(params, state)["w"], jax.jit(tx.update)(params, state, params)[0]["w"])


@pytest.mark.parametrize(
    "build", [light, whole, lambda: om.adamw(0.1, state="int8")], ids=["light", "whole", "adamw"]
)
def test_shards_that_are_small(build):
    """Inside `shard_map`: whether a leaf is compressed is decided by the whole leaf, which `init` had."""
    tx, mesh = build(), trees.mesh_of(8, 1, AxisType.Auto)
    params = {"w": np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 64)}
    state = tx.init(params)
    assert any(x.dtype.itemsize == 1 for x in jax.tree.leaves(state))
    specs = jax.tree.map(lambda x: P("data") if x.ndim else P(), state)
    where = {"in_specs": (P("data"), specs), "out_specs": (P("data"), specs)}
    step = jax.shard_map(lambda p, s: tx.update(p, s, p), mesh=mesh, **where)
    updates, after = jax.jit(step)(params, state)
    expected, wanted = jax.jit(tx.update)(params, state, params)
    rounding.close(updates["w"], expected["w"])
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(wanted), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


def test_programs_of_several_meshes_in_one_process():
    """The same leaf inside `shard_map` over some and all axes: no program is that of another context."""
    tx, w = om.adamw(0.1, state="int8"), np.linspace(-1, 1, 128 * 64, dtype=np.float32).reshape(128, 64)

    def stepped_twice(w):
        _, state = tx.update(w, tx.init(w), w)
        return tx.update(w, state, w)[0]

    explicit, auto = AxisType.Explicit, AxisType.Auto
    for types in ((auto, auto), (auto, explicit)):
        mesh = jax.make_mesh((4, 2), ("data", "model"), types, devices=jax.devices()[:8])
        for names in ({"data"}, {"data", "model"}):
            inside = jax.shard_map(stepped_twice, mesh=mesh, in_specs=P(), out_specs=P(), axis_names=names)
            with jax.set_mesh(mesh):
                rounding.close(jax.jit(inside)(w), jax.jit(stepped_twice)(w))
