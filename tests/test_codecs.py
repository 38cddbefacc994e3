"""Numbers in fewer bytes: the nearest code or a fair choice of two, at any size; averages stay averages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from float32 import Float32

from optimorph._core.rounding import noise, places
from optimorph.codecs import BFloat16, Encoded, Float8, Nonneg8, Signed8, Split8, Split16, _blocks
from optimorph.codecs._blocks import block_width
from optimorph.codecs._forms import Rows

BLOCKS = {
    "softsign": Signed8(),
    "softsign, bfloat16": Signed8(scale_dtype=jnp.bfloat16),
    "linear": Signed8(mapping="linear"),
    "linear, bfloat16": Signed8(mapping="linear", scale_dtype=jnp.bfloat16),
    "linear, 48": Signed8(48, mapping="linear"),
    "float8": Float8(),
    "float8, bfloat16": Float8(scale_dtype=jnp.bfloat16),
    "nonneg": Nonneg8(),
    "nonneg, bfloat16": Nonneg8(scale_dtype=jnp.bfloat16),
}
CODECS = {
    "float32": Float32(),
    "bfloat16": BFloat16(),
    "bfloat16 by chance": BFloat16(stochastic=True),
    "split": Split8(),
    "split by chance": Split8(stochastic=True),
    "split, 16 bits": Split16(),
} | BLOCKS
FORMS = {name: codec for name, codec in CODECS.items() if name != "bfloat16" and ", bfloat16" not in name}
CHANCE = ("bfloat16 by chance", "split by chance", "nonneg", "nonneg, bfloat16")
NEAREST = {name: codec for name, codec in BLOCKS.items() if "nonneg" not in name}
SIZES = [1e-36, 1e-30, 1e-8, 1e-6, 1e-4, 1e-2, 1.0, 1e30, 1e37]
KEY = jax.random.key(0)
FEW = 4 * rounding.eps("float32")
"""Roundings of what is decoded, over the largest of its block."""


def each(codecs):
    return pytest.mark.parametrize("codec", codecs.values(), ids=codecs)


def drawn(shape, size=1.0, seed=0):
    """Heavy tails within every block."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(shape))
    return (size * np.clip(x, -9, 9)).astype(np.float32)


def inputs(codec, shape, size=1.0, seed=0):
    x = drawn(shape, size, seed)
    return np.abs(x) if isinstance(codec, Nonneg8) else x


@functools.cache
def compiled(codec, exactly=False):
    """To encode and to decode; `exactly` what is compared with another program's bits."""
    options = rounding.EXACT if exactly else None
    return jax.jit(codec.encode, compiler_options=options), jax.jit(codec.decode, compiler_options=options)


def round_trip(codec, x, key=KEY):
    encode, decode = compiled(codec)
    return np.array(decode(encode(x, key)))


def of_all_codes(codec, scales, shape):
    """What each of the 256 codes stands for at every place, (256, *shape), in float64; NaN for none."""
    kind = jnp.dtype(codec.code_dtype)
    codes = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), kind)
    every = jax.vmap(lambda code: codec.decode(Encoded(jnp.full(shape, code, kind), scales)))(codes)
    return np.asarray(every, np.float64)


def largest_around(codec, x):
    """The largest |x| of every number's block, in float64."""
    found = np.empty(x.shape)
    width = block_width(codec.block, x.shape[-1])
    for start in range(0, x.shape[-1], width):
        part = np.s_[..., start : start + width]
        found[part] = np.abs(x[part].astype(np.float64)).max(axis=-1, keepdims=True)
    return found


@pytest.mark.parametrize("size", SIZES)
@each(NEAREST)
def test_the_nearest_code(codec, size):
    """Of all 256, for every number of three rows with a tail."""
    x = drawn((3, 300), size)
    encode, decode = compiled(codec)
    encoded = encode(x)
    distances = np.abs(of_all_codes(codec, encoded.scales, x.shape) - x)
    got = np.abs(np.asarray(decode(encoded), np.float64) - x)
    slack = np.maximum(FEW * largest_around(codec, x), 1.2e-38)
    assert np.all(got <= np.nanmin(distances, axis=0) + slack)


def neighbours(codec, x):
    """The numbers that can be stored just below and above each x: itself twice, if it is one."""
    if isinstance(codec, BFloat16):
        below = (x.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
        above = ((x.view(np.uint32) + 0xFFFF) & 0xFFFF0000).view(np.float32).astype(np.float64)
        return np.minimum(below, above), np.maximum(below, above)
    every = of_all_codes(codec, codec.encode(x, KEY).scales, x.shape)
    below = np.where(every <= x, every, -np.inf).max(axis=0)
    above = np.where(every >= x, every, np.inf).min(axis=0)
    return np.where(np.isinf(below), above, below), np.where(np.isinf(above), below, above)


@pytest.mark.examples("*-1.0")
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0, 1e30])
@each({name: CODECS[name] for name in CHANCE})
def test_one_of_two_neighbours_and_right_on_average(codec, size):
    """4096 times, each number within four standard errors, all of them together too."""
    x, count = inputs(codec, (140,), size), 4096
    low, high = neighbours(codec, x)
    keys = jax.random.split(KEY, count)
    got = np.asarray(jax.jit(jax.vmap(lambda key: codec.decode(codec.encode(x, key))))(keys), np.float64)
    near = FEW * np.abs(x).max() * np.ones_like(low)
    one = (np.abs(got - low) <= near) | (np.abs(got - high) <= near)
    assert one.mean() > 0.9999  # and the rest, a rounding away from a number that can be stored, the next
    gap, inside = high - low, (low < x) & (x < high)
    share = np.where(inside, (x - low) / np.where(inside, gap, 1), 0)
    error = np.sqrt(share * (1 - share) / count) * gap
    z = (got.mean(axis=0) - x)[inside] / (error + gap / 65536)[inside]
    assert inside.sum() > 100
    assert np.all(np.abs(z) <= 4)
    assert abs(z.mean()) <= 4 / np.sqrt(inside.sum())


def test_the_lowest_code_of_nonneg():
    """What is below it becomes it: 1/65536 of the largest, never 0."""
    x = np.array([1.0, 0, 1e-6, 1 / 65536, 1.4e-5], np.float32)
    np.testing.assert_array_equal(round_trip(Nonneg8(), x)[1:], 2.0**-16)


@each(
    {n: c for n, c in CODECS.items() if "nonneg" not in n and "chance" not in n and n != "linear, bfloat16"}
)
@pytest.mark.parametrize("size", SIZES)
def test_a_second_round_trip_changes_nothing(codec, size):
    once = round_trip(codec, drawn((64, 300), size))
    np.testing.assert_array_equal(round_trip(codec, once), once)


def test_a_third_round_trip_changes_nothing():
    """With linear codes a scale rounded up may be lowered once."""
    codec, x = BLOCKS["linear, bfloat16"], drawn((3000, 1))
    once = round_trip(codec, x)
    twice = round_trip(codec, once)
    assert np.any(once != twice)
    np.testing.assert_array_equal(round_trip(codec, twice), twice)


BOUNDS = {
    "bfloat16": (BFloat16(), lambda x: np.abs(x) / 257),
    "bfloat16 by chance": (BFloat16(stochastic=True), lambda x: np.abs(x) / 128),
    "softsign": (Signed8(20001), lambda x: 1 / 128 + 0 * x),
    "linear": (Signed8(20001, mapping="linear"), lambda x: 1 / 254 + 0 * x),
    "float8": (Float8(20001), lambda x: np.maximum(np.abs(x) / 17, 1 / 262144)),
    "split": (Split8(), lambda x: 129 / 2**23 * np.abs(x)),
    "split by chance": (Split8(stochastic=True), lambda x: 258 / 2**23 * np.abs(x)),
}


@pytest.mark.parametrize(("codec", "bound"), BOUNDS.values(), ids=BOUNDS)
def test_errors_are_as_large_as_is_said_and_no_larger(codec, bound):
    x = np.concatenate([np.linspace(-1, 1, 15001), np.geomspace(1e-7, 1, 5000)]).astype(np.float32)
    error = np.abs(round_trip(codec, x) - x.astype(np.float64))
    assert np.all(error <= bound(x) + FEW * np.abs(x))
    assert np.max(error[x != 0] / bound(x)[x != 0]) > 0.9


def test_the_root_of_nonneg_is_within_a_256th():
    x = np.linspace(0, 1, 20001).astype(np.float32)
    error = np.abs(np.sqrt(round_trip(Nonneg8(20001), x).astype(np.float64)) - np.sqrt(x))
    assert 0.97 / 256 < error.max() <= 1 / 256 + FEW


@pytest.mark.parametrize("size", SIZES)
@each(CODECS)
def test_any_size(codec, size):
    """The same relative to the largest of the block, within 1.6 %."""
    x = inputs(codec, (4, 128), size)
    got = round_trip(codec, x)
    share = (got.astype(np.float64) - x) / np.abs(x).max(axis=-1, keepdims=True)
    assert np.all(np.abs(share) < 0.05 if isinstance(codec, Float8) else np.abs(share) < 0.016)


@pytest.mark.parametrize("size", [3.4e38, 3.395e38, 4.8e-38])
@each(CODECS)
def test_the_ends_of_the_range(codec, size):
    """Scales neither overflow nor vanish; the largest are at most 0.4 % too small."""
    x = np.full((2, 128), size, np.float32)
    got = round_trip(codec, x)
    np.testing.assert_allclose(got, x, rtol=0.016)
    assert np.all(np.isfinite(got))


@pytest.mark.parametrize("codec", [c for c in BLOCKS.values() if c.scale_dtype == jnp.bfloat16], ids=repr)
def test_bfloat16_scales_are_the_next_above(codec):
    x = np.abs(drawn((1000, 1))) + np.float32(1e-3)
    encode, _ = compiled(codec)
    scales = np.asarray(encode(x, KEY).scales, np.float32)
    assert np.all((scales >= x) & (scales <= x * (1 + 2**-7)))
    exact = scales[:50]
    np.testing.assert_array_equal(np.asarray(encode(exact, KEY).scales, np.float32), exact)


@pytest.mark.examples("*softsign*", "*nonneg*", "*split*")
@each(FORMS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 5), (1,), (129,), (2, 3, 300)])
def test_shapes(codec, shape):
    """Of codes, scales, zeros and all that comes back; and what they weigh."""
    x = np.asarray(inputs(codec, shape))
    encode, decode = compiled(codec)
    encoded = encode(x, KEY)
    assert encoded.codes.shape == shape
    if hasattr(codec, "block"):
        width = block_width(codec.block, shape[-1]) if shape else 1
        assert encoded.scales.shape == ((*shape[:-1], -(-shape[-1] // width)) if shape else ())
    got = decode(encoded)
    assert (got.shape, got.dtype) == (shape, jnp.float32)
    np.testing.assert_allclose(got, x, atol=0.05 * np.abs(x).max(initial=0))
    zeros = codec.zeros(shape)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), zeros) == jax.tree.map(
        lambda x: (x.shape, x.dtype), encoded
    )
    np.testing.assert_array_equal(decode(zeros), np.zeros(shape))


@each(CODECS)
def test_zeros_under_flags_that_find_faults(codec):
    """Outside of a program every operation is looked at, and none makes a NaN or an infinity of a zero."""
    with jax.debug_nans(True), jax.debug_infs(True):
        for shape in ((), (2, 5)):
            encoded = codec.encode(jnp.zeros(shape), KEY)
            np.testing.assert_array_equal(codec.decode(encoded), np.zeros(shape))


def test_bytes():
    """AdamW's moments in 2.05 bytes for a parameter, with scales in bfloat16 2.03."""
    forms = {name: jax.tree.leaves(codec.form((4096, 14336))) for name, codec in CODECS.items()}
    found = {
        name: sum(x.size * x.dtype.itemsize for x in form) / (4096 * 14336) for name, form in forms.items()
    }
    assert found["softsign"] == found["nonneg"] == found["float8"] == 1 + 4 / 128
    assert found["softsign, bfloat16"] == 1 + 2 / 128
    assert (found["float32"], found["bfloat16"], found["split"], found["split, 16 bits"]) == (4, 2, 3, 4)


@each(CODECS)
def test_zero_blocks_are_exact(codec):
    x = inputs(codec, (3, 256))
    x[0, :128] = x[1] = 0
    x[2, 128:] = 1e-39  # which is 0 to many machines
    got = round_trip(codec, x)
    np.testing.assert_array_equal(got[0, :128], 0)
    np.testing.assert_array_equal(got[1], 0)
    if hasattr(codec, "block") and codec.block == 128:
        np.testing.assert_array_equal(got[2, 128:], 0)
    assert np.all(np.isfinite(got))


@pytest.mark.parametrize("sick", [np.nan, np.inf, -np.inf])
@each(CODECS)
def test_what_is_not_finite(codec, sick):
    """It makes its block NaN, or comes back where there are no blocks; all others are as ever."""
    x = inputs(codec, (2, 288))
    well = round_trip(codec, x)
    x[0, 150] = sick
    got = round_trip(codec, x)
    if not hasattr(codec, "block"):
        assert np.array_equal(got[0, 150], np.float32(sick), equal_nan=True)
        well[0, 150] = got[0, 150]
    else:
        width = block_width(codec.block, 288)
        first = 150 // width * width
        well[0, first : first + width] = np.nan
    np.testing.assert_array_equal(got, well)


@pytest.mark.examples("softsign", "nonneg")
@each(BLOCKS)
def test_what_is_no_number_is_not_lost(codec):
    """The compiler's own maximum loses it in larger arrays."""
    x = np.ones((64, 256), np.float32)
    x[3, 5], x[9] = -np.nan, np.nan
    for found in (codec.encode(x, KEY), compiled(codec)[0](x, KEY)):
        bad = np.isnan(np.asarray(codec.decode(found)))
        assert np.all(bad[9])
        width = block_width(codec.block, 256)
        assert np.all(bad[3, :width])
        assert bad.sum() == 256 + width


def test_a_negative_second_moment_is_not_hidden():
    x = np.ones((3, 30), np.float32)
    x[1, 3] = -1e-6
    x[2] = -0.0
    got = round_trip(Nonneg8(), x)
    assert np.all(got[0] == 1)
    assert np.all(np.isnan(got[1]))
    assert np.all(got[2] == 0)


def test_float32_comes_back_bit_by_bit():
    """NaN's of any kind, subnormal numbers and -0 too."""
    bits = np.random.default_rng(0).integers(0, 2**32, 10000, np.uint32)
    bits[:5] = 0x80000000, 1, 0x7FC12345, 0xFF800001, 0x7F800000
    np.testing.assert_array_equal(round_trip(Float32(), bits.view(np.float32)).view(np.uint32), bits)


@pytest.mark.examples("softsign", "split by chance")
@each(CODECS)
def test_noise_is_that_of_the_key(codec):
    """The same key gives the same bits; another one others, where there is chance at all."""
    x = inputs(codec, (500,))
    first, same, other = (np.asarray(codec.encode(x, jax.random.key(k)).codes) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    by_chance = codec in [CODECS[name] for name in CHANCE]
    assert np.any(first != other) == by_chance


@pytest.mark.parametrize("last", [300, 307])
@pytest.mark.parametrize("codec", [Signed8(48), Float8()], ids=repr)
def test_blocks_know_nothing_of_each_other(codec, last):
    """Each has the code and the scale that it has alone, the short one at the end too."""
    x, width = drawn((2, last)), block_width(codec.block, last)
    encode, _ = compiled(codec, exactly=True)
    encode_alone, _ = compiled(dataclasses.replace(codec, block=4 * width), exactly=True)
    encoded = encode(x)
    for start in range(0, last, width):
        alone = encode_alone(x[:, start : start + width])
        np.testing.assert_array_equal(encoded.codes[:, start : start + width], alone.codes)
        np.testing.assert_array_equal(encoded.scales[:, start // width], alone.scales[:, 0])


@pytest.mark.examples("*softsign*-307", "*nonneg*-307")
@pytest.mark.parametrize("last", [300, 307, 20])
@each(BLOCKS)
def test_rows_without_an_axis_for_blocks(codec, last, monkeypatch):
    """The form of TPUs: the same codes, scales and numbers, NaN in its own block, subnormal numbers too."""
    x = inputs(codec, (4, last))
    x[1, 7], x[2], x[3, 2] = np.nan, x[2] * 1e-36, 1e-39
    expected = jax.jit(codec.encode, compiler_options=rounding.EXACT)(x, KEY)
    numbers = compiled(codec)[1](expected)

    def in_rows(f, width, x, *arrays):
        return f(Rows(width, x.shape[-1]), x, *arrays)

    monkeypatch.setattr(_blocks, "in_form", in_rows)
    found = jax.jit(lambda x, key: codec.encode(x, key), compiler_options=rounding.EXACT)(x, KEY)
    well = ~np.isnan(np.asarray(numbers))  # codes of NaN are arbitrary
    np.testing.assert_array_equal(np.asarray(found.codes)[well], np.asarray(expected.codes)[well])
    np.testing.assert_array_equal(found.scales.astype(np.float32), expected.scales.astype(np.float32))
    np.testing.assert_array_equal(jax.jit(lambda x: codec.decode(x))(found), numbers)


def test_rows_are_shared_evenly():
    """By up to 16 devices, if these divide the row into shards of at least 32 numbers."""
    known = {
        14336: 128,
        5120: 80,
        4096: 128,
        3072: 96,
        1152: 72,
        1024: 64,
        768: 48,
        256: 32,
        300: 75,
        307: 128,
    }
    assert {last: block_width(128, last) for last in known} == known
    for last in range(1, 5000):
        width = block_width(128, last)
        assert width == min(128, last) or (32 <= width < 128 and last % width == 0)
        for devices in (2, 4, 8, 16):
            if last % (32 * devices) == 0:
                assert last // devices % width == 0


@pytest.mark.examples("softsign", "split")
@each(FORMS)
def test_under_transformations(codec):
    """vmap gives each what it has alone; eval_shape the shapes."""
    x = inputs(codec, (5, 2, 129))
    encode, decode = compiled(codec, exactly=True)
    got = jax.jit(jax.vmap(codec.encode, (0, None)), compiler_options=rounding.EXACT)(x, KEY)
    alone = encode(x[2], KEY)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(a[2], b)
    back = jax.jit(jax.vmap(codec.decode), compiler_options=rounding.EXACT)(got)
    np.testing.assert_array_equal(back[2], decode(alone))
    shapes = jax.eval_shape(codec.encode, x, KEY)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), got
    )
    back = jax.eval_shape(codec.decode, shapes)
    assert (back.shape, back.dtype) == (x.shape, jnp.float32)


@pytest.mark.examples("softsign", "split")
@each(FORMS)
def test_dtypes(codec):
    """Narrow numbers are widened, wide ones rounded; others are refused by name."""
    x = inputs(codec, (9,))
    for dtype in ("bfloat16", "float16"):
        narrow = jnp.asarray(x).astype(dtype)
        for a, b in zip(
            codec.encode(narrow, KEY), codec.encode(narrow.astype(jnp.float32), KEY), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    with jax.enable_x64(True):
        encoded = codec.encode(jnp.asarray(x, jnp.float64), KEY)
        assert codec.decode(encoded).dtype == jnp.float32
    name = type(codec).__name__
    for bad in (np.arange(3, dtype=np.int32), np.ones(3, bool)):
        with pytest.raises(
            ValueError, match=rf"{name}: .* of {bad.dtype}\. Type encode\(x\.astype\('float32'\)\)"
        ):
            codec.encode(bad, KEY)
    with pytest.raises(
        ValueError, match=rf"{name}: .* complex64\. Type encode\(x\.real\) and encode\(x\.imag\)"
    ):
        codec.encode(np.ones(3, np.complex64), KEY)


@pytest.mark.parametrize("codec", [Nonneg8(), BFloat16(stochastic=True), Split8(stochastic=True)], ids=repr)
def test_chance_needs_a_key(codec):
    with pytest.raises(ValueError, match=r"without a key.*Type encode\(x, jax\.random\.key\(0\)\)"):
        codec.encode(np.ones(3, np.float32))
    for key in (jnp.zeros(2, jnp.int32), jax.random.split(jax.random.key(0))):
        with pytest.raises(ValueError, match=r"key must be one key of jax\.random, but is .*Type key="):
            codec.encode(np.ones(3, np.float32), key)
    codec.encode(np.ones(3, np.float32), jax.random.PRNGKey(0))


def test_descriptions():
    """Equal and hashed by what they say, however it is written; nonsense is refused."""
    assert Signed8(scale_dtype="bfloat16") == Signed8(128, scale_dtype=jnp.bfloat16) != Signed8()
    assert len({*CODECS.values(), *CODECS.values()}) == len(CODECS)
    assert len({Signed8(), Float8(), Nonneg8(), Signed8(64), Split8(), Split16()}) == 6
    for block in (0, -1, True):
        with pytest.raises(ValueError, match="Float8: block must be an integer of at least 1"):
            Float8(block)
    with pytest.raises(ValueError, match=r"Signed8: mapping must be 'softsign' or 'linear', but is 'log'"):
        Signed8(mapping="log")
    with pytest.raises(
        ValueError, match=r"Nonneg8: scale_dtype must be .* 'float16'.*Type scale_dtype='bfloat16'"
    ):
        Nonneg8(scale_dtype="float16")
    with pytest.raises(ValueError, match=r"Signed8: scale_dtype must be .* but is 'junk'"):
        Signed8(scale_dtype="junk")


def finite_heads():
    heads = np.arange(2**16, dtype=np.uint16)
    return heads[heads & 0x7FFF < 0x7F80]


def test_every_split_number_is_its_own():
    """All finite bfloat16 numbers with all codes, subnormal ones too: decoded and encoded, the same pair.

    So no two pairs are one number, none is rounded to another bfloat16 number than its own, and its sign is
    kept; on each side of a number they follow each other in order.
    """
    heads, codes = finite_heads(), np.arange(-127, 128, dtype=np.int8)
    codec = Split8()

    @jax.jit
    def there_and_back(heads):
        shape = (len(heads), len(codes))
        whole = jax.lax.bitcast_convert_type(jnp.broadcast_to(heads[:, None], shape), jnp.bfloat16)
        x = codec.decode(Encoded(jnp.broadcast_to(codes, shape), whole))
        again = codec.encode(x)
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return bits, again.codes, jax.lax.bitcast_convert_type(again.scales, jnp.uint16)

    for part in np.split(heads, 10):
        bits, again, whole = map(np.asarray, there_and_back(part))
        real = (part & 0x7FFF != 0)[:, None] | (codes >= 0)  # nothing is smaller than 0
        np.testing.assert_array_equal(np.where(real, again, 0), np.where(real, codes, 0))
        np.testing.assert_array_equal(np.where(real, whole, 0), np.where(real, part[:, None], 0))
        distance = bits.astype(np.int64) - (part.astype(np.int64) << 16)[:, None]
        assert np.all(np.where(real, distance == 258 * codes.astype(np.int64), True))


def test_split_in_every_binade():
    """At most 129 steps of float32 away, but beyond 3.396e38, where there is no next bfloat16 number."""
    rng = np.random.default_rng(0)
    exponents = np.arange(255, dtype=np.uint32)[:, None] << 23
    edges = [
        0,
        1,
        128,
        129,
        130,
        0x7FFF,
        0x8000,
        0x8001,
        0xFFFF,
        0x10000,
        0x18000,
        0x7FFFFF,
        0x7F8000,
        0x7F7FFF,
    ]
    mantissas = np.concatenate([np.array(edges, np.uint32), rng.integers(0, 2**23, 1000, np.uint32)])
    bits = (exponents | mantissas).ravel()
    bits = np.concatenate([bits, bits | 0x80000000])
    encoded = jax.jit(Split8().encode)(bits.view(np.float32))
    got = np.asarray(jax.jit(Split8().decode)(encoded)).view(np.uint32)
    steps = np.abs(got.astype(np.int64) - bits)
    top = bits & 0x7FFFFFFF >= 0x7F7F8000
    assert steps[~top].max() == 129
    assert steps[top].max() <= 32769
    np.testing.assert_array_equal(got >> 31, bits >> 31)
    rounded = bits.view(np.float32).astype(jnp.bfloat16)  # NumPy's, ties to even
    np.testing.assert_array_equal(np.asarray(encoded.scales)[~top], rounded[~top])
    assert np.all(np.isfinite(np.asarray(encoded.scales, np.float32)))
    narrow = bits & 0xFFFF == 0
    np.testing.assert_array_equal(got[narrow], bits[narrow])
    assert not np.any(np.asarray(encoded.codes)[narrow])


@pytest.mark.parametrize("exponent", [0, 1, 127, 254, 255])
@pytest.mark.parametrize("sign", [0, 0x80000000], ids=["plus", "minus"])
def test_float32_in_two_parts_of_16_bits(sign, exponent):
    """Every mantissa comes back; θ' is the nearest, half-way away from zero, infinite beyond the last."""
    bits = np.arange(2**23, dtype=np.uint32) | np.uint32(exponent << 23 | sign)
    x = bits.view(np.float32)
    encode, decode = compiled(Split16())
    encoded = encode(x)
    got = np.asarray(decode(encoded)).view(np.uint32)
    whole = np.asarray(jax.lax.bitcast_convert_type(encoded.scales, jnp.uint16)).astype(np.int64) << 16
    if exponent == 255:
        np.testing.assert_array_equal(got[0], bits[0])
        assert np.all(np.isnan(got[1:].view(np.float32)))
        assert np.all(np.isnan(np.asarray(encoded.scales[1:], np.float32)))
        assert not np.any(np.asarray(encoded.codes))
        return
    np.testing.assert_array_equal(got, bits)
    distance = bits.astype(np.int64) - whole
    assert (distance.min(), distance.max()) == (-0x8000, 0x7FFF)
    np.testing.assert_array_equal(whole >> 31, sign >> 31)
    assert np.all(np.isinf(np.asarray(encoded.scales, np.float32)) == (whole & 0x7FFFFFFF == 0x7F800000))


def test_where_halves_of_16_bits_differ_from_astype():
    """Half-way from an even number alone: once in 131072."""
    bits = np.arange(2**23, dtype=np.uint32) | np.uint32(127 << 23)
    x = bits.view(np.float32)
    other = np.asarray(compiled(Split16())[0](x).scales) != x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(other, bits & 0x1FFFF == 0x8000)


@pytest.mark.slow
def test_split_by_chance_keeps_what_a_code_says():
    """Every number of a code has that code whatever the key; θ' is the nearest of any."""
    codec, codes = Split8(stochastic=True), np.arange(-127, 128, dtype=np.int8)
    x = codec.decode(Encoded(jnp.asarray(codes), jnp.full(255, -1.5, jnp.bfloat16)))
    keys = jax.random.split(KEY, 1000)
    again = jax.vmap(codec.encode, (None, 0))(x, keys)
    np.testing.assert_array_equal(again.codes, np.broadcast_to(codes, (1000, 255)))
    x = drawn((20000,))
    np.testing.assert_array_equal(codec.encode(x, KEY).scales, x.astype(jnp.bfloat16))


def one_of_two(units, below, value, share):
    """The code below, or the next where `units` is more than this share of the way there."""
    low, high = value(below), value(below + 1)
    return below + (units - low > share * (high - low)).astype(below.dtype)


class ZeroCode(Nonneg8):
    """As published: codes 0 to 255."""

    def _codes(self, quarters, key, place):
        noise = jax.random.uniform(key, quarters.shape)
        below = jnp.clip(jnp.floor(255 * jnp.sqrt(quarters / 4)), 0, 254)
        return one_of_two(quarters / 4, below, lambda c: (c / 255) ** 2, noise)

    def _values(self, codes):
        return (codes.astype(jnp.float32) / 255) ** 2


class Nearest(Nonneg8):
    """No zero, but rounded to the nearest."""

    def _codes(self, quarters, key, place):
        below = jnp.clip(jnp.floor(256 * jnp.sqrt(quarters / 4)), 1, 255)
        return one_of_two(quarters / 4, below, lambda c: (c / 256) ** 2, 0.5) - 1


def second_moment_after_a_fall(codec):
    """Half of every block falls to a hundredth of its gradient for 3800 steps: its average over float64's."""
    size, steps, b2 = 1024, 3800, 0.999
    g = np.where(np.arange(size) % 2, 1.0, 0.01).astype(np.float32)

    def step(stored, key):
        v = b2 * codec.decode(stored) + (1 - b2) * g**2
        return codec.encode(v, key), None

    start = codec.encode(np.ones(size, np.float32), KEY)
    keys = jax.random.split(jax.random.key(1), steps)
    stored = jax.jit(lambda keys: jax.lax.scan(step, start, keys)[0])(keys)
    v = np.asarray(codec.decode(stored), np.float64)
    exact = b2**steps + (1 - b2**steps) * 1e-4
    return v[::2].mean() / exact


@pytest.mark.examples("Nonneg8(block=128, scale_dtype=dtype('float32'))")
@pytest.mark.parametrize(
    "codec",
    [Nonneg8(), Nonneg8(scale_dtype="bfloat16"), BFloat16(stochastic=True), Float32()],
    ids=repr,
)
def test_second_moments_fall(codec):
    assert abs(second_moment_after_a_fall(codec) - 1) < 0.1


@pytest.mark.parametrize("codec", [Nearest(), BFloat16(), Float8()], ids=["Nearest", "BFloat16", "Float8"])
def test_second_moments_would_not_fall(codec):
    """Rounded to the nearest they stand still: why chance is needed."""
    assert second_moment_after_a_fall(codec) > 5


def sparse(rng, shape):
    return rng.standard_normal(shape) * (rng.random(shape) < 0.05)


def heavy(rng, shape):
    return rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))


def heaviest(rng, shape):
    return rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(shape))


@functools.cache
def adam(m_codec, v_codec):
    """max |m / √v| of Adam, both moments stored by these codecs between steps, as a function of gradients."""
    b1, b2 = 0.9, 0.999

    def step(carry, g_and_key):
        m, v, t = carry
        g, key = g_and_key
        m = b1 * m_codec.decode(m) + (1 - b1) * g
        v = b2 * v_codec.decode(v) + (1 - b2) * g**2
        update = m / (1 - b1**t) / (jnp.sqrt(v / (1 - b2**t)) + 1e-30)
        return (m_codec.encode(m, key), v_codec.encode(v, key), t + 1), jnp.max(jnp.abs(update))

    start = m_codec.zeros((512,)), v_codec.zeros((512,)), jnp.float32(1)
    return jax.jit(lambda *xs: jnp.max(jax.lax.scan(step, start, xs)[1]))


def largest_update(m_codec, v_codec, draw, size=1.0):
    gs = (size * draw(np.random.default_rng(0), (1000, 512))).astype(np.float32)
    return float(adam(m_codec, v_codec)(gs, jax.random.split(KEY, len(gs))))


@pytest.mark.parametrize("size", [1e-8, 1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("draw", [sparse, heavy, heaviest])
def test_updates_stay_small(draw, size):
    """Those of float32, within a twentieth; gradients of 1e-8 have squares of 1e-16."""
    found, wide = largest_update(Signed8(), Nonneg8(), draw, size), largest_update(Float32(), Float32(), draw)
    assert found <= 1.05 * wide
    assert found <= 2.5 or wide > 2.48  # as float32 is with the heaviest tails


@pytest.mark.parametrize("codec", [Signed8(), Nonneg8()], ids=lambda codec: type(codec).__name__)
def test_accelerators_round(codec):
    """XLA for GPUs has made -1 of the last bits of a sum: the trick of CPUs is in no other program."""
    x, key = jax.ShapeDtypeStruct((4, 256), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    encode = jax.jit(lambda x, key: codec.encode(x, key))
    for platform in ("cpu", "cuda", "tpu"):
        text = jax.export.export(encode, platforms=[platform])(x, key).mlir_module()
        assert ("round_nearest_even" in text) == (platform != "cpu")


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("codec", [Signed8(), Nonneg8()], ids=lambda codec: type(codec).__name__)
def test_programs_hold_no_arrays(codec, platform):
    """A table of which number is in which block would be megabytes of a program, for any platform."""
    x, key = jax.ShapeDtypeStruct((4, 3072), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    there_and_back = jax.jit(lambda x, key: codec.decode(codec.encode(x, key)))
    text = jax.export.export(there_and_back, platforms=[platform])(x, key).mlir_module()
    assert 'dense<"' not in text


@pytest.mark.parametrize("codec", [Signed8(), Nonneg8()], ids=lambda codec: type(codec).__name__)
def test_codes_have_no_derivative(codec):
    """And an update can be differentiated: JAX looks into the programs of all platforms for that."""
    x = inputs(codec, (4, 256))
    assert not np.any(jax.jvp(lambda x: codec.decode(codec.encode(x, KEY)), (x,), (x,))[1])


@pytest.mark.parametrize("draw", [sparse, heaviest])
def test_updates_would_explode(draw):
    """With a code for zero: why there is none."""
    assert largest_update(Signed8(512), ZeroCode(512), draw) > 1e3  # blocks of 128


def test_noise_is_uniform_and_its_own():
    """16 bits of a hash: every value as often, nothing of a neighbour or of another key."""
    n = 1 << 20
    keys = [KEY, jax.random.key(1), jax.random.fold_in(KEY, 1)]
    drawn = np.array([noise(key, places((n,))) >> 16 for key in keys], np.float64)
    counts = np.array([np.bincount(bits.astype(int) >> 6, minlength=1024) for bits in drawn])
    chi = ((counts - n / 1024) ** 2 / (n / 1024)).sum(axis=1)
    assert np.all(np.abs(chi - 1023) < 5 * np.sqrt(2 * 1023))
    z = (drawn - 32767.5) / np.sqrt((2**32 - 1) / 12)
    shifted = [z[0, :-k] @ z[0, k:] for k in (1, 2, 128, 4096)]
    assert np.all(np.abs([*shifted, z[0] @ z[1], z[0] @ z[2], z[1] @ z[2]]) < 5 * np.sqrt(n))
    bits = (drawn[0].astype(int)[:, None] >> np.arange(16)) & 1
    assert np.all(np.abs(bits.mean(axis=0) - 0.5) < 5 * 0.5 / np.sqrt(n))


def test_places_are_those_of_the_whole():
    np.testing.assert_array_equal(places((3, 4, 5)), np.arange(60).reshape(3, 4, 5))
    assert places(()) == 0


@pytest.mark.parametrize("codec", [Nonneg8(32), BFloat16(stochastic=True), Split8(stochastic=True)], ids=repr)
def test_a_part_is_rounded_as_the_whole(codec):
    x, place = inputs(codec, (6, 100)), places((6, 100))
    encode, _ = compiled(codec, exactly=True)
    part = encode(x[2:4], KEY, place[2:4])
    np.testing.assert_array_equal(part.codes, encode(x, KEY).codes[2:4])
    assert np.any(np.asarray(encode(x[2:4], KEY).codes) != np.asarray(part.codes))
