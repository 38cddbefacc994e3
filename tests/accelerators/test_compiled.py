"""Programs for TPUs and GPUs that are not there, where their compilers are installed: `.ci/accelerators`."""

import targets  # isort: skip  # it sets the environment

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimorph as om
from optimorph.linalg import NewtonSchulz

TPUS = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4"}
TARGETS = [name for name in (*TPUS, "H100") if targets.available(name)]
FAST = dict.fromkeys(TPUS, "bf16") | {"H100": "f16"}
SHAPES = {f"layer{k}": {"square": (128, 128), "up": (128, 512), "down": (512, 128)} for k in range(8)}
AXES = ("data", "model")
LAYOUTS = {
    "replicated": lambda name, shape: P(),
    "FSDP": lambda name, shape: P(AXES, None) if name == "down" else P(None, AXES),
    "HSDP": lambda name, shape: P("data", None) if name == "down" else P(None, "data"),
    "FSDP x TP": lambda name, shape: P("model", "data") if name == "down" else P("data", "model"),
}
WAYS = ("found", "given", "explicit")


@pytest.fixture(autouse=True)
def no_type_checks_of_numbers():
    """Of the compilers' own warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def mesh_of(target, mode=AxisType.Auto, sizes=(4, 2)):
    return targets.mesh_of(TPUS.get(target, target), dict(zip(AXES, sizes, strict=True)), mode)


def shapes_over(mesh, layout):
    return {
        layer: {
            name: jax.ShapeDtypeStruct(
                shape, jnp.float32, sharding=NamedSharding(mesh, LAYOUTS[layout](name, shape))
            )
            for name, shape in leaves.items()
        }
        for layer, leaves in SHAPES.items()
    }


def even_flops():
    """Of a device, if all matrices were divided evenly over 8."""
    polar = NewtonSchulz(iteration="standard")
    return sum(polar.flops(*sorted(shape)) for leaves in SHAPES.values() for shape in leaves.values()) / 8


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_muon_divides_the_work(target, layout, way):
    """It compiles; no device does more than its share; products are in the fast dtype; nothing loops."""
    mesh = mesh_of(target, AxisType.Explicit if way == "explicit" else AxisType.Auto)
    params = shapes_over(mesh, layout)
    places = jax.tree.map(lambda x: x.sharding, params)
    tx = om.orthogonalize(None, {"*": "io"}, places if way == "given" else None)
    program = targets.compiled(lambda g: tx.update(g, tx.init(g))[0], params, mesh=mesh, out_shardings=places)
    found = targets.counted(program)
    assert found["in_loops"] == 0
    if target in TPUS:  # the GPU's products are calls of cuBLAS, which nobody counts
        assert found["gflop"] * 1e9 <= 1.1 * even_flops()
    assert targets.product_dtypes(program.as_text()) <= {FAST[target]}
    counts = found["collectives"]
    if way != "found" or target == "H100":
        assert counts.get("all-to-all", 0) <= 4
        if target != "v5e":  # where the compiler gathers small results one by one
            assert sum(counts.values()) <= 6
    whole = 4 * sum(int(np.prod(shape)) for leaves in SHAPES.values() for shape in leaves.values())
    assert found["temporary"] <= (4 if layout == "replicated" else 1.5) * whole


@pytest.mark.parametrize("target", TARGETS)
def test_soap_divides_its_decompositions(target):
    """Each of eight devices decomposes 4 of the 32 factors of side 128, in the compiler's own QR."""
    mesh = mesh_of(target)
    params = shapes_over(mesh, "FSDP x TP")
    tx = om.soap(0.1, axes={"*": "io"}, max_dim=128)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, params)
    whole, owners = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXES))
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=owners if x.ndim == 3 else whole), state
    )
    text = targets.compiled(tx.update, params, state, params, mesh=mesh).as_text()
    name = "QrDecompositionBlock" if target in TPUS else "cusolver_geqrf_ffi"
    (call,) = {line.split(" custom-call(")[0] for line in text.splitlines() if f'target="{name}"' in line}
    assert "[4,128,128]" in call


@pytest.mark.parametrize("target", TARGETS)
def test_one_device_computes_alone(target):
    mesh = mesh_of(target, sizes=(1, 1))
    params = shapes_over(mesh, "replicated")
    tx = om.muon(0.02, axes={"*": "io"})
    program = targets.compiled(lambda g: tx.update(g, tx.init(g), g)[0], params, mesh=mesh)
    assert not targets.counted(program)["collectives"]
    assert targets.product_dtypes(program.as_text()) <= {FAST[target]}


@pytest.mark.parametrize("target", TARGETS)
def test_8_bits(target):
    """No loops, no communication, and nothing in float32 but one leaf at a time; buffers are used again."""
    mesh = mesh_of(target)
    place = NamedSharding(mesh, P(None, AXES))
    params = {f"w{k}": jax.ShapeDtypeStruct((1536, 6144), jnp.float32, sharding=place) for k in range(12)}
    tx = om.adamw(1e-3, state="int8")
    state = jax.eval_shape(tx.init, params)
    whole = NamedSharding(mesh, P())
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place if x.ndim else whole), state
    )
    results = jax.tree.map(lambda x: x.sharding, (params, state))
    program = targets.compiled(
        tx.update, params, state, params, mesh=mesh, donate_argnums=(0, 1), out_shardings=results
    )
    found = targets.counted(program)
    assert " while(" not in program.as_text()
    scales = {"all-gather"} if target in TPUS else set()  # a 32nd of a moment
    assert {*found["collectives"]} <= scales
    leaf = 1536 * 6144 // 8
    assert found["temporary"] <= 30 * leaf
    stored = sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(state)
    )
    assert found["aliased"] >= stored


@pytest.mark.parametrize("target", TARGETS)
def test_8_bits_of_stacked_layers(target):
    """They compile, and the buffers of the state are used again."""
    mesh = mesh_of(target)
    place = NamedSharding(mesh, P())
    params = {"w": jax.ShapeDtypeStruct((12, 768, 768), jnp.float32, sharding=place)}
    tx = om.adamw(1e-3, state="int8")
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), jax.eval_shape(tx.init, params)
    )
    program = targets.compiled(tx.update, params, state, params, mesh=mesh, donate_argnums=(0, 1))
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert targets.counted(program)["aliased"] >= stored


@pytest.mark.parametrize("target", TARGETS)
def test_element_wise_updates_send_nothing(target):
    mesh = mesh_of(target)
    params = shapes_over(mesh, "FSDP x TP")
    places = jax.tree.map(lambda x: x.sharding, params)
    for tx in (om.adamw(1e-3), om.adamw(1e-3, mu_dtype="bfloat16", nu_dtype="bfloat16")):
        program = targets.compiled(
            lambda g, tx=tx: tx.update(g, tx.init(g), g)[0], params, mesh=mesh, out_shardings=places
        )
        assert not targets.counted(program)["collectives"]
