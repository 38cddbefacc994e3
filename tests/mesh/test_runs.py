"""A run that goes on over another mesh: its state is carried there, or restored from a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimorph as om
from optimorph.codecs import Nonneg8, Signed8

SHAPES = {"kernel": (64, 128), "head": (16, 8), "bias": (8,)}


def drawn(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}


def mesh_of(devices, shape, mode=AxisType.Auto):
    return jax.make_mesh(shape, ("data", "model"), (mode,) * 2, devices=devices)


def put(tree, mesh, spec):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec if x.ndim > 1 else P())), tree)


def begun(tx, place):
    params = place(drawn(0))
    state = jax.jit(tx.init)(params)
    _, state = jax.jit(tx.update)(place(drawn(1)), state, params)
    return state


@pytest.mark.examples("auto-float32")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_carried_to_other_devices(dtype, mode):
    """Moments are divided as their parameters are, counts are everywhere, and the numbers are the same."""
    old = om.adamw(0.1, state="int8") if dtype == "int8" else om.adamw(0.1)
    new = om.skip_nonfinite(om.adamw(0.1))
    here, there = mesh_of(jax.devices()[:8], (4, 2)), mesh_of(jax.devices()[8:12], (2, 2), mode)
    state = begun(old, lambda tree: put(tree, here, P("data", "model")))
    one, _ = om.carry_state(begun(old, lambda tree: tree), new, drawn(0), written_by=old)
    larger = drawn(0) | {"head": jnp.ones((16, 12))}
    with jax.set_mesh(there):
        params = put(larger, there, P("model", "data"))
        carried, report = om.carry_state(state, new, params, written_by=old, grown=True, strict=True)
        assert {row.path for row in report if "grown" in row.why} == {"head"}
        for x in jax.tree.leaves(carried):
            placed = x.sharding.device_set == params["head"].sharding.device_set
            assert placed or not x.committed
            if x.shape == SHAPES["kernel"]:
                assert x.sharding.is_equivalent_to(params["kernel"].sharding, x.ndim)
        jax.jit(new.update)(params, carried, params)
    for x, y in zip(jax.tree.leaves(carried), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(np.asarray(x)[tuple(map(slice, y.shape))], y, rtol=1e-6)


def test_state_stays_divided_as_it_is():
    """On the same devices, where the state is divided and the parameters are not."""
    mesh, tx = mesh_of(jax.devices()[:8], (4, 2)), om.adamw(0.1)
    state = begun(tx, lambda tree: put(tree, mesh, P("data", "model")))
    carried, _ = om.carry_state(state, om.skip_nonfinite(tx), put(drawn(0), mesh, P()), strict=True)
    for x, y in zip(jax.tree.leaves(carried.inner), jax.tree.leaves(state), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.slow
def test_restored_over_another_mesh_and_carried(tmp_path):
    """A manager saves from eight devices and restores on four."""
    tx, new = om.adamw(0.1, state="int8"), om.adamw(0.1)
    here, there = mesh_of(jax.devices()[:8], (4, 2)), mesh_of(jax.devices()[8:12], (2, 2))
    state = begun(tx, lambda tree: put(tree, here, P("data", "model")))
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(there, P("model") if x.ndim > 1 else P())
            ),
            state,
        )
        kept = manager.restore(1, args=ocp.args.StandardRestore(shapes))
    found, _ = om.carry_state(kept, new, put(drawn(0), there, P("model", "data")), written_by=tx, strict=True)
    expected, _ = om.carry_state(state, new, drawn(0), written_by=tx, strict=True)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "tx", [om.soap(0.1, axes={"*": "io"}), om.adamw(0.1, state={"first": Signed8(), "second": Nonneg8()})]
)
def test_carried_state_lies_as_init_makes_it(tx, mode):
    """On fewer devices, also stacks of matrices and scales: no step moves them, or is compiled twice."""
    leaves = {str(k): jnp.eye(16, 256) + k for k in range(8)}
    here, there = mesh_of(jax.devices()[:8], (8, 1)), mesh_of(jax.devices()[8:12], (2, 2), mode)
    before = put(leaves, here, P("data"))
    params = put(leaves, there, P("data", "model"))
    carried, _ = om.carry_state(tx.init(before), tx, params, written_by=tx, strict=True)
    with jax.set_mesh(there):
        for x, y in zip(jax.tree.leaves(carried), jax.tree.leaves(tx.init(params)), strict=True):
            assert not y.ndim or x.sharding.is_equivalent_to(y.sharding, x.ndim)
