"""Every way to call an update on a mesh: under jit, scan, vmap, eagerly, exported, inside shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
import trees
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimorph as om
from optimorph.linalg import NewtonSchulz

pytestmark = pytest.mark.usefixtures("float64")
POLAR = NewtonSchulz(steps=2)
AXES = {"bias": None, "*": "io"}
SHAPES = {"up": (8, 24), "down": (24, 8), "grouped": (16, 64), "bias": (16,)}
SPECS = {"up": P(None, "data"), "down": P("model", "data"), "grouped": P("data", "model"), "bias": P()}
GROUPED = {"grouped": "i(2+1+1 o)"} | AXES


def mesh(mode=AxisType.Auto):
    return trees.mesh_of(8, 2, mode)


def placed(tree, mode=AxisType.Auto):
    return {n: jax.device_put(x, NamedSharding(mesh(mode), SPECS[n])) for n, x in tree.items()}


def tree(seed=0):
    return trees.drawn(seed, np.float64, SHAPES)


def muon(**more):
    return om.muon(0.1, axes=GROUPED, orthogonalizer=POLAR, **more)


def once(tx, params, gradients):
    return tx.update(gradients, tx.init(params), params)[0]


@pytest.fixture(scope="module")
def expected(float64):
    return jax.device_get(once(muon(), trees.on_one(tree()), trees.on_one(tree(1))))


def check(got, expected):
    rounding.close(got, expected, condition=POLAR.table.slope)


@pytest.mark.examples("auto")
def test_eagerly(expected, mode):
    got = once(muon(), placed(tree(), mode), placed(tree(1), mode))
    check(got, expected)
    for name, x in got.items():
        assert x.sharding.is_equivalent_to(NamedSharding(mesh(mode), SPECS[name]), x.ndim)


@pytest.mark.examples("auto")
def test_scan(mode):
    tx = muon()

    def train(params, gradients):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), gradients)[0][0]

    stacked = {n: np.stack([tree(1)[n], tree(2)[n], tree(3)[n]]) for n in SHAPES}
    over = {n: jax.device_put(x, NamedSharding(mesh(mode), P(None, *SPECS[n]))) for n, x in stacked.items()}
    got = jax.jit(train)(placed(tree(), mode), over)
    check(got, jax.device_get(jax.jit(train)(trees.on_one(tree()), trees.on_one(stacked))))


@pytest.mark.parametrize("spec", [P(), P("model")])
def test_independent_runs_exchange_nothing(spec):
    """A run for each index of one axis of the mesh; the devices of the other one share its matrices."""
    shapes = {f"w{k}": (4, 8, 24) for k in range(3)}
    runs, specs = trees.drawn(0, np.float64, shapes), dict.fromkeys(shapes, P("data"))
    specs["w0"] = P("data", *spec)

    def updates(**shardings):
        tx = om.muon(0.1, axes={"*": "io"}, orthogonalizer=POLAR, **shardings)
        return lambda run: once(tx, run, run)

    def local(runs):
        run = updates(shardings={"w0": spec, "*": P()})({name: x[0] for name, x in runs.items()})
        return {name: u[None] for name, u in run.items()}

    got = jax.jit(jax.shard_map(local, mesh=mesh(), in_specs=(specs,), out_specs=specs))(runs)
    check(got, jax.vmap(updates())(trees.on_one(runs)))


@pytest.mark.examples("auto")
def test_vmap(expected, mode):
    """Of several runs at once."""
    both = {n: np.stack([tree(1)[n], 2 * tree(1)[n]]) for n in SHAPES}
    over = {n: jax.device_put(x, NamedSharding(mesh(mode), P(None, *SPECS[n]))) for n, x in both.items()}
    got = jax.jit(jax.vmap(lambda p, g: once(muon(), p, g), in_axes=(None, 0)))(placed(tree(), mode), over)
    check(jax.tree.map(lambda x: x[0], got), expected)
    matrices = {n: x for n, x in got.items() if n != "bias"}
    check(jax.tree.map(lambda x: x[1], matrices), {n: expected[n] for n in matrices})


def test_gradients_go_through():
    polar = om.orthogonalize(POLAR, {"*": "io"})

    def size(g):
        return sum(jnp.sum(x**3) for x in jax.tree.leaves(polar.update({"w": g}, optax.EmptyState())[0]))

    g = tree()["up"]
    got = jax.jit(jax.grad(size))(jax.device_put(g, NamedSharding(mesh(), P("data", None))))
    check(got, jax.device_get(jax.jit(jax.grad(size))(jax.device_put(g, jax.devices()[0]))))


@pytest.mark.examples("auto")
def test_shapes_alone(mode):
    params = placed(tree(), mode)
    shapes = jax.eval_shape(lambda p, g: once(muon(), p, g), params, params)
    assert {n: x.shape for n, x in shapes.items()} == SHAPES


@pytest.mark.examples("auto")
def test_donation(mode):
    tx, params = muon(), placed(tree(), mode)
    state = tx.init(params)
    before = jax.tree.leaves(state)
    jax.jit(tx.update, donate_argnums=1, keep_unused=True)(placed(tree(1), mode), state, params)
    assert all(x.is_deleted() for x in before)


@pytest.mark.examples("auto-named*")
@pytest.mark.parametrize("named", [True, False], ids=["named sharding", "spec and set_mesh"])
def test_shardings_that_are_said(expected, named, mode):
    said = {n: NamedSharding(mesh(mode), spec) if named else spec for n, spec in SPECS.items()}
    tx = muon(shardings=said)
    run = jax.jit(lambda p, g: once(tx, p, g))
    if named:
        check(run(placed(tree(), mode), placed(tree(1), mode)), expected)
    else:
        with jax.set_mesh(mesh(mode)):
            check(run(placed(tree(), mode), placed(tree(1), mode)), expected)


@pytest.mark.examples("auto-True")
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(expected, check_vma, mode):
    tx = muon(shardings=SPECS)
    run = jax.shard_map(
        lambda p, g: once(tx, p, g),
        mesh=mesh(mode),
        in_specs=(SPECS, SPECS),
        out_specs=SPECS,
        check_vma=check_vma,
    )
    check(jax.jit(run)(placed(tree(), mode), placed(tree(1), mode)), expected)


def test_inside_shard_map_over_one_axis(expected):
    """The other one stays the compiler's."""
    specs = {"up": P(None, "data"), "down": P(None, "data"), "grouped": P("data"), "bias": P()}
    tx = muon(shardings=specs)
    run = jax.shard_map(
        lambda p, g: once(tx, p, g),
        mesh=mesh(),
        in_specs=(specs, specs),
        out_specs=specs,
        axis_names={"data"},
        check_vma=False,
    )
    check(jax.jit(run)(placed(tree()), placed(tree(1))), expected)


def test_whole_leaves_inside_pmap(expected):
    tx = muon(shardings={"*": P()})
    same = jax.tree.map(lambda x: np.stack([x] * 4), (tree(), tree(1)))
    got = jax.pmap(lambda p, g: once(tx, p, g), axis_name="data", devices=jax.devices()[:4])(*same)
    check(jax.tree.map(lambda x: x[0], got), expected)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs, param_dtype=float)
        self.head = nnx.Linear(16, 8, rngs=rngs, param_dtype=float)

    def __call__(self, x):
        return self.head(jnp.tanh(self.up(x)))


def trained(tx, spread):
    model = Model(nnx.Rngs(0))
    if spread:
        specs = {2: P("data", "model"), 1: P()}
        state = nnx.state(model, nnx.Param)
        nnx.update(
            model, jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh(), specs[x.ndim])), state)
        )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8)))

    @nnx.jit
    def step(model, optimizer):
        value, g = nnx.value_and_grad(lambda model: jnp.mean((model(x) - x) ** 2))(model)
        optimizer.update(model, g)
        return value

    losses = [float(step(model, optimizer)) for _ in range(3)]
    return losses, model.up.kernel.get_value().sharding


@pytest.mark.examples("muon")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_nnx_trains(name):
    losses, place = trained(getattr(om, name)(0.1), True)
    alone, _ = trained(getattr(om, name)(0.1), False)
    rounding.close(losses, alone, units=1, condition=NewtonSchulz().table.slope)
    assert place.is_equivalent_to(NamedSharding(mesh(), P("data", "model")), 2)
