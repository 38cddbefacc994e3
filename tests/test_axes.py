"""How an array reads as matrices: the grammar, and what it means for an update."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optimorph as om
from optimorph.linalg import Axes, Exact

LETTERS = st.sampled_from(["i", "o", "b", "(2i)", "(3o)", "(2+1 o)", "(1+2+1i)"])
SPECS = st.lists(LETTERS, min_size=2, max_size=4).map("".join).filter(lambda s: "i" in s and "o" in s)


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@settings(deadline=None, max_examples=60)
@given(spec=SPECS, data=st.data())
def test_round_trip(spec, data):
    axes = Axes(spec)
    shape = tuple(12 * data.draw(st.integers(1, 2)) for _ in range(axes.ndim))
    x = jnp.arange(int(np.prod(shape)), dtype=jnp.float32).reshape(shape)
    stacks = axes.matrices(x)
    assert axes.misfit(shape) is None
    assert tuple(stack.shape for stack in stacks) == axes.stacks(shape)
    np.testing.assert_array_equal(axes.array(stacks, shape), x)
    assert sum(stack.size for stack in stacks) == x.size


def test_stacks_are_batch_in_out():
    x = draw((2, 3, 4, 5))
    assert Axes("bioo").stacks(x.shape) == ((2, 3, 20),)
    (stack,) = Axes("obii").matrices(x)  # an entry of it, by hand
    assert stack.shape == (3, 20, 2)
    assert stack[1, 2 * 5 + 3, 1] == x[1, 1, 2, 3]


def test_equal_blocks_are_a_stack_and_unequal_ones_several():
    assert Axes("i(3o)").stacks((4, 12)) == ((3, 4, 4),)
    assert Axes("i(1+1+1 o)").stacks((4, 12)) == ((3, 4, 4),)
    assert Axes("i(4+1+1 o)").stacks((4, 12)) == ((4, 8), (4, 2), (4, 2))
    assert Axes("i(32+8+8 o)").stacks((4, 48 * 5)) == ((4, 160), (4, 40), (4, 40))
    assert Axes("(2+1 i)(1+1+2 o)").stacks((6, 8)) == ((4, 2), (4, 2), (4, 4), (2, 2), (2, 2), (2, 4))


@pytest.mark.parametrize(
    "spec", ["", "i", "ob", "xio", "i(o)", "i(0o)", "i(3+0 o)", "i(3b)o", "i(3o", "io)", "IO"]
)
def test_what_is_no_matrix_is_refused(spec):
    with pytest.raises(ValueError, match=r"does not describe a matrix\. Type one letter per axis"):
        Axes(spec)


def test_what_is_no_text_is_refused():
    axes = object.__new__(Axes)  # past the type checker, which users need not have
    object.__setattr__(axes, "spec", 5)
    with pytest.raises(ValueError, match=r"^5 does not describe a matrix\. Type one letter per axis"):
        axes.__post_init__()


def test_misfits_are_said():
    assert "describes 2 axes, not 3" in Axes("io").misfit((2, 3, 4))
    assert "an axis of 10 does not divide into 1+1+1 parts" in Axes("i(3o)").misfit((2, 10))


def first_update(leaf, spec, **kwargs):
    tx = om.muon(0.02, axes={"w": spec}, orthogonalizer=Exact(), **kwargs)
    return tx.update({"w": leaf}, tx.init({"w": leaf}))[0]["w"]


SCALES = ["rms_to_rms", "keller", "adamw_rms", None]


@pytest.mark.parametrize("scale", SCALES)
def test_a_transposed_spec_gives_the_transposed_update(scale):
    g = draw((6, 4))
    np.testing.assert_allclose(
        first_update(g.T, "oi", scale=scale), first_update(g, "io", scale=scale).T, atol=1e-6
    )


@pytest.mark.parametrize("scale", SCALES)
def test_a_convolution_is_its_flattened_matrix(scale):
    g = draw((3, 2, 4, 5))
    flat = first_update(g.reshape(24, 5), "io", scale=scale)
    np.testing.assert_allclose(first_update(g, "iiio", scale=scale), flat.reshape(g.shape), atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_a_stack_is_its_slices_and_heads_are_matrices(scale):
    g = draw((3, 6, 4))
    for k in range(3):
        alone = first_update(g[k], "io", scale=scale)
        np.testing.assert_allclose(first_update(g, "bio", scale=scale)[k], alone, atol=1e-6)
    for k in range(6):
        alone = first_update(g[:, k], "io", scale=scale)
        np.testing.assert_allclose(first_update(g, "ibo", scale=scale)[:, k], alone, atol=1e-6)
    whole = first_update(g.reshape(3, 24), "io", scale=scale).reshape(g.shape)
    np.testing.assert_allclose(first_update(g, "ioo", scale=scale), whole, atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("spec", "widths"), [("i(3o)", (4, 4, 4)), ("i(4+1+1 o)", (8, 2, 2))])
def test_fused_parameters_are_separate_ones(spec, widths, scale):
    parts = [draw((5, width), seed) for seed, width in enumerate(widths)]
    fused = first_update(jnp.concatenate(parts, axis=1), spec, scale=scale)
    alone = [first_update(part, "io", scale=scale) for part in parts]
    np.testing.assert_allclose(fused, jnp.concatenate(alone, axis=1), atol=1e-6)
    turned = first_update(jnp.concatenate(parts, axis=1).T, f"{spec[1:]}i", scale=scale)
    np.testing.assert_allclose(turned, fused.T, atol=1e-6)


def test_two_dimensional_heads_are_those_of_three():
    g = draw((5, 12))
    np.testing.assert_allclose(
        first_update(g, "i(3o)"), first_update(g.reshape(5, 3, 4), "ibo").reshape(5, 12), atol=1e-6
    )
