"""The recipes inside the code of others: Flax, Equinox, Haiku's dictionaries, optax's wrappers, checkpoints.

`test_contract.py` has what is promised of one update. Here each program holds the whole catalog, which is
faster to compile than many; messages say which recipe it was.
"""

import functools
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import catalog
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
import rounding
from flax import linen, nnx
from flax.training.train_state import TrainState

import optimorph as om
from optimorph.linalg import NewtonSchulz

pytestmark = pytest.mark.usefixtures("float64")
TRANSFORMS = {entry.id: entry.build() for entry in catalog.RECIPES}
SHAPES = {"hidden": (3, 4), "head": (3, 4)}
STORED = TRANSFORMS | {
    "adamw-bfloat16": om.adamw(0.1, nu_dtype="bfloat16"),
    "adamw-schedules": om.adamw(
        catalog.linear(0.1, 0.01), weight_decay=catalog.linear(0.2, 0.1), mask={"head": False, "*": True}
    ),
    "adamw-int8": om.adamw(0.1, state={"first/*": om.codecs.Signed8(), "second/*": om.codecs.Nonneg8()}),
    "adamw-wrapped": om.skip_nonfinite(om.multi_steps(om.inject_hyperparams(om.adamw)(0.1), 2)),
}
CONDITION = NewtonSchulz().table.slope
IN_AN_EIGENBASIS = {entry.id for entry in catalog.RECIPES if entry.stacks}
"""They magnify rounding by the ratio of the gradient's eigenvalues."""

LAYOUTS = sorted((Path(__file__).parent / "fixtures").glob("states-*.json"))


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled():
    """What is compared here is not the compiler's work."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def leaf(seed, shape):
    """The same numbers on every machine and for all time."""
    return jnp.asarray(np.sin(1.0 + 2.3 * seed + np.arange(np.prod(shape))).reshape(shape))


def weights(seed=0):
    return {name: leaf(seed + 0.5 * k, shape) for k, (name, shape) in enumerate(SHAPES.items())}


def gradients(steps, seed=10):
    """As a scan takes them."""
    return jax.tree.map(lambda *g: jnp.stack(g), *[weights(seed + step) for step in range(steps)])


def follow(tx, params, state, gs):
    """The parameters and the state after all those gradients."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), gs)[0]


def every_recipe(train, transforms=TRANSFORMS):
    """`train(tx)` for the whole catalog, in one program."""
    with jax.numpy_dtype_promotion("standard"):  # optax's wrappers need it
        return jax.jit(lambda: {name: train(tx) for name, tx in transforms.items()})()


def ends(wrap, gs):
    """Where every wrapped recipe arrives."""
    return every_recipe(lambda tx: follow(wrap(tx), weights(), wrap(tx).init(weights()), gs)[0])


@functools.cache
def alone(steps=6):
    """Where every recipe arrives by itself."""
    return ends(lambda tx: tx, gradients(steps))


def agree(found, expected):
    for names, condition in ((found.keys() - IN_AN_EIGENBASIS, CONDITION), (IN_AN_EIGENBASIS, 1e6)):
        some, same = ({k: x for k, x in each.items() if k in names} for each in (found, expected))
        rounding.close(some, same, condition=condition)


# Frameworks. All of them minimise this, from the same weights, and take two steps.


def loss_of(hidden, head):
    return jnp.mean((jnp.tanh(leaf(3, (5, 3)) @ hidden) @ head.T) ** 2)


@functools.cache
def descended():
    def train(tx):
        params, state = weights(), tx.init(weights())
        for _ in range(2):
            updates, state = tx.update(jax.grad(lambda p: loss_of(**p))(params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    return every_recipe(train)


class Model(nnx.Module):
    def __init__(self):
        self.hidden = nnx.Param(weights()["hidden"])
        self.head = nnx.Param(weights()["head"])
        self.seen = nnx.BatchStat(jnp.zeros(()))


def test_flax_nnx():
    """`nnx.Optimizer` under `nnx.jit`, of the parameters alone: other variables are none of its business."""
    models = {name: Model() for name in TRANSFORMS}
    optimizers = {name: nnx.Optimizer(models[name], tx, wrt=nnx.Param) for name, tx in TRANSFORMS.items()}

    @nnx.jit
    def step(models, optimizers):
        for name, model in models.items():
            slopes = nnx.grad(lambda m: loss_of(m.hidden[...], m.head[...]))(model)
            optimizers[name].update(model, slopes)
            model.seen[...] += 1

    with jax.numpy_dtype_promotion("standard"):
        for _ in range(2):
            step(models, optimizers)
    agree({k: {"hidden": m.hidden[...], "head": m.head[...]} for k, m in models.items()}, descended())


class Adapted(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.LoRALinear(3, 4, lora_rank=2, rngs=rngs)
        self.dense.lora.lora_b[...] = leaf(4, (2, 4))


@pytest.mark.slow
@rounding.in_float32
def test_low_rank_factors_alone():
    """With `wrt=nnx.LoRAParam` the rest of the model neither moves nor has a state."""
    models = {name: Adapted(nnx.Rngs(0)) for name in TRANSFORMS}
    kernel, factor = (np.asarray(x) for x in (models["adam"].dense.kernel, models["adam"].dense.lora.lora_a))
    optimizers = {name: nnx.Optimizer(models[name], tx, wrt=nnx.LoRAParam) for name, tx in TRANSFORMS.items()}

    @nnx.jit
    def step(models, optimizers):
        for name, model in models.items():
            slopes = nnx.grad(
                lambda m: jnp.mean((m.dense(leaf(3, (5, 3))) - 1) ** 2),
                argnums=nnx.DiffState(0, nnx.LoRAParam),
            )(model)
            optimizers[name].update(model, slopes)

    with jax.numpy_dtype_promotion("standard"):
        step(models, optimizers)
    for name, model in models.items():
        np.testing.assert_array_equal(model.dense.kernel[...], kernel, err_msg=name)
        assert np.any(np.asarray(model.dense.lora.lora_a[...]) != factor), name
        shapes = {x.shape for x in jax.tree.leaves(nnx.state(optimizers[name], nnx.optimizer.OptState))}
        assert not shapes & {kernel.shape, kernel.shape[1:]}, name


class Linen(linen.Module):
    @linen.compact
    def __call__(self):
        return loss_of(*(self.param(name, lambda _, name=name: weights()[name]) for name in SHAPES))


def test_flax_linen():
    """`TrainState`, which carries the transform through `jit`."""
    model = Linen()
    params = model.init(jax.random.key(0))["params"]
    states = {
        name: TrainState.create(apply_fn=model.apply, params=params, tx=tx) for name, tx in TRANSFORMS.items()
    }

    @jax.jit
    def step(states):
        def after(state):
            slopes = jax.grad(lambda p: state.apply_fn({"params": p}))(state.params)
            return state.apply_gradients(grads=slopes)

        return {name: after(state) for name, state in states.items()}

    with jax.numpy_dtype_promotion("standard"):
        states = step(step(states))
    agree({name: state.params for name, state in states.items()}, descended())


class Net(eqx.Module):
    hidden: jax.Array
    activation: object  # a leaf that is no array
    head: jax.Array
    name: str = eqx.field(static=True, default="net")


class WithNumbers(eqx.Module):
    layer: eqx.nn.Linear
    dropout: eqx.nn.Dropout  # holds a Python float
    activation: Callable

    def __call__(self, x):
        return self.activation(self.layer(x))


@pytest.mark.parametrize(
    "tx",
    [
        om.adamw(1e-3, weight_decay=0.1, mask={"*bias": False, "*": True}),
        om.muon(0.02),
        om.partition({"*weight": "a", "*": "b"}, {"a": om.adamw(1e-3), "b": om.sgd(0.1)}),
        om.multi_steps(om.adamw(1e-3), 2),
        om.skip_nonfinite(om.adamw(1e-3)),
        om.adamw(1e-3, state="int8"),
        optax.chain(om.clip_by_global_norm(1.0), om.adamw(1e-3)),
    ],
    ids=["adamw", "muon", "partition", "multi_steps", "skip_nonfinite", "int8", "clip"],
)
def test_equinox_models_whole(tx):
    """`init` of the filtered model and `update` with the whole one, which holds functions and numbers."""
    model = WithNumbers(eqx.nn.Linear(4, 4, key=jax.random.key(0)), eqx.nn.Dropout(0.1), jax.nn.relu)
    g = eqx.filter_grad(lambda m: jnp.sum(jax.vmap(m)(jnp.ones((3, 4))) ** 2))(model)
    arrays = eqx.filter(model, eqx.is_inexact_array)
    state = tx.init(arrays)
    whole, _ = eqx.filter_jit(tx.update)(g, state, model)
    filtered, _ = eqx.filter_jit(tx.update)(g, state, arrays)
    for u, v in zip(jax.tree.leaves(whole), jax.tree.leaves(filtered), strict=True):
        np.testing.assert_array_equal(u, v)


AS_ARGUMENTS = """
import equinox as eqx, equinox.internal as eqxi, jax, jax.numpy as jnp, numpy as np, optax
import optimorph as om

params = {"hidden": {"kernel": jnp.eye(8) + 0.1}, "bias": jnp.ones(8)}
step = eqx.filter_jit(lambda tx, g, state, params: tx.update(g, state, params))
for make in [
    lambda: om.adamw(0.1, weight_decay=0.1, mask=lambda path, shape: len(shape) > 1, state="int8"),
    lambda: om.muon(0.1),
    lambda: om.soap(0.1),
    lambda: om.shampoo(0.1),
    lambda: om.scion(0.1),
    lambda: om.skip_nonfinite(om.multi_steps(om.lion(optax.cosine_decay_schedule(0.1, 10)), 1)),
    lambda: om.inject_hyperparams(om.adamw)(learning_rate=0.1),
    lambda: om.inject_hyperparams(om.muon)(learning_rate=0.1),
    lambda: om.partition({"*": "all"}, {"all": om.adam(jnp.float32(0.1))}),
    lambda: om.compress_state(optax.adam(0.1), elementwise=True),
]:
    tx, here = eqxi.closure_to_pytree(make()), make()
    state = eqx.filter_jit(lambda tx, params: tx.init(params))(tx, params)
    updates, _ = step(tx, params, state, params)
    expected, _ = jax.jit(here.update)(params, here.init(params), params)
    np.testing.assert_allclose(updates["bias"], expected["bias"], rtol=1e-4)
"""


def test_an_optimizer_is_an_argument():
    """Optimistix passes an optimizer with the variables of its functions as leaves, some of them traced.

    A process of its own: where types are checked, every function has many more variables.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AS_ARGUMENTS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_equinox():
    """`filter_jit` and `filter_grad`: the gradients are None where the model holds a function."""
    models = {name: Net(weights()["hidden"], jnp.tanh, weights()["head"]) for name in TRANSFORMS}
    states = {name: tx.init(eqx.filter(models[name], eqx.is_array)) for name, tx in TRANSFORMS.items()}

    @eqx.filter_jit
    def step(models, states):
        for name, tx in TRANSFORMS.items():
            slopes = eqx.filter_grad(lambda m: loss_of(m.hidden, m.head))(models[name])
            arrays = eqx.filter(models[name], eqx.is_array)
            updates, states[name] = tx.update(slopes, states[name], arrays)
            models[name] = eqx.apply_updates(models[name], updates)
        return models, states

    models, states = step(*step(dict(models), dict(states)))
    agree({k: {"hidden": m.hidden, "head": m.head} for k, m in models.items()}, descended())


@pytest.mark.slow
def test_exported_programs_can_be_saved():
    params = {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(3)}
    tx = om.skip_nonfinite(om.inject_hyperparams(om.muon)(learning_rate=0.1, state="int8"))
    state = tx.init(params)
    for _ in range(2):
        om.register_for_export(jax.eval_shape(tx.init, params))
    update = jax.jit(tx.update)
    saved = jax.export.export(update)(params, state, params).serialize()
    found = jax.export.deserialize(bytearray(saved)).call(params, state, params)
    jax.tree.map(np.testing.assert_array_equal, found, update(params, state, params))

    class EmptyState(NamedTuple):
        pass

    EmptyState.__module__, EmptyState.__qualname__ = "optax.mine", "EmptyState"
    with pytest.raises(ValueError, match=r"optax\.EmptyState"):
        om.register_for_export(EmptyState())


def test_haikus_dictionaries():
    """Modules' names with slashes, and in them `w`."""

    def train(tx):
        params = {"net/~/hidden": {"w": weights()["hidden"]}, "net/~/head": {"w": weights()["head"]}}
        state = tx.init(params)
        for _ in range(2):
            slopes = jax.grad(lambda p: loss_of(p["net/~/hidden"]["w"], p["net/~/head"]["w"]))(params)
            updates, state = tx.update(slopes, state, params)
            params = optax.apply_updates(params, updates)
        return {name.split("/")[-1]: module["w"] for name, module in params.items()}

    agree(every_recipe(train), descended())


# optax's wrappers.


@pytest.mark.slow
def test_accumulation_over_one_step():
    """`optax.MultiSteps(tx, 1)` changes no number, but it is not free: optax keeps a mean of gradients.

    That buffer, as large as the parameters, is optax's. For k = 1 use the recipe itself.
    """
    agree(ends(lambda tx: optax.MultiSteps(tx, 1), gradients(6)), alone())
    for name, tx in TRANSFORMS.items():
        own, wrapped = (
            sum(x.size for x in jax.tree.leaves(some.init(weights())) if x.ndim)
            for some in (tx, optax.MultiSteps(tx, 1))
        )
        assert wrapped == own + sum(w.size for w in jax.tree.leaves(weights())), name


@pytest.mark.slow
def test_accumulation_over_three_steps():
    """An update by the mean of every three gradients."""
    apart = leaf(8, (3, 1))
    near = (apart - apart.mean())[None, :, :, None]  # what is added to them has the mean 0
    three = jax.tree.map(lambda g: (g[:, None] + near).reshape(-1, *g.shape[1:]), gradients(6))
    agree(ends(lambda tx: optax.MultiSteps(tx, 3, accumulator_dtype=float), three), alone())


@pytest.mark.slow
def test_named_chain_and_apply_if_finite():
    """A gradient that is no number is as good as none."""
    sick = jax.tree.map(lambda g: jnp.insert(g, 2, jnp.nan, axis=0), gradients(6))
    agree(ends(lambda tx: optax.named_chain(("finite", optax.apply_if_finite(tx, 3))), sick), alone())


@pytest.mark.slow
def test_lookahead():
    """Half of the way that the recipe alone would have gone."""

    def train(tx):
        both = optax.lookahead(tx, sync_period=6, slow_step_size=0.5)
        params = optax.LookaheadParams.init_synced(weights())
        return follow(both, params, both.init(params), gradients(6))[0].slow

    halfway = {k: jax.tree.map(lambda a, b: (a + b) / 2, weights(), end) for k, end in alone().items()}
    agree(every_recipe(train), halfway)


@pytest.mark.slow
def test_schedule_free():
    """Around optax's Adam and around ours it is the same; with every recipe the averages move."""
    around = functools.partial(optax.contrib.schedule_free, learning_rate=0.1)
    found = ends(around, gradients(6))
    with jax.numpy_dtype_promotion("standard"):
        theirs = around(optax.adam(0.1, eps=1e-2))
        end, _ = jax.jit(lambda: follow(theirs, weights(), theirs.init(weights()), gradients(6)))()
    agree({"adam": found["adam"]}, {"adam": end})
    for name, tree in found.items():
        for key, start in weights().items():
            assert np.all(np.isfinite(tree[key])), name
            assert np.any(tree[key] != start), name


@pytest.mark.slow
def test_sharpness_aware_minimization():
    """If the adversary does not move, that is every second gradient."""

    def around(tx):
        return optax.contrib.sam(tx, optax.set_to_zero(), sync_period=2)

    between = jax.tree.map(lambda g: jnp.stack([-g, g], axis=1).reshape(-1, *g.shape[1:]), gradients(6))
    agree(ends(around, between), alone())


# jax's transformations of a whole update.


@pytest.mark.slow
def test_ensembles():
    """Two models under one `vmap`, states and all, are two models."""
    both = jax.tree.map(lambda *g: jnp.stack(g), gradients(6), gradients(6, 20))

    def train(tx):
        return jax.vmap(lambda gs: follow(tx, weights(), tx.init(weights()), gs)[0])(both)

    found = every_recipe(train)
    agree({name: jax.tree.map(lambda x: x[0], end) for name, end in found.items()}, alone())
    again = ends(lambda tx: tx, gradients(6, 20))
    agree({name: jax.tree.map(lambda x: x[1], end) for name, end in found.items()}, again)


def test_remat():
    """The derivative of an update is that of an update computed twice."""

    def slopes(tx):
        def moved(keep, size):
            updates, _ = (tx.update if keep else jax.checkpoint(tx.update))(
                jax.tree.map(lambda g: size * g, weights(10)), tx.init(weights()), weights()
            )
            return sum(jnp.sum(u * leaf(7, u.shape)) for u in jax.tree.leaves(updates))

        return {"kept": jax.grad(moved, 1)(True, 1.0), "again": jax.grad(moved, 1)(False, 1.0)}

    names = {entry.name: entry.id for entry in reversed(catalog.RECIPES)}  # the first of each
    found = jax.jit(lambda: {name: slopes(TRANSFORMS[own]) for name, own in names.items()})()
    for name, slope in found.items():  # with its eps tiny, 0 but for rounding: sizes do not matter
        np.testing.assert_allclose(slope["again"], slope["kept"], rtol=1e-12, atol=1e-12, err_msg=name)


def test_shapes_of_an_update():
    """`eval_shape` of an update says what it returns, without a number computed."""
    for name, tx in TRANSFORMS.items():
        state = jax.eval_shape(tx.init, weights())
        updates, after = jax.eval_shape(tx.update, weights(), state, weights())
        assert after == state, name
        assert jax.tree.map(jnp.shape, updates) == SHAPES, name


# Checkpoints: what a state holds is not how it is used.


def changed(name, **arguments):
    factory = getattr(om, name)
    of_matrices = "axes" in inspect.signature(factory).parameters
    return factory(0.1, **(arguments | ({"axes": {"*": "io"}} if of_matrices else {})))


CHANGES = {
    **{
        f"{name}-weight_decay": (name, {"weight_decay": 0.1}, {"weight_decay": 0.5})
        for name in catalog.recipes_with("weight_decay")
        if name != "muonh"  # whose matrices have none
    },
    "muon-coefficients": ("muon", {}, {"orthogonalizer": NewtonSchulz("jordan")}),
    "muon-steps": ("muon", {}, {"orthogonalizer": NewtonSchulz(steps=8)}),
    "muon-scale": ("muon", {}, {"scale": "adamw_rms", "momentum": 0.5}),
    "adamw-numbers": ("adamw", {}, {"b1": 0.5, "b2": 0.9, "eps": 1e-2}),
    "adamw-mask": (
        "adamw",
        {"weight_decay": 0.5},
        {"weight_decay": 0.5, "mask": {"hidden": True, "head": False}},
    ),
}


@pytest.mark.slow
def test_restored_with_other_arguments(tmp_path):
    """The new arguments hold, not those that the state was made with; nothing of these is in a checkpoint."""
    before, after = ({k: changed(c[0], **c[side]) for k, c in CHANGES.items()} for side in (1, 2))

    def train(transforms, start):
        found = {k: follow(tx, *start(k, tx), gradients(2)) for k, tx in transforms.items()}
        return {k: end for k, (end, _) in found.items()}, {k: state for k, (_, state) in found.items()}

    params, states = jax.jit(lambda: train(before, lambda k, tx: (weights(), tx.init(weights()))))()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        blank = {k: tx.init(weights()) for k, tx in after.items()}
        restored = checkpointer.restore(tmp_path / "states", blank)
    go_on = jax.jit(lambda states: train(after, lambda k, tx: (params[k], states[k]))[0])
    assert jax.tree.structure(blank) == jax.tree.structure(states)
    ends_restored, ends_kept = go_on(restored), go_on(states)
    unchanged = jax.jit(lambda states: train(before, lambda k, tx: (params[k], states[k]))[0])(states)
    for name, end in ends_restored.items():
        for key, value in end.items():
            np.testing.assert_array_equal(value, ends_kept[name][key], err_msg=name)
        assert any(np.any(value != unchanged[name][key]) for key, value in end.items()), name


def written(states):
    """States as a file keeps them: by path, with shape, dtype and values."""
    return {
        name: {
            jax.tree_util.keystr(path): {
                "shape": x.shape,
                "dtype": str(x.dtype),
                "values": x.ravel().tolist(),
            }
            for path, x in jax.tree_util.tree_leaves_with_path(state)
        }
        for name, state in states.items()
    }


RENAMED = {
    "LearningRateState": {"learning_rate": "last_learning_rate"},
    "DecayState": {"count": "decay_count", "weight_decay": "last_weight_decay"},
    "DebiasState": {"count": "debias_count"},
    "DampenState": {"count": "dampen_count"},
    "CompressedState": {"count": "noise_count"},
    "BFloat16State": {"count": "noise_count"},
    "MultiStepsState": {"count": "window_count"},
}
"""Fields whose names were others in the first layouts."""


def renamed(kept, tree, around=""):
    """What was written with the first names of fields, under today's."""

    def is_known(node):
        return type(node).__name__ in RENAMED

    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_known):
        if is_known(node):
            at = around + jax.tree_util.keystr(path)
            names = {f"{at}.{old}": f"{at}.{new}" for old, new in RENAMED[type(node).__name__].items()}
            if not {*names.values()} & {*kept}:
                kept = {names.get(path, path): x for path, x in kept.items()}
            for field in node._fields:
                kept = renamed(kept, getattr(node, field), f"{at}.{field}")
    return kept


def read(kept, like):
    """The state that was written, into today's: every array has its place, what was not there begins anew."""
    kept = renamed(kept, like)
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    found = {jax.tree_util.keystr(path): x for path, x in leaves}
    assert set(kept) <= set(found)
    for path, x in kept.items():
        found[path] = jnp.asarray(x["values"], x["dtype"]).reshape(x["shape"])
    return jax.tree.unflatten(structure, found.values())


def new_layouts():
    """The optimizers whose states have paths, shapes or dtypes that no file has."""

    def layout(arrays):
        return {path: (tuple(x["shape"]), x["dtype"]) for path, x in arrays.items()}

    def is_kept(name, state):
        own = {jax.tree_util.keystr(p): (x.shape, str(x.dtype)) for p, x in jax.tree.leaves_with_path(state)}
        return any(layout(file.get(name, {})) == own for file in kept)

    kept = [json.loads(path.read_text())["states"] for path in LAYOUTS]
    states = jax.eval_shape(lambda: {name: tx.init(weights()) for name, tx in STORED.items()})
    return {name: STORED[name] for name, state in states.items() if not is_kept(name, state)}


def layouts():
    """What is kept of a version: parameters and states after three steps, parameters after two more.

    Of layouts that are new.
    """

    def train(tx):
        params, state = follow(tx, weights(), tx.init(weights()), gradients(3))
        return {"params": params, "states": state, "later": follow(tx, params, state, gradients(2, 20))[0]}

    found = every_recipe(train, new_layouts())
    return {
        part: written({name: parts[part] for name, parts in found.items()})
        for part in ("params", "states", "later")
    }


@pytest.mark.examples("states-0.1.0")
@pytest.mark.parametrize("path", LAYOUTS, ids=[path.stem for path in LAYOUTS])
@rounding.in_float32
def test_states_of_earlier_versions(path):
    """A run saved by any version goes on in this one.

    When a version changes what a state looks like, add a file with `python tests/fixtures/add.py` and never
    replace one: these are the runs that users have on their disks.
    """
    kept = json.loads(path.read_text())
    starts = {
        name: (
            read(kept["params"][name], weights()),
            read(kept["states"][name], STORED[name].init(weights())),
        )
        for name in kept["states"]
    }
    found = jax.jit(
        lambda: {k: follow(STORED[k], *start, gradients(2, 20))[0] for k, start in starts.items()}
    )()
    later = {name: read(end, weights()) for name, end in kept["later"].items()}
    for name, end in later.items():
        if "bfloat16" in name:  # a moment that is rounded to the other side, times the learning rate
            rounding.close(found[name], end, units=0.1, dtype="bfloat16")
        else:
            rounding.close(found[name], end, condition=CONDITION if "muon" in name or "scion" in name else 1)


@pytest.mark.parametrize("make", [om.adamw, om.hyperball, om.slow_ema, om.inject_hyperparams(om.adamw)])
def test_a_variable_of_flax_is_a_number(make):
    """It may be called, but is no schedule."""
    params = {"w": jnp.ones((3, 4))}
    variable, plain = make(nnx.Param(jnp.asarray(0.25))), make(0.25)
    updates, _ = variable.update(params, variable.init(params), params)
    expected, _ = plain.update(params, plain.init(params), params)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-15)


def test_a_state_without_readings():
    """Of the first version, whose constant rates had no state: `carry_state` makes today's of it."""
    params, tx = weights(), om.adamw(0.1, weight_decay=0.2)
    state = tx.init(params)
    _, state = tx.update(weights(1), state, params)
    old = (state[0], optax.EmptyState(), optax.EmptyState())
    after = om.carry_state(old, tx, params, strict=True)[0]
    assert jax.tree.structure(after) == jax.tree.structure(state)
    expected, _ = tx.update(weights(2), state, params)
    updates, _ = tx.update(weights(2), after, params)
    for name, update in expected.items():
        np.testing.assert_array_equal(updates[name], update)


def test_moments_change_their_dtype():
    params, wide, half = weights(), om.adamw(0.1), om.adamw(0.1, nu_dtype="bfloat16")
    _, state = wide.update(weights(1), wide.init(params), params)
    there = om.carry_state(state, half, params, strict=True)[0]
    assert jax.tree.structure(there) == jax.tree.structure(half.init(params))
    back = om.carry_state(there, wide, params, strict=True)[0]
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-8)  # half a unit of bfloat16


@rounding.in_float32
def test_every_layout_of_today_is_kept():
    """If this fails, run `python tests/fixtures/add.py`, which also records new optimizers at a release."""
    kept = set().union(*(json.loads(path.read_text())["states"] for path in LAYOUTS))
    assert not kept & {*new_layouts()}
