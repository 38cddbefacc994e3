"""Meshes of which types name some axes only, of one device, and functions that are not plain."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimorph as om
from optimorph.linalg import NewtonSchulz

pytestmark = pytest.mark.usefixtures("float64")
E, A = AxisType.Explicit, AxisType.Auto
NONE = optax.EmptyState()
G = np.random.default_rng(0).standard_normal((8, 32))
POLAR = NewtonSchulz(steps=2)


def polar(**more):
    tx = om.orthogonalize(POLAR, {"*": "io"}, **more)
    return lambda g: tx.update({"w": g}, NONE)[0]["w"]


@pytest.fixture(scope="module")
def expected(float64):
    return np.asarray(polar()(jax.device_put(G, jax.devices()[0])))


def close(got, expected):
    rounding.close(got, expected, condition=POLAR.table.slope)


def mesh(sizes, kinds):
    count = int(np.prod(sizes))
    return jax.make_mesh(
        sizes, ("a", "b", "c")[: len(sizes)], axis_types=kinds, devices=jax.devices()[:count]
    )


@pytest.mark.examples("False-sizes2*")
@pytest.mark.parametrize(
    ("sizes", "kinds", "spec"),
    [
        ((4, 2), (E, A), P("a", "b")),
        ((4, 2), (A, E), P("a", "b")),
        ((2, 2, 2), (E, A, A), P(("a", "b"), "c")),
        ((2, 2, 2), (E, A, E), P(("c", "a"), "b")),
    ],
)
@pytest.mark.parametrize("said", [False, True])
def test_partly_explicit(expected, sizes, kinds, spec, said):
    place = NamedSharding(mesh(sizes, kinds), spec)
    got = jax.jit(polar(**({"shardings": {"w": place}} if said else {})))(jax.device_put(G, place))
    close(got, expected)
    assert got.sharding.is_equivalent_to(place, 2)


@pytest.mark.parametrize("jitted", [False, True])
def test_an_explicit_mesh_of_one(expected, jitted):
    place = [NamedSharding(mesh((1,), (E,)), spec) for spec in (P("a", None), P(None, "a"))]
    tx = om.orthogonalize(POLAR, {"*": "io"})
    g = {"w": jax.device_put(G, place[0]), "v": jax.device_put(G, place[1])}
    update = jax.jit(tx.update) if jitted else tx.update
    got = update(g, NONE)[0]
    for x in got.values():
        close(x, expected)


def test_shard_map_over_axes_of_one(expected):
    one = mesh((1, 1), (A, A))
    run = jax.shard_map(polar(), mesh=one, in_specs=P("a", "b"), out_specs=P("a", "b"))
    close(jax.jit(run)(jax.device_put(G, NamedSharding(one, P()))), expected)


@pytest.mark.examples("sizes0-kinds0*")
@pytest.mark.parametrize(
    ("sizes", "kinds", "jitted"),
    [((2, 2), (E, E), True), ((2, 2), (A, E), False), ((1, 2), (E, E), True), ((2, 2, 2), (A, E, A), True)],
)
def test_shard_map_over_one_of_the_axes(expected, sizes, kinds, jitted):
    place, tx = NamedSharding(mesh(sizes, kinds), P("a", "b")), polar(shardings={"w": P("a", "b")})

    def body(g):
        found = tx(g)
        assert str(jax.typeof(found)) == str(jax.typeof(g))
        return found

    run = jax.shard_map(body, mesh=place.mesh, in_specs=P("a"), out_specs=P("a"), axis_names={"a"})
    close((jax.jit(run) if jitted else run)(jax.device_put(G, place)), expected)


def eigen(**more):
    return om.soap(0.1, every=1, **more)


def test_bases_inside_shard_map_over_one_of_the_axes():
    """In the second step, since the first one finds them."""

    def train(tx, w):
        state = tx.init({"w": w})
        for g in (w, w**2):
            found, state = tx.update({"w": g}, state, {"w": w})
        return found["w"]

    place, axes = NamedSharding(mesh((2, 2), (E, E)), P(None, "b")), {"*": "io"}
    tx = eigen(axes=axes, shardings={"*": P()})
    run = jax.shard_map(
        lambda w: train(tx, w), mesh=place.mesh, in_specs=P(), out_specs=P(), axis_names={"a"}
    )
    got = jax.jit(run)(jax.device_put(G[:, :8], place))
    want = jax.jit(lambda w: train(eigen(axes=axes), w))(G[:, :8])
    np.testing.assert_allclose(got, want, rtol=1e-9)
    assert got.sharding.is_equivalent_to(place, 2)


FACTORED = functools.partial(om.factored, 0.9)
MATRICES = {"fused": (8, 24), "layers": (4, 8, 8)}


@pytest.mark.examples("2-scion")
@pytest.mark.parametrize("name", ["normuon", "scion", "muonh", "shampoo", "klsoap", "soap_muon", "factored"])
@pytest.mark.parametrize("size", [2, 1])
def test_types_inside_shard_map_over_one_of_the_axes(name, size):
    """Those of updates are those of gradients, and those of a state stay."""
    make = FACTORED if name == "factored" else functools.partial(getattr(om, name), 0.1)
    tx = make(axes={"fused": "i(3o)", "layers": "bio"}, shardings={"*": P()})
    both, specs = mesh((size, 2), (E, E)), {"fused": P(None, "b"), "layers": P("b")}

    def body(params):
        state = tx.init(params)
        updates, after = tx.update(params, state, params)
        for x, y in zip(jax.tree.leaves((updates, after)), jax.tree.leaves((params, state)), strict=True):
            assert str(jax.typeof(x)) == str(jax.typeof(y))
        return updates

    run = jax.shard_map(body, mesh=both, in_specs=P(), out_specs=P(), axis_names={"a"})
    shapes = {
        n: jax.ShapeDtypeStruct(s, float, sharding=NamedSharding(both, specs[n])) for n, s in MATRICES.items()
    }
    jax.eval_shape(run, shapes)


@pytest.mark.parametrize("kind", [A, E])
def test_vmap_over_a_divided_axis(expected, kind):
    both = mesh((2, 4), (kind, kind))
    place = NamedSharding(both, P("a", None, "b"))
    got = jax.jit(jax.vmap(polar()))(jax.device_put(np.stack([G, 2 * G]), place))
    close(np.asarray(got)[1], expected)
    assert got.sharding.is_equivalent_to(place, 3)


def test_a_function_that_has_no_hash():
    @dataclasses.dataclass
    class Double:
        by: float = 2.0

        def __call__(self, x):
            return self.by * x

    tx = om.orthogonalize(Double(), {"*": "io"})
    place = NamedSharding(mesh((8,), (A,)), P(None, "a"))
    np.testing.assert_array_equal(tx.update({"w": jax.device_put(G, place)}, NONE)[0]["w"], 2 * G)


def test_second_derivatives():
    place = NamedSharding(mesh((2,), (A,)), P(None, "a"))
    tx = om.orthogonalize(lambda x: x**3, {"*": "io"})

    def size(t, place):
        return jnp.sum(tx.update({"w": jax.device_put(G, place) + t}, NONE)[0]["w"])

    got = jax.jit(jax.grad(jax.grad(size)), static_argnums=1)(0.0, place)
    rounding.close(got, np.sum(6 * G), units=1, condition=16 * np.sum(np.abs(G)) / np.abs(np.sum(G)))  # √n


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.int8, jnp.float8_e4m3fn])
def test_dtypes_that_would_lose_gradients_are_not_sent(dtype):
    with pytest.raises(ValueError, match=r"comm_dtype must be one of .*bfloat16"):
        polar(comm_dtype=dtype)
