"""Clipping, skipping and rounding over meshes: what one device does, by all-reduces of scalars."""

import contextlib

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
import trees

import optimorph as om

GROUPS = {"replicated": 0, "fsdp, last axis": 1, "fsdp x tensor": 3, "mixed": 5}
"""How many sets of mesh axes, in their order, divide leaves: what the same ones divide is reduced at once."""


def both(tx, g, places):
    """Updates and state over the mesh, on one device, and the program over the mesh."""
    update = jax.jit(tx.update)
    there, here = trees.put(g, places), trees.on_one(g)
    compiled = update.lower(there, tx.init(there)).compile()
    return compiled(there, tx.init(there)), update(here, tx.init(here)), compiled


def all_reduces(compiled):
    found = hlo.counted(compiled).collectives
    assert set(found) <= {"all-reduce"}
    return found["all-reduce"]


@pytest.mark.examples("auto-fsdp x tensor")
@pytest.mark.parametrize("layout", GROUPS)
def test_clip(layout, mode):
    """One for the largest number, one for the squares."""
    places = trees.shardings(layout, 8, mode)
    g = {name: 1e25 * x for name, x in trees.drawn(0).items()}
    (updates, state), (alone, on_one), compiled = both(om.clip_by_global_norm(1.0), g, places)
    assert all_reduces(compiled) == 2 * GROUPS[layout]
    terms = np.sqrt(max(x.size for x in g.values()))  # of a sum, whose roundings are of any sign
    rounding.close(state.norm, on_one.norm, units=1, condition=terms)
    for name in g:
        rounding.close_each(updates[name], alone[name], units=1, condition=terms)
        assert updates[name].sharding.is_equivalent_to(places[name], updates[name].ndim)


@pytest.mark.examples("auto-fsdp x tensor")
@pytest.mark.parametrize("layout", GROUPS)
def test_skip(layout, mode):
    """A NaN on one device is seen by all."""
    places = trees.shardings(layout, 8, mode)
    tx = om.skip_nonfinite(om.adam(0.1))
    with jax.enable_x64(True):
        g = trees.drawn(0, np.float64)
        (updates, state), (alone, _), compiled = both(tx, g, places)
        rounding.close(updates, alone)
        g["up"][-1, -1] = np.nan
        updates, after = compiled(trees.put(g, places), state)
    assert all_reduces(compiled) == GROUPS[layout]
    assert (after.skipped, after.consecutive) == (1, 1)
    assert not any(np.any(u) for u in updates.values())
    for before, now in zip(jax.tree.leaves(state.inner), jax.tree.leaves(after.inner), strict=True):
        np.testing.assert_array_equal(now, before)


@pytest.mark.examples("auto")
def test_the_limit(mode):
    places = trees.shardings("fsdp x tensor", 8, mode)
    g = trees.drawn(0)
    g["up"][-1, -1] = np.nan
    tx = om.skip_nonfinite(om.adam(0.1), 0)
    g = trees.put(g, places)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"step 1 in a row.*the gradient of 'up'\."):
        jax.block_until_ready(jax.jit(tx.update)(g, tx.init(g)))
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the other devices' at exit otherwise
        jax.effects_barrier()


@pytest.mark.examples("auto-fsdp x tensor")
@pytest.mark.parametrize("layout", GROUPS)
def test_rounding(layout, mode):
    """Bit by bit what one device does, with no collective."""
    places = trees.shardings(layout, 8, mode)
    w, u = trees.drawn(0, jnp.bfloat16), trees.drawn(1, np.float32)
    apply, key = jax.jit(om.apply_updates), jax.random.key(0)
    over = trees.put(w, places), trees.put(u, places)
    compiled = apply.lower(*over, key).compile()
    assert not hlo.counted(compiled).collectives
    alone = apply(trees.on_one(w), trees.on_one(u), key)
    for name, x in compiled(*over, key).items():
        np.testing.assert_array_equal(x, alone[name])
