"""States over meshes: the same bits in bfloat16, the same numbers from probes, one step for several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
import trees
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimorph as om
from optimorph.codecs import Nonneg8, Signed8
from optimorph.probes import CHEAP, SPECTRAL, probe, read

LAYOUTS = ("replicated", "fsdp x tensor")


def two_steps(tx, layout, mode, dtype=np.float32):
    """State after two steps over the mesh, and on one device."""
    places, update = trees.shardings(layout, 8, mode), jax.jit(tx.update)
    found = []
    for put in (lambda tree: trees.put(tree, places), trees.on_one):
        params = put(trees.drawn(0, dtype))
        state = tx.init(params)
        for seed in (1, 2):
            _, state = update(put(trees.drawn(seed, dtype)), state, params)
        found.append(state)
    return found


@pytest.mark.examples("auto-fsdp x tensor")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounding_by_chance(layout, mode):
    there, here = two_steps(om.in_bfloat16(om.momentum(0.5)), layout, mode)
    for name, x in here.inner.velocity.items():
        np.testing.assert_array_equal(np.asarray(there.inner.velocity[name]), np.asarray(x))
        place = trees.shardings(layout, 8, mode)[name]
        assert there.inner.velocity[name].sharding.is_equivalent_to(place, x.ndim)


@pytest.mark.examples("auto")
@rounding.in_float64
def test_probes(mode):
    tx = probe(om.adam(0.1), (*CHEAP, *SPECTRAL), 1, axes=trees.AXES, exact=True)
    there, here = two_steps(tx, "fsdp x tensor", mode, np.float64)
    rounding.close(read(there), read(here), units=1, dtype="float32")  # which holds what was measured


@pytest.mark.slow
def test_devices_leave_a_gradient_out_together():
    """Inside `shard_map`, where each sees its own: they would wait for each other, or drift apart."""
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    tx = om.multi_steps(om.muon(0.1, axes={"*": "io"}, shardings={"*": P("data")}), 2)

    def steps(*gs):
        state = tx.init(gs[0])
        for g in gs:
            updates, state = tx.update(g, state, gs[0])
        return updates, state.steps[None]

    one, sick = jnp.ones((8, 4)), jnp.ones((8, 4)).at[0, 0].set(jnp.nan)
    inside = jax.jit(jax.shard_map(steps, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    updates, taken = inside(one, sick, 3 * one)
    assert taken.tolist() == [1] * 4
    assert bool(jnp.all(updates != 0))


@pytest.mark.parametrize("sizes", [(4, 1), (1, 1), (2, 2)])
def test_replicated_leaves_stay_so_beside_divided_ones(sizes):
    """In the types of `shard_map`, also over mesh axes of one device."""
    devices = jax.devices()[: sizes[0] * sizes[1]]
    mesh = jax.make_mesh(sizes, ("data", "model"), (AxisType.Auto,) * 2, devices=devices)
    places = {"kernel": P("data", "model"), "bias": P()}
    params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
    tx = om.multi_steps(om.adam(0.1), 2)

    def step(g, p):
        _, state = tx.update(g, tx.init(p), p)
        return tx.update(g, state, p)[0]

    updates = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(places, places), out_specs=places))(
        params, params
    )
    assert bool(jnp.all(updates["bias"] != 0))


@pytest.mark.parametrize("axis_names", [{"data"}, {"data", "model"}], ids=["partly manual", "manual"])
@pytest.mark.parametrize("around", [lambda tx: om.multi_steps(tx, 2), probe], ids=["multi_steps", "probe"])
def test_parameters_that_vary_over_one_axis_of_two(around, axis_names):
    """FSDP over one axis, with replicas or with another axis that is the compiler's."""
    mesh = trees.mesh_of(8, 2, AxisType.Auto)
    tx, w = around(om.sgd(0.1)), jnp.arange(8.0)

    def two_steps_of(w):
        _, state = tx.update(w, tx.init(w), w)
        return tx.update(3 * w, state, w)[0]

    inside = jax.shard_map(
        two_steps_of, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names=axis_names
    )
    rounding.close(jax.jit(inside)(w), two_steps_of(w))


@pytest.mark.slow
@rounding.in_float64
def test_several_gradients_for_one_muon(mode):
    tx = om.multi_steps(om.muon(0.1, axes=trees.AXES), 2)
    there, here = two_steps(tx, "fsdp x tensor", mode, np.float64)
    rounding.close(there.inner, here.inner)
    assert int(there.steps) == 1
    assert all(bool(jnp.all(x == 0)) for x in jax.tree.leaves(there.mean))


def explicit(shape, names):
    count = int(np.prod(shape))
    axis_types = (AxisType.Explicit,) * len(shape)
    return jax.make_mesh(shape, names, axis_types, devices=jax.devices()[:count])


@pytest.mark.parametrize(
    ("state", "gradient"), [(P("x", "y"), P()), (P(), P("x")), (P(None, "y"), P("x", "y"))], ids=str
)
def test_microbatches_whose_shardings_differ(state, gradient):
    """State, gradients and parameters with different shardings over Explicit axes, as after a restore."""
    mesh = explicit((2, 4), ("x", "y"))
    with jax.set_mesh(mesh):
        tx = om.multi_steps(om.adam(0.1), 2)

        def put(spec):
            return {"w": jax.device_put(jnp.ones((8, 8)), jax.sharding.NamedSharding(mesh, spec))}

        held, step = jax.jit(tx.init)(put(state)), jax.jit(tx.update)
        for _ in range(2):
            updates, held = step(put(gradient), held, put(P()))
        rounding.close(updates["w"], -0.1, condition=1 / (1 - 0.999))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_microbatches_over_axes_of_both_types(compiled):
    mesh = jax.make_mesh((4, 2), ("x", "y"), (AxisType.Explicit, AxisType.Auto), devices=jax.devices()[:8])
    tx = om.multi_steps(om.adam(0.1), 2)
    with jax.set_mesh(mesh):
        specs = {"rows": P("x"), "both": P("x", "y")}
        params = {k: jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, spec)) for k, spec in specs.items()}
        state = tx.init(params)
        for _ in range(2):
            updates, state = (jax.jit(tx.update) if compiled else tx.update)(params, state, params)
    rounding.close(updates, jax.tree.map(lambda w: -0.1 * np.ones(w.shape), params), condition=1e3)


KINDS = {"E": AxisType.Explicit, "A": AxisType.Auto}


@pytest.mark.parametrize(("kinds", "sizes"), [("EE", (1, 8)), ("AE", (2, 4)), ("EA", (2, 4))])
@pytest.mark.parametrize("codes", ["large leaves", "small leaves", "whole"])
def test_types_of_codes_and_scales(kinds, sizes, codes):
    """They stay the same from step to step, also over an axis of one device and over axes of both types."""
    mesh = jax.make_mesh(sizes, ("x", "y"), tuple(map(KINDS.get, kinds)), devices=jax.devices()[:8])
    rows = 64 if codes == "large leaves" else 8
    tx = om.compress_state(om.adam(0.1), elementwise=codes != "whole")
    for spec in (P("x", "y"), P(("x", "y")), P(None, ("y", "x")), P("y")):
        with jax.set_mesh(mesh):
            place = NamedSharding(mesh, spec)
            params = {"w": jax.device_put(jnp.ones((rows, 1024)), place)}
            state = tx.init(params)
            step = jax.jit(lambda g, state: tx.update(g, state, g))
            _, after = step.trace(params, state).out_info
            for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
                assert y.sharding is None or jax.typeof(x).sharding == y.sharding
            step.lower(params, state)


@pytest.mark.parametrize("spec", [None, P("x"), P(None, "x")], ids=["no mesh", "rows", "columns"])
def test_eight_bits_over_explicit_axes(spec):
    """Also arrays whose types have no mesh, while one is in use."""
    params = {"w": jnp.linspace(-1.0, 1.0, 64 * 1024).reshape(64, 1024)}
    tx = om.adamw(0.1, state="int8")
    expected, _ = jax.jit(tx.update)(params, tx.init(params), params)
    mesh = explicit((8,), ("x",))
    with jax.set_mesh(mesh):
        if spec is not None:
            params = jax.device_put(params, jax.sharding.NamedSharding(mesh, spec))
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    rounding.close(np.asarray(updates["w"]), np.asarray(expected["w"]), units=8, dtype="float32")


@pytest.mark.parametrize("wrapped", [lambda tx: om.multi_steps(tx, 2), probe], ids=["multi_steps", "probe"])
def test_what_varies_inside_shard_map(wrapped):
    """Where types say so: shards of gradients and parameters, beside a state that is the same everywhere."""
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    tx, whole = wrapped(om.adam(0.1)), {"w": jnp.ones((8, 3)), "b": jnp.ones(4)}

    def step(g, state, params):
        return jax.tree.map(lambda x: x[None], tx.update(g, state, params))

    state = tx.init({"w": jnp.ones((2, 3)), "b": jnp.ones(1)})
    specs = (P("data"), P(), P("data"))
    step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=True)
    jax.eval_shape(step, whole, state, whole)


@pytest.mark.parametrize(
    "tx",
    [om.adamw(0.1), om.lion(0.1), om.adamw(0.1, weight_decay_form="corrected"), om.adamw(0.1, state="int8")],
    ids=["adamw", "lion", "corrected", "int8"],
)
def test_a_state_that_varies_stays_so(tx):
    """Inside `shard_map`, one member of an ensemble on each device: also numbers that are always the same."""
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    params = {"w": jnp.ones((4, 64, 64))}

    def steps(state, params):
        state, params = jax.tree.map(lambda x: x[0], (state, params))

        def step(state, _):
            return tx.update(params, state, params)[1], None

        return jax.tree.map(lambda x: x[None], jax.lax.scan(step, state, length=2)[0])

    state = jax.vmap(tx.init)(params)
    steps = jax.shard_map(steps, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert jax.tree.structure(jax.eval_shape(steps, state, params)) == jax.tree.structure(state)


IN_LOOPS = {
    "multi_steps": om.multi_steps(om.adam(0.1), 2),
    "extrapolate": om.chain(om.sgd(0.1), om.extrapolate(0.1, 0.9)),
    "mars_adamw": om.mars_adamw(0.1),
    "factored": om.factored(0.9, {"w": "io", "b": None}),
    "skip_nonfinite": om.skip_nonfinite(om.chain()),
}


@pytest.mark.parametrize("gradient", [P("data"), P(), None])
@pytest.mark.parametrize("name", IN_LOOPS)
def test_a_loop_over_explicit_axes(name, gradient):
    """The state keeps its type, whatever that of the gradient, which is also a constant of the program."""
    tx, mesh = IN_LOOPS[name], trees.mesh_of(4, 2, AxisType.Explicit)
    params = {"w": jnp.ones((8, 16)), "b": jnp.ones(4)}
    with jax.set_mesh(mesh):
        g = params if gradient is None else jax.device_put(params, jax.NamedSharding(mesh, gradient))
        params = jax.device_put(params, jax.NamedSharding(mesh, P("data")))

        def steps(state):
            return jax.lax.scan(lambda s, _: (tx.update(g, s, params)[1], None), state, None, length=2)[0]

        jax.eval_shape(steps, jax.jit(tx.init)(params))


ENSEMBLES = {
    "adamw": om.adamw(0.1),
    "schedule": om.sgd(lambda count: 0.1 / (1 + count.astype(float))),
    "muon": om.muon(0.1, axes={"*": "io"}),
    "int8": om.adam(0.1, state={"first": Signed8(), "second": Nonneg8()}),
    "clip_by_global_norm": om.clip_by_global_norm(1.0),
}


@pytest.mark.parametrize("name", ENSEMBLES)
def test_an_ensemble_over_an_explicit_axis(name):
    """A mesh axis divides the runs of `vmap`, and so the numbers that all runs have alike."""
    tx, mesh = ENSEMBLES[name], explicit((4, 2), ("run", "data"))

    def step(w, state):
        return tx.update({"w": w}, state, {"w": w})

    runs = [
        jnp.asarray(np.random.default_rng(seed).standard_normal((8, 16)), jnp.float32) for seed in range(4)
    ]
    states = [tx.init({"w": w}) for w in runs]
    for _ in range(2):
        alone = [jax.jit(step)(w, state) for w, state in zip(runs, states, strict=True)]
        states = [state for _, state in alone]
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P("run"))
        w = jax.device_put(jnp.stack(runs), place)
        state = jax.tree.map(lambda x: jax.device_put(x, place), jax.vmap(tx.init)({"w": jnp.stack(runs)}))
        for _ in range(2):
            updates, state = jax.jit(jax.vmap(step))(w, state)
    for k, (expected, _) in enumerate(alone):
        rounding.close(np.asarray(updates["w"])[k], np.asarray(expected["w"]), condition=1e3, dtype="float32")


INJECTED = {
    "soap": lambda: om.inject_hyperparams(om.soap)(0.1, axes={"*": "io"}),
    "shampoo": lambda: om.inject_hyperparams(om.shampoo)(0.1, axes={"*": "io"}),
    "factored": lambda: om.inject_hyperparams(lambda b2: om.factored(b2, axes={"*": "io"}))(0.9),
    "mean": lambda: om.inject_hyperparams(lambda b2: om.mean("i", om.ema(b2), axes={"*": "io"}))(0.9),
}


@pytest.mark.parametrize("name", INJECTED)
def test_numbers_in_the_state_over_explicit_axes(name):
    """The compiler divides what these compute, and their numbers are arrays over the mesh."""
    tx, mesh = INJECTED[name](), trees.mesh_of(4, 2, AxisType.Explicit)
    params = {"w": jnp.eye(8) + jnp.arange(64.0).reshape(8, 8) / 64}
    expected, _ = jax.jit(tx.update)(params, tx.init(params), params)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, jax.NamedSharding(mesh, P("data")))
        updates, state = jax.jit(tx.update)(placed, tx.init(placed), placed)
        tx.update(placed, state, placed)
    rounding.close_each(updates, expected, condition=1e5)
