"""Codes lie as their array does: nothing is sent where devices hold whole blocks, and no bit differs."""

import hlo
import jax
import numpy as np
import pytest
import trees
from float32 import Float32
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from optimorph.codecs import BFloat16, Float8, Nonneg8, Signed8, Split8, Split16

CODECS = [
    Float32(),
    BFloat16(),
    BFloat16(stochastic=True),
    Split8(),
    Split8(stochastic=True),
    Split16(),
    Signed8(),
    Signed8(mapping="linear", scale_dtype="bfloat16"),
    Nonneg8(),
    Float8(),
]
WHOLE = {
    "last axis": (P(None, "data"), 1, (16, 1024)),
    "first axis": (P("data", None), 1, (16, 300)),
    "both": (P("data", "model"), 2, (8, 256)),
    "both, of three": (P(None, None, ("data", "model")), 2, (2, 3, 1024)),
}
CUT = {
    "short": (P(None, "data"), 1, (4, 24)),
    "a tail": (P(None, "data"), 1, (4, 200)),
    "half a block each": (P("model", "data"), 2, (4, 256)),
    "a vector": (P("data"), 1, (8,)),
}
each = pytest.mark.parametrize("codec", CODECS, ids=repr)


def there_and_back(codec, layout, mode):
    """Codes and numbers over the mesh and on one device, and both programs over the mesh."""
    spec, axes, shape = layout
    place = NamedSharding(trees.mesh_of(8, axes, mode), spec)
    x = np.abs(np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    encode, decode, key = jax.jit(codec.encode), jax.jit(codec.decode), jax.random.key(0)
    there, here = jax.device_put(x, place), jax.device_put(x, jax.devices()[0])
    encoding = encode.lower(there, key).compile()
    encoded = encoding(there, key)
    decoding = decode.lower(encoded).compile()
    alone = encode(here, key)
    for a, b in zip(jax.tree.leaves(encoded), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    back = decoding(encoded)
    np.testing.assert_array_equal(back, decode(alone))
    return place, encoded, back, (encoding, decoding)


@pytest.mark.examples("auto-Signed8*both")
@pytest.mark.parametrize("layout", WHOLE.values(), ids=WHOLE)
@each
def test_whole_blocks_are_not_sent(codec, layout, mode):
    place, encoded, back, programs = there_and_back(codec, layout, mode)
    assert not any(hlo.counted(program).collectives for program in programs)
    for x in (*jax.tree.leaves(encoded), back):
        assert x.sharding.is_equivalent_to(place, x.ndim)


@pytest.mark.examples("auto-Signed8*short")
@pytest.mark.parametrize("layout", CUT.values(), ids=CUT)
@pytest.mark.parametrize("codec", [Signed8(), Nonneg8(), Float8()], ids=repr)
def test_blocks_that_devices_share(codec, layout, mode):
    """They cost communication, and the codes are the same; where types say how they lie, they lie so too."""
    place, encoded, back, _ = there_and_back(codec, layout, mode)
    if mode == jax.sharding.AxisType.Explicit:
        for x in (encoded.codes, back):
            assert x.sharding.is_equivalent_to(place, x.ndim)


@pytest.mark.examples("auto-Signed8*")
@pytest.mark.parametrize("codec", [Signed8(), Float8(), Split8(), Split16()], ids=repr)
def test_inside_shard_map(codec, mode):
    """Every device encodes its own blocks."""
    spec, axes, shape = WHOLE["both"]
    mesh = trees.mesh_of(8, axes, mode)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    run = jax.shard_map(codec.encode, mesh=mesh, in_specs=spec, out_specs=spec)
    got = jax.jit(run)(jax.device_put(x, NamedSharding(mesh, spec)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(codec.encode(x)), strict=True):
        np.testing.assert_array_equal(a, b)
