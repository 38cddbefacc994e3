"""How an array reads as matrices: the grammar, and what it means for an update."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
from hypothesis import given, settings
from hypothesis import strategies as st

import optimorph as om
from optimorph.linalg import Axes, Exact

pytestmark = pytest.mark.usefixtures("float64")
PLAIN = ["i", "o", "b", "(2i)", "(3o)", "(2+1 o)", "(1+2+1i)"]
REPEATED = ["(2*(1+2) o)", "(3*2 i)", "(2~(2+1) o)", "(3~2 i)", "(~2 o)", "(~(1+2) i)"]
LETTERS = st.sampled_from([*PLAIN, *REPEATED])
SPECS = st.lists(LETTERS, min_size=2, max_size=4).map("".join).filter(lambda s: "i" in s and "o" in s)


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
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


def test_repeated_and_interleaved_blocks():
    """By hand: heads of two unequal parts, groups of queries that share keys, columns by turns."""
    x = draw((4, 2 * 6))
    heads = x.reshape(4, 2, 6)
    large, small = Axes("i(2*(4+2) o)").matrices(x)
    np.testing.assert_array_equal(large, heads[:, :, :4].transpose(1, 0, 2))
    np.testing.assert_array_equal(small, heads[:, :, 4:].transpose(1, 0, 2))
    q, k, v = Axes("i(2~(4+1+1) o)").matrices(x)
    np.testing.assert_array_equal(q, heads[:, :, :4].reshape(4, 8))
    np.testing.assert_array_equal(k, heads[:, :, 4])
    np.testing.assert_array_equal(v, heads[:, :, 5])
    (both,) = Axes("i(~2 o)").matrices(x)
    np.testing.assert_array_equal(both, jnp.stack([x[:, ::2], x[:, 1::2]]))
    a, b = Axes("i(~(1+2) o)").matrices(x)
    np.testing.assert_array_equal(a, x[:, ::3])
    np.testing.assert_array_equal(b, x.reshape(4, 4, 3)[:, :, 1:].reshape(4, 8))
    assert Axes("i(2*3 o)").parts == Axes("i(6o)").parts
    for axis in ["(8+2+2 o)", "(4+4+4 o)", "(2*(2+1) o)", "(2~(2+1) o)", "(6o)", "(~2 o)", "(~(2+2) o)"]:
        assert str(Axes(f"i{axis}").parts[1]) == axis
    assert Axes("i(128*(192+64) o)").stacks((512, 128 * 256)) == ((128, 512, 192), (128, 512, 64))
    assert "does not divide into 2+1 parts 5 times" in Axes("i(5*(2+1) o)").misfit((4, 12))
    for spec in ("i(2*(4+2) o)", "i(2~(4+1+1) o)", "i(~2 o)", "(~(1+2) i)o"):
        assert "".join(map(str, Axes(spec).parts)).replace(" ", "") == spec.replace("4+2", "2+1").replace(
            " ", ""
        )
    scale = Axes("i(2*(4+2) o)").spread(lambda inputs, outputs: outputs, x.shape)
    np.testing.assert_array_equal(np.broadcast_to(scale, x.shape)[0], [4, 4, 4, 4, 2, 2] * 2)


def test_equal_blocks_are_a_stack_and_unequal_ones_several():
    assert Axes("i(3o)").stacks((4, 12)) == ((3, 4, 4),)
    assert Axes("i(1+1+1 o)").stacks((4, 12)) == ((3, 4, 4),)
    assert Axes("i(4+1+1 o)").stacks((4, 12)) == ((4, 8), (4, 2), (4, 2))
    assert Axes("i(32+8+8 o)").stacks((4, 48 * 5)) == ((4, 160), (4, 40), (4, 40))
    assert Axes("(2+1 i)(1+1+2 o)").stacks((6, 8)) == ((4, 2), (4, 2), (4, 4), (2, 2), (2, 2), (2, 4))


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "i",
        "ob",
        "xio",
        "i(o)",
        "i(0o)",
        "i(3+0 o)",
        "i(3b)o",
        "i(*(1+1) o)",
        "i(0*(1+2) o)",
        "i(2*1+2 o)",
        "i(2~ o)",
        "i(3o",
        "io)",
        "IO",
    ],
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
    with pytest.raises(ValueError, match=r"Axes: an axis of 1000 does not divide into 3\+4 parts 128 times"):
        Axes("i(128*(192+256) o)").stacks((512, 1000))
    with pytest.raises(ValueError, match=r"Axes: .* describes 2 axes, not 3"):
        Axes("io").matrices(jnp.ones((2, 3, 4)))


def polar(stack):
    """The polar factor by NumPy, which compiles nothing for a shape that is new."""
    u, _, vh = np.linalg.svd(stack, full_matrices=False)
    return jnp.asarray(u @ vh)


def first_update(leaf, spec, *, scale):
    """What axes have to do with Muon's update."""
    axes = {"w": spec}
    tx = optax.chain(om.orthogonalize(polar, axes), om.scale_by_shape(scale, axes))
    return tx.update({"w": leaf}, tx.init({"w": leaf}))[0]["w"]


@pytest.mark.parametrize("scale", ["rms_to_rms", "keller", "adamw_rms", None])
def test_muon_goes_by_axes(scale):
    def update(leaf, spec):
        tx = om.muon(0.02, axes={"w": spec}, orthogonalizer=Exact(), scale=scale)
        return tx.update({"w": leaf}, tx.init({"w": leaf}))[0]["w"]

    g = draw((6, 4))
    rounding.close(update(g, "io"), -0.02 * first_update(g, "io", scale=scale), units=64)
    rounding.close(update(g.T, "oi"), update(g, "io").T, units=64)


SCALES = st.sampled_from(["rms_to_rms", "keller", "adamw_rms", None])
SIZES = st.sampled_from([2, 3])
PROPERTY = settings(deadline=None, max_examples=25, derandomize=True)


def assert_equal(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-11)  # the nearest to singular has a condition of 1e3


@pytest.mark.slow
@PROPERTY
@given(
    letters=st.permutations("ioib"),
    shape=st.tuples(*[SIZES] * 4),
    order=st.permutations(range(4)),
    scale=SCALES,
)
def test_a_transposed_spec_gives_the_transposed_update(letters, shape, order, scale):
    g = draw(shape)
    turned = first_update(g.transpose(order), "".join(letters[k] for k in order), scale=scale)
    assert_equal(turned, first_update(g, "".join(letters), scale=scale).transpose(order))


@pytest.mark.slow
@PROPERTY
@given(window=st.lists(SIZES, min_size=1, max_size=3), inputs=SIZES, outputs=SIZES, scale=SCALES)
def test_a_convolution_is_its_flattened_matrix(window, inputs, outputs, scale):
    g = draw((*window, inputs, outputs))
    flat = first_update(g.reshape(-1, outputs), "io", scale=scale)
    assert_equal(first_update(g, "i" * len(window) + "io", scale=scale), flat.reshape(g.shape))


@PROPERTY
@given(
    shape=st.tuples(*[SIZES] * 3), axis=st.integers(0, 2), letters=st.sampled_from(["io", "oi"]), scale=SCALES
)
def test_a_stack_is_its_slices(shape, axis, letters, scale):
    g = draw(shape)
    stacked = first_update(g, letters[:axis] + "b" + letters[axis:], scale=scale)
    for k in range(shape[axis]):
        alone = first_update(g.take(k, axis), letters, scale=scale)
        assert_equal(stacked.take(k, axis), alone)


@pytest.mark.slow
@PROPERTY
@given(model=SIZES, heads=st.integers(1, 4), size=SIZES, scale=SCALES)
def test_heads_are_matrices_by_axes_and_by_blocks(model, heads, size, scale):
    g = draw((model, heads, size))
    flat = g.reshape(model, heads * size)
    whole = first_update(flat, "io", scale=scale).reshape(g.shape)
    assert_equal(first_update(g, "ioo", scale=scale), whole)
    alone = jnp.stack([first_update(g[:, k], "io", scale=scale) for k in range(heads)], axis=1)
    assert_equal(first_update(g, "ibo", scale=scale), alone)
    assert_equal(first_update(flat, f"i({heads}o)", scale=scale).reshape(g.shape), alone)


@pytest.mark.slow
@PROPERTY
@given(
    model=SIZES,
    blocks=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    unit=st.integers(1, 2),
    scale=SCALES,
)
def test_fused_parameters_are_separate_ones(model, blocks, unit, scale):
    parts = [draw((model, unit * block), seed) for seed, block in enumerate(blocks)]
    spec, fused = f"({'+'.join(map(str, blocks))} o)", jnp.concatenate(parts, axis=1)
    alone = jnp.concatenate([first_update(part, "io", scale=scale) for part in parts], axis=1)
    assert_equal(first_update(fused, f"i{spec}", scale=scale), alone)
    assert_equal(first_update(fused.T, f"{spec}i", scale=scale), alone.T)
    if len(set(blocks)) == 1:
        assert_equal(first_update(fused, "i(3o)", scale=scale), alone)


@pytest.mark.parametrize("letters", ["i", "o", "io"])
@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("i(3o)", (4, 12)),
        ("i(1+2 o)", (4, 12)),
        ("i(2*(1+2) o)", (4, 12)),
        ("i(4~3 o)", (4, 24)),
        ("(3i)(2o)", (6, 4)),
        ("b(2+1 i)(2o)", (2, 6, 4)),
    ],
)
def test_sums_of_blocks(spec, shape, letters):
    """Those of the separate matrices, each beside its numbers."""
    form, x = Axes(spec), np.random.default_rng(0).integers(0, 99, shape)
    got = np.broadcast_to(form.repeat(form.reduce(jnp.sum, jnp.asarray(x), letters), shape), shape)
    sides = tuple({"i": -2, "o": -1}[letter] for letter in letters)
    each = [jnp.broadcast_to(m.sum(sides, keepdims=True), m.shape) for m in form.matrices(jnp.asarray(x))]
    np.testing.assert_array_equal(got, form.array(each, shape))
