"""How leaves read as matrices, and which ones do."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import optimorph as om
from optimorph.core.tree import paths_and_shapes
from optimorph.linalg import Axes, NewtonSchulz
from optimorph.routing import default_axes

SPECS = st.text("iob", min_size=2, max_size=5).filter(lambda s: "i" in s and "o" in s)


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@settings(deadline=None, max_examples=60)
@given(spec=SPECS, data=st.data())
def test_round_trip(spec, data):
    shape = tuple(data.draw(st.integers(1, 4)) for _ in spec)
    x = jnp.arange(int(np.prod(shape)), dtype=jnp.float32).reshape(shape)
    axes = Axes(spec)
    stack = axes.matrices(x)
    assert stack.shape[-2:] == axes.sizes(shape)
    assert stack.ndim == 2 + spec.count("b")
    np.testing.assert_array_equal(axes.array(stack, shape), x)


def first_update(leaf, spec, **kwargs):
    tx = om.muon(0.02, axes={"w": spec}, **kwargs)
    return tx.update({"w": leaf}, tx.init({"w": leaf}))[0]["w"]


@pytest.mark.parametrize("scale", ["rms_to_rms", "keller", "adamw_rms", None])
def test_a_transposed_spec_gives_the_transposed_update(scale):
    g = draw((6, 4))
    np.testing.assert_allclose(
        first_update(g.T, "oi", scale=scale), first_update(g, "io", scale=scale).T, atol=1e-6
    )


def test_a_convolution_is_its_flattened_matrix():
    g = draw((3, 2, 4, 5))
    flat = first_update(g.reshape(24, 5), "io")
    np.testing.assert_allclose(first_update(g, "iiio"), flat.reshape(g.shape), atol=1e-6)


def test_a_stack_is_its_slices_and_heads_are_matrices():
    g = draw((3, 6, 4))
    np.testing.assert_allclose(first_update(g, "bio")[1], first_update(g[1], "io"), atol=1e-6)
    np.testing.assert_allclose(first_update(g, "ibo")[:, 2], first_update(g[:, 2], "io"), atol=1e-6)
    whole = first_update(g.reshape(3, 24), "io").reshape(g.shape)
    np.testing.assert_allclose(first_update(g, "ioo"), whole, atol=1e-6)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, tokens, image):
        x = linen.Embed(11, 8, name="embed")(tokens).mean(0)
        x = linen.LayerNorm()(linen.Dense(8)(x))
        y = linen.Conv(4, (3, 3))(image).mean((0, 1))
        return linen.Dense(11, name="lm_head")(jnp.concatenate([x, y]))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 11, rngs=rngs)


def specs(params):
    return {path: default_axes(path, shape) for path, shape in paths_and_shapes(params).items()}


def test_linen_defaults():
    params = Linen().init(jax.random.key(0), jnp.zeros(3, int), jnp.zeros((8, 8, 1)))["params"]
    assert {k: v for k, v in specs(params).items() if v} == {"Conv_0/kernel": "iiio", "Dense_0/kernel": "io"}


def test_nnx_defaults():
    params = nnx.state(Nnx(nnx.Rngs(0)), nnx.Param)
    assert {k: v for k, v in specs(params).items() if v} == {"blocks/0/kernel": "io", "blocks/1/kernel": "io"}


def test_equinox_defaults():
    params = eqx.filter(eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(0)), eqx.is_array)
    assert {k: v for k, v in specs(params).items() if v} == {f"layers/{k}/weight": "oi" for k in range(3)}


def test_attention_names_are_not_heads():
    assert default_axes("MultiHeadDotProductAttention_0/out/weight", (8, 8)) == "oi"
    assert default_axes("decoder/multihead/query", (8, 8)) == "io"


def test_nnx_training_reaches_every_parameter():
    """`nnx.Optimizer` under `nnx.jit`, the labels found again in every step."""
    model = Nnx(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, om.muon(0.02), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            x = model.embed(jnp.arange(11))
            for block in model.blocks:
                x = block(x)
            return (model.head(model.norm(x)) ** 2).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    step(model, optimizer)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, nnx.state(model, nnx.Param))
    assert all(jax.tree.leaves(moved))


def test_equinox_training():
    model = eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(0))
    tx = om.muon(0.02)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        gradients = eqx.filter_grad(lambda m: (jax.vmap(m)(jnp.ones((4, 3))) ** 2).mean())(model)
        updates, state = tx.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    stepped, _ = step(model, state)
    assert bool(jnp.any(stepped.layers[0].weight != model.layers[0].weight))


def test_first_rule_wins_and_the_rest_falls_to_the_defaults():
    params = {"a": {"kernel": draw((4, 4))}, "b": {"kernel": draw((4, 4))}}
    tx = om.muon(0.02, axes={"a/*": None, "*": "io"}, orthogonalizer=NewtonSchulz("jordan"))
    matrix = tx.init(params).inner_states["matrix"].inner_state[0].average
    assert [path for path, _ in paths_and_shapes(matrix).items()] == ["b/kernel"]
    assert specs(params) == {"a/kernel": "io", "b/kernel": "io"}


def test_a_leaf_called_value_keeps_its_name():
    """Only a box of nothing but a value, as NNX wraps arrays, is no part of the name."""

    class Attention(eqx.Module):
        query: jax.Array
        value: jax.Array

    tree = {"attn": Attention(draw((4, 4)), draw((4, 4)))}
    assert list(paths_and_shapes(tree)) == ["attn/query", "attn/value"]
    hidden = eqx.tree_at(lambda t: t["attn"].query, tree, None)
    assert list(paths_and_shapes(hidden)) == ["attn/value"]
    assert "embed/embedding" in paths_and_shapes(nnx.state(Nnx(nnx.Rngs(0)), nnx.Param))


def test_a_function_decides():
    params = {"w": draw((4, 4)), "v": draw((4, 4))}
    tx = om.muon(0.02, axes=lambda path, shape: "oi" if path == "w" else None)
    matrix = tx.init(params).inner_states["matrix"].inner_state[0].average
    assert list(paths_and_shapes(matrix)) == ["w"]
