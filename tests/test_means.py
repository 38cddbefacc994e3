"""Means over the sides of matrices, and the optimizers that are made of them."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
import test_hyperball

import optimorph as om
from optimorph.linalg import Exact

AFTER = {
    "normuon": [[0.4842054912, -1.0016196696, 1.4811666358], [-0.5172432525, 0.2131018744, 0.9952258215]],
    "shorter": [[0.4859815864, -1.0034567390, 1.4802350524], [-0.5132217376, 0.2041070788, 0.9954760142]],
    "adamuon": [[0.4966305909, -1.0041993580, 1.4950457308], [-0.5046273913, 0.2370539917, 0.9954561692]],
    "muon2": [[0.4851252637, -1.0055745649, 1.4886733321], [-0.5211310527, 0.2144420053, 0.9990074968]],
}
"""The weights after three steps of the published programs."""

RECIPES = {
    "normuon": functools.partial(om.normuon, weight_decay=0.1),
    "shorter": functools.partial(om.normuon, weight_decay=0.1, average="shorter"),
    "adamuon": functools.partial(om.adamuon, weight_decay=0.01),
    "muon2": functools.partial(om.muon2, weight_decay=0.0125),
}
each = pytest.mark.parametrize("name", RECIPES)


def run(tx, params, gradients):
    params, state = jax.tree.map(jnp.asarray, params), None
    for g in gradients:
        state = tx.init(params) if state is None else state
        updates, state = tx.update(jax.tree.map(jnp.asarray, g), state, params)
        params = optax.apply_updates(params, updates)
    return params


def drawn(shapes, steps=4):
    rng = np.random.default_rng(0)
    return [{name: rng.standard_normal(shape) for name, shape in shapes.items()} for _ in range(steps)]


@each
@pytest.mark.parametrize("axes", ["oi", "io"])
@rounding.in_float64
def test_three_steps_of_the_published_program(name, axes):
    def turned(tree):
        return jax.tree.map(lambda x: x.T if axes == "io" else x, tree)

    tx = RECIPES[name](0.02, axes={"*": axes}, orthogonalizer=Exact())
    params = run(tx, turned(test_hyperball.WEIGHTS), map(turned, test_hyperball.GRADIENTS))
    np.testing.assert_allclose(turned(params)["w"], AFTER[name], atol=6e-11)


@rounding.in_float64
def test_a_tall_matrix():
    tx = om.normuon(0.02, weight_decay=0.1, axes={"*": "oi"}, orthogonalizer=Exact())
    flipped = jax.tree.map(np.transpose, [test_hyperball.WEIGHTS, *test_hyperball.GRADIENTS])
    expected = [[0.4835039069, -0.5168661424], [-1.0055793975, 0.1941293236], [1.4778116429, 0.9958050457]]
    np.testing.assert_allclose(run(tx, flipped[0], flipped[1:])["w"], expected, atol=6e-11)


@pytest.mark.examples("i(4+1+1 o)--1-normuon", "ioo---adamuon", "bio---muon2")
@each
@pytest.mark.parametrize(
    ("spec", "shape", "cut"),
    [
        ("i(3o)", (8, 12), lambda w: np.split(w, 3, 1)),
        ("i(4+1+1 o)", (8, 48), lambda w: np.split(w, [32, 40], 1)),
        ("i(4+1+1 o)", (8, 24), lambda w: np.split(w, [16, 20], 1)),  # one block is wide, two are tall
        ("(2i)o", (12, 5), lambda w: np.split(w, 2, 0)),
        ("ibo", (8, 3, 5), lambda w: np.moveaxis(w, 1, 0)),
        ("bio", (3, 4, 9), list),
        ("ioo", (6, 3, 4), lambda w: [w.reshape(6, 12)]),
        ("oiii", (6, 2, 3, 2), lambda w: [w.reshape(6, 12).T]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@rounding.in_float64
def test_blocks_heads_and_stacks_are_separate_matrices(name, spec, shape, cut):
    whole = drawn({"w": shape}, 5)
    parts = [{f"w{k}": x for k, x in enumerate(cut(tree["w"]))} for tree in whole]
    polar = Exact()
    got = run(RECIPES[name](0.1, axes={"*": spec}, orthogonalizer=polar), whole[0], whole[1:])
    want = run(RECIPES[name](0.1, axes={"*": "io"}, orthogonalizer=polar), parts[0], parts[1:])
    got = {f"w{k}": x for k, x in enumerate(cut(np.asarray(got["w"])))}
    rounding.close(got, jax.tree.map(np.asarray, want), condition=1e3)


def test_the_state_has_a_number_for_each_output():
    params = {"w": jnp.ones((16, 64)), "layers": jnp.ones((3, 16, 8)), "fused": jnp.ones((16, 96))}
    axes = {"w": "io", "layers": "bio", "fused": "i(4+1+1 o)"}

    def sizes(**arguments):
        state = om.normuon(0.1, axes=axes, **arguments).init(params)
        means = optax.tree.get_all_with_path(state.inner_states["matrix"], "average")
        return [{name: None if x is None else x.shape for name, x in tree.items()} for _, tree in means]

    moment, rows = sizes()
    assert moment == jax.tree.map(jnp.shape, params)
    assert rows == {"w": (1, 64), "layers": (3, 1, 8), "fused": (1, 96)}
    _, inputs, outputs = sizes(average="shorter")
    assert inputs == {"w": (1, 64), "layers": None, "fused": (1, 96)}
    assert outputs == {"w": None, "layers": (3, 16, 1), "fused": None}


@each
def test_8_bit_state_and_bfloat16(name):
    """Every moment of the parameters' shape is in one byte; the first update is that of float32 state."""
    g = {"kernel": jnp.asarray(drawn({"w": (64, 128)})[0]["w"], jnp.bfloat16)}
    axes = {"*": "io"}
    narrow, wide = RECIPES[name](0.1, axes=axes, state="int8"), RECIPES[name](0.1, axes=axes)
    first, state = jax.jit(narrow.update)(g, narrow.init(g), g)
    assert max(x.nbytes for x in jax.tree.leaves(state)) == 64 * 128
    second, state = jax.jit(narrow.update)(g, state, g)
    state = wide.init(g)
    expected, state = jax.jit(wide.update)(g, state, g)
    rounding.close(first, expected, units=2)
    expected, _ = jax.jit(wide.update)(g, state, g)
    x, y = (np.asarray(tree["kernel"], np.float64).ravel() for tree in (second, expected))
    assert x @ y > 0.99 * np.linalg.norm(x) * np.linalg.norm(y)


@each
def test_nu_dtype(name):
    """Of second moments of the parameters' shape; with `others` it is refused where there is none."""
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}
    arguments = {"axes": {"w": "io", "b": None}, "nu_dtype": "bfloat16", "others": om.adam(0.1)}
    if name in ("normuon", "shorter"):
        with pytest.raises(ValueError, match="normuon: nu_dtype is for the AdamW that others replaces"):
            RECIPES[name](0.1, **arguments)
    else:
        state = RECIPES[name](0.1, **arguments).init(params)
        dtypes = [x.dtype for x in jax.tree.leaves(state) if x.shape == (4, 6)]
        assert sorted(map(str, dtypes)) == ["bfloat16", "float32"]


def test_all_arguments_of_muon():
    for name in ("muonh", "normuon", "adamuon", "muon2"):
        own = inspect.signature(getattr(om, name)).parameters
        for argument, parameter in inspect.signature(om.muon).parameters.items():
            if name != "muonh" or argument != "scale":
                assert own[argument].annotation == parameter.annotation
    with pytest.raises(TypeError, match="unexpected keyword argument 'axis'"):
        om.normuon(0.1, axis={"*": "io"})
    with pytest.raises(ValueError, match="normuon: others_learning_rate must be finite and at least 0"):
        om.normuon(0.1, others_learning_rate=-1.0)
    with pytest.raises(ValueError, match="muonh: weight_decay_form is for the AdamW that others replaces"):
        om.muonh(0.1, weight_decay_form="cautious", others=om.sgd(0.1))


@rounding.in_float64
def test_a_matrix_that_is_large_or_zero_keeps_its_norm():
    tx = om.keep_norm(om.sign(), {"*": "io"})
    w = {"w": jnp.asarray([[3.0, 0.0], [0.0, -4.0]]), "zero": jnp.zeros((2, 2))}
    updates, _ = tx.update(w, tx.init(w), w)
    rounding.close(updates["w"], np.array([[1, 0], [0, -1]]) * 5 / np.sqrt(2))
    np.testing.assert_array_equal(updates["zero"], 0)


def test_what_is_refused():
    w = {"kernel": jnp.ones((128, 128))}
    with pytest.raises(ValueError, match=r"mean: over must be .* but is 'rows'\. Type mean\('i'\)"):
        om.mean("rows")
    with pytest.raises(ValueError, match="mean: inner must be a transform of this library"):
        om.mean("i", optax.scale(2.0))
    with pytest.raises(ValueError, match="normuon: average must be 'inputs' or 'shorter', but is 'outputs'"):
        om.normuon(0.1, average="outputs")
    inside = om.compress_state(om.chain(om.ema(0.9), om.mean("i")))
    with pytest.raises(ValueError, match="compress_state: put mean outside"):
        inside.update(w, inside.init(w), w)


@rounding.in_float64
def test_corrected_decay():
    """λ η² / max η, of the rates so far; in a warm-up that is λ η."""
    rates = [0.1, 0.4, 0.2, 0.0]
    tx = om.adamw(lambda count: jnp.asarray(rates)[count], weight_decay=0.5, weight_decay_form="corrected")
    w, state = {"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)})
    for expected in (0.05, 0.2, 0.05, 0.0):
        updates, state = tx.update({"w": jnp.zeros(3)}, state, w)
        rounding.close(updates["w"], np.array(-expected))
    injected = om.inject_hyperparams(om.adamw)(0.4, weight_decay=0.5, weight_decay_form="corrected")
    state = injected.init(w)
    for rate, expected in ((0.4, 0.2), (0.2, 0.05)):
        state.hyperparams["learning_rate"] = jnp.asarray(rate)
        updates, state = injected.update({"w": jnp.zeros(3)}, state, w)
        rounding.close(updates["w"], np.array(-expected))


@pytest.mark.parametrize("over", ["i", "o", "io"])
@pytest.mark.parametrize("spec", ["i(2~(4+1+1) o)", "i(3*(2+1+1) o)", "i(~2 o)", "(2~(4+1+1) i)o"])
@rounding.in_float64
def test_repeated_blocks_are_matrices_of_their_own(spec, over):
    """Repetitions of a block that are one matrix, interleaved, have one mean."""
    axes, g = om.linalg.Axes(spec), jnp.asarray(drawn({"w": (12, 12)}, 1)[0]["w"])
    side = {"i": -2, "o": -1, "io": (-2, -1)}[over]
    means = [jnp.broadcast_to(x.mean(side, keepdims=True), x.shape) for x in axes.matrices(g)]
    tx = om.mean(over, axes={"*": spec})
    u, _ = tx.update({"w": g}, tx.init({"w": g}))
    rounding.close(u["w"], axes.array(means, g.shape))


def test_rows_and_columns_of_no_layers():
    """A stack of no matrices stays what it is, and so do matrices without columns."""
    params = {"w": jnp.ones((0, 8, 8)), "v": jnp.ones((0, 3)), "u": jnp.ones((8, 0))}
    tx = om.factored(0.9, {"w": "bio", "v": None, "u": "io"})
    assert not any(x.any() for x in jax.tree.leaves(tx.init(params)))
    updates, state = tx.update(params, tx.init(params))
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, tx.init(params))
