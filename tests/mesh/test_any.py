"""Any shapes, specs and meshes: the updates are those of one device."""

import itertools

import jax
import numpy as np
import optax
import pytest
import rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimorph as om
from optimorph.linalg import Axes, NewtonSchulz

pytestmark = pytest.mark.usefixtures("float64")
MESHES = [(2,), (8,), (4, 2), (2, 3), (2, 2, 2), (16,)]
NAMES = ("a", "b", "c")
REPEATED = ["i(2*(2+1) o)", "i(2~(2+1) o)", "(2~2 i)o"]
FORMS = [
    Axes(spec)
    for spec in [
        "io",
        "oi",
        "bio",
        "ibo",
        "ioo",
        "iio",
        "i(3o)",
        "(2o)i",
        "i(2+1+1 o)",
        "b(2i)o",
        "oiii",
        *REPEATED,
    ]
]
POLAR = NewtonSchulz(steps=2)
FREE = om.Hardware("cpu", 1.0, 1e30, 1e30, 8, 1e-30)
"""Devices for which sending takes no time: matrices are divided as finely as the work can be."""

BLOCKS = {form: [axis.times * sum(axis.blocks) for axis in form.parts] for form in FORMS}


@st.composite
def leaves(draw, sizes):
    """A leaf's shape, spec and layout: every axis a multiple of what divides it."""
    form, free = draw(st.sampled_from(FORMS)), list(range(len(sizes)))
    shape, spec = [], []
    for blocks in BLOCKS[form]:
        chosen = draw(st.lists(st.sampled_from(free), max_size=2, unique=True)) if free else []
        free = [k for k in free if k not in chosen]
        divided = int(np.prod([sizes[k] for k in chosen], dtype=int))
        least = np.lcm(divided, blocks)
        shape.append(int(least * draw(st.integers(1, 3))))
        spec.append(tuple(NAMES[k] for k in chosen) or None)
    return tuple(shape), form, P(*spec)


@st.composite
def trees(draw):
    sizes = draw(st.sampled_from(MESHES))
    return sizes, [draw(leaves(sizes)) for _ in range(draw(st.integers(1, 3)))]


@pytest.mark.slow
@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    tree=trees(),
    mode=st.sampled_from([AxisType.Auto, AxisType.Explicit]),
    small=st.booleans(),
    divide=st.sampled_from(["auto", FREE]),
)
def test_any_leaves(tree, mode, small, divide):
    sizes, kinds = tree
    count = int(np.prod(sizes))
    names = NAMES[: len(sizes)]
    mesh = jax.make_mesh(sizes, names, axis_types=(mode,) * len(sizes), devices=jax.devices()[:count])
    rng = np.random.default_rng(0)
    g = {f"w{k}": rng.standard_normal(shape) for k, (shape, _, _) in enumerate(kinds)}
    axes = {f"w{k}": form for k, (_, form, _) in enumerate(kinds)}
    at_once = 1 if small else 2**28
    tx = om.orthogonalize(POLAR, axes, bytes_at_once=at_once, divide=divide)
    places = {f"w{k}": NamedSharding(mesh, spec) for k, (_, _, spec) in enumerate(kinds)}
    update = jax.jit(lambda g: tx.update(g, optax.EmptyState())[0])
    got = update({n: jax.device_put(x, places[n]) for n, x in g.items()})
    want = update({n: jax.device_put(x, jax.devices()[0]) for n, x in g.items()})
    rounding.close(got, want, condition=POLAR.table.slope)
    for name, x in got.items():
        assert x.sharding.is_equivalent_to(places[name], x.ndim)


@pytest.mark.slow
def test_mesh_axes_in_any_order():
    """Over a mesh axis order that is not the leaf's."""
    mesh = jax.make_mesh((2, 2, 2), NAMES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:8])
    g = np.random.default_rng(0).standard_normal((8, 16))
    tx = om.orthogonalize(POLAR, {"*": "io"})
    want = tx.update({"w": jax.device_put(g, jax.devices()[0])}, optax.EmptyState())[0]["w"]
    for order in itertools.permutations(NAMES):
        for cut in range(4):
            place = NamedSharding(mesh, P(order[:cut] or None, order[cut:] or None))
            got = tx.update({"w": jax.device_put(g, place)}, optax.EmptyState())[0]["w"]
            rounding.close(got, want, condition=POLAR.table.slope)
