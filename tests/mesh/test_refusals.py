"""What cannot be known is asked, and what cannot be is refused, with the leaf's name and what to type."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
import rounding
import trees
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optimorph as om
from optimorph._distributed.sharded_function import ShardedFunction

PLAIN = {"*": "io"}
NONE = optax.EmptyState()


def mesh(mode=AxisType.Auto):
    return trees.mesh_of(8, 2, mode)


def update(shardings, shape=(8, 24)):
    return om.orthogonalize(None, PLAIN, shardings).update({"w": jnp.ones(shape)}, NONE)[0]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"v": P("data")}, ["orthogonalize", "no sharding rule matches 'w'", "P()"]),
        ({"w": "data"}, ["'w'", "'data'", "PartitionSpec"]),
        ({"w": P("data", None, None)}, ["'w'", "(8, 24)", "3 axes"]),
        ({"w": P("rows", None)}, ["'w'", "'rows'", "['data', 'model']"]),
        ({"w": P(None, ("data", "model"))}, []),
        ({"w": P(("data", "model", "data"), None)}, ["'w'"]),
    ],
)
def test_shardings(said, words):
    with jax.set_mesh(mesh()):
        if words:
            with pytest.raises(ValueError) as error:
                update(said)
            assert all(word in str(error.value) for word in words), str(error.value)
        else:
            update(said)


def test_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match=r"'w' has shape \(6, 24\).*divides 6 by 4"):
        update({"w": NamedSharding(mesh(), P("data", None))}, (6, 24))


def test_no_mesh():
    with pytest.raises(ValueError, match=r"'w' has sharding .* without a mesh.*NamedSharding.*set_mesh"):
        update({"w": P("data", None)})


def test_two_meshes():
    other = trees.mesh_of(4, 1, AxisType.Auto)
    tx = om.orthogonalize(None, PLAIN, {"a": NamedSharding(mesh(), P()), "b": NamedSharding(other, P())})
    with pytest.raises(ValueError, match="2 meshes"):
        tx.update({"a": jnp.ones((4, 8)), "b": jnp.ones((4, 8))}, NONE)


def test_inside_shard_map_nothing_is_guessed():
    tx = om.muon(0.1, axes=PLAIN)

    def body(w):
        return tx.update({"w": w}, tx.init({"w": w}), {"w": w})[0]["w"]

    run = jax.shard_map(body, mesh=mesh(), in_specs=P("data", None), out_specs=P("data", None))
    with pytest.raises(
        ValueError, match=r"inside jax.shard_map or pmap over data, model, 'w' of shape \(2, 24\) may be"
    ):
        jax.jit(run)(jnp.ones((8, 24)))


@pytest.mark.parametrize("tx", [om.muon(0.1, axes=PLAIN), om.clip_norm(1.0)])
def test_what_to_type_names_an_axis_of_the_mesh(tx):
    run = jax.pmap(lambda w: tx.update({"w": w}, tx.init({"w": w}), {"w": w})[0], axis_name="d")
    with pytest.raises(
        ValueError, match=r"pmap over d, .* shardings=\{'\*/kernel': P\('d', None\), '\*': P\(\)\}"
    ):
        run(jnp.ones((2, 8, 24)))


def test_inside_shard_map_and_a_partition_nothing_else_is_named():
    """The state of a part is right: what lacks is shardings."""
    params = {"up": {"kernel": jnp.ones((8, 8))}, "bias": jnp.ones(8)}
    tx = om.partition({"bias": "a", "*": "b"}, {"a": om.sgd(0.1), "b": om.muon(0.1, axes=PLAIN)})
    run = jax.shard_map(tx.update, mesh=mesh(), in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match=r"muon: inside jax.shard_map .* 'up/kernel'"):
        jax.eval_shape(run, params, tx.init(params), params)


@pytest.mark.filterwarnings("ignore:muon. no leaf matches the rule 'v'")
def test_inside_shard_map_every_leaf_is_said():
    tx = om.muon(0.1, axes=PLAIN, shardings={"v": P("data")})
    run = jax.shard_map(
        lambda w: tx.init({"w": w}), mesh=mesh(), in_specs=P("data", None), out_specs=P(), check_vma=False
    )
    with pytest.raises(ValueError, match=r"muon: no sharding rule matches 'w'"):
        jax.eval_shape(run, jnp.ones((8, 24)))


def test_inside_shard_map_shardings_are_given():
    task = ShardedFunction(om.linalg.NewtonSchulz(), (om.linalg.Axes("io"),))
    place = {"mesh": mesh(), "in_specs": P("data", None), "out_specs": P("data", None)}
    with pytest.raises(ValueError, match="shardings must be given"):
        jax.eval_shape(jax.shard_map(lambda w: task([w])[0], **place), jnp.ones((8, 24)))


def test_what_jax_refuses_is_in_its_own_words():
    """The trees agree: they are on different devices."""
    tx, (here, there) = om.ema(0.9), (jax.device_put(jnp.ones(3), device) for device in jax.devices()[:2])
    with pytest.raises(ValueError, match="incompatible devices"):
        tx.update({"w": there}, tx.init({"w": here}))


@pytest.mark.slow
def test_exported_with_shardings_that_are_said():
    place = NamedSharding(mesh(), P("data", None))
    tx = om.orthogonalize(None, PLAIN, {"w": place})
    with jax.enable_x64(True):
        arrays = jax.device_put(jnp.ones((8, 24)), place)
        exported = jax.export.export(jax.jit(lambda w: tx.update({"w": w}, NONE)[0]["w"]))(arrays)
        want = tx.update({"w": arrays}, NONE)[0]["w"]
        rounding.close(exported.call(arrays), want, units=1, condition=om.linalg.NewtonSchulz().table.slope)


CACHED = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P
import optimorph as om
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_enable_compilation_cache", True)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:8])
g = jax.device_put(jnp.arange(192.0).reshape(8, 24) % 7, NamedSharding(mesh, P("data", None)))
names = []
jax.monitoring.register_event_listener(lambda name, **_: names.append(name))
for steps in map(int, sys.argv[2:]):
    tx = om.orthogonalize(om.linalg.NewtonSchulz(steps=steps), {"*": "io"})
    got = jax.jit(lambda g: tx.update({"w": g}, optax.EmptyState())[0]["w"])(g)
    want = om.linalg.NewtonSchulz(steps=steps)(jax.device_put(g, jax.devices()[0]))
    np.testing.assert_allclose(got, want, atol=1e-12)
print(sum(name.endswith("cache_hits") for name in names) > 0)
"""


@pytest.mark.slow
def test_compilation_cache(tmp_path):
    """Programs that differ only in what the compiler is answered are not taken for each other."""

    def run(*steps):
        command = [sys.executable, "-c", CACHED, str(tmp_path), *map(str, steps)]
        root = Path(__file__).parent.parent.parent
        done = subprocess.run(command, env=os.environ, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip()

    run(3)
    assert run(4, 3) == "True"


LOCAL = {  # what needs shardings inside shard_map
    "clip_norm": lambda shardings: om.clip_norm(1.0, shardings),
    "clip_rms": lambda shardings: om.clip_rms(1.0, shardings),
    "cautious": lambda shardings: om.cautious(om.ema(0.9), shardings=shardings),
    "hyperball": lambda shardings: om.hyperball(0.1, {"*": "io"}, shardings),
    "adamh": lambda shardings: om.adamh(0.1, axes={"*": "io"}, shardings=shardings),
    "keep_norm": lambda shardings: om.keep_norm(om.sign(), axes={"*": "io"}, shardings=shardings),
    "mean": lambda shardings: om.mean("i", axes={"*": "io"}, shardings=shardings),
    "factored": lambda shardings: om.factored(0.9, {"*": "io"}, shardings),
    "muon": lambda shardings: om.muon(0.1, axes={"*": "io"}, shardings=shardings),
    "scion": lambda shardings: om.scion(0.1, axes={"*": "io"}, shardings=shardings),
}
MISFITS = {
    "'a/kernel' has sharding .* but the mesh has no 'dta', only": P("dta"),
    "'a/kernel' has shape .* but its sharding .* has 3 axes": P("data", None, None),
    "'a/kernel' has sharding 'data'. Type a jax.sharding.PartitionSpec": "data",
    r"'a/kernel' has sharding \('data',\). Type a jax.sharding.PartitionSpec": ("data",),
}


@pytest.mark.parametrize("words", MISFITS, ids=map(str, MISFITS.values()))
@pytest.mark.parametrize("name", LOCAL)
def test_shardings_that_do_not_fit_are_refused_inside_shard_map(name, words):
    """A name of no mesh axis would have each device take its shard for the whole."""
    tx, params = LOCAL[name]({"*": MISFITS[words]}), {"a": {"kernel": jnp.ones((16, 32))}}
    inside = jax.shard_map(
        lambda p: tx.update(p, tx.init(p), p)[0], mesh=mesh(), in_specs=P("data"), out_specs=P("data")
    )
    with pytest.raises(ValueError, match=f"{name}.*{words}"):
        jax.eval_shape(inside, params)
