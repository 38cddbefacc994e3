"""The plan: golden tables of real models, and the command that prints them."""

import re
import subprocess
import sys
import textwrap
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

import optimorph as om
from optimorph.__main__ import main

SGD, FROZEN = om.sgd(0.1, 0.9), optax.set_to_zero()


@pytest.mark.parametrize("name", models.MODELS)
def test_golden_plans(name):
    """`python tests/models.py` writes them anew."""
    assert f"{om.plan(models.MODELS[name]())}\n" == models.path(name).read_text()


@pytest.mark.parametrize("name", models.MODELS)
def test_muon_does_what_the_plan_says(name):
    """The state that `init` makes is the state that the plan counts, and every matrix has a momentum."""
    params = models.MODELS[name]()
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # an output layer is inferred
        state = jax.eval_shape(om.muon(0.02).init, params)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim)
    scalars = sum(8 for leaf in jax.tree.leaves(params) if not leaf.ndim)  # whose averages look like counts
    plan = om.plan(params)
    assert held + scalars == sum(row.state_bytes for row in plan)
    assert len(plan) == len(jax.tree.leaves(params))


def test_the_plan_takes_the_arguments_of_muon():
    params = {"a": {"kernel": jnp.ones((4, 16))}, "b": jnp.ones(8)}
    row = om.plan(params, axes={"a/*": "i(2+1+1 o)"}, scale="keller", mu_dtype=jnp.bfloat16)["a/kernel"]
    assert row.matrices == ((1, 4, 8), (2, 4, 4))
    assert row.scales == (2**0.5, 1.0)
    assert row.state_bytes == 2 * 64
    assert row.role == "rule a/*"
    assert om.plan(params, others=om.sgd(0.1))["b"].state_bytes == 0
    assert om.plan(params, others=om.sgd(0.1))["b"].transform == "others"
    others = om.partition({"b": "on", "*": "off"}, {"on": om.adam(0.1), "off": om.sgd(0.1)})
    assert om.plan(params | {"c": jnp.ones(8)}, others=others)["b"].state_bytes == 64
    assert om.plan(params | {"c": jnp.ones(8)}, others=others)["c"].state_bytes == 0


def test_a_chain_tells_no_scale():
    """The plan shows the factor that an optimizer tells, also if it is 1, and none of a chain of words."""
    params = {"kernel": jnp.ones((4, 16))}
    mine = om.chain(om.orthogonalize(), om.scale_by_shape())
    scales = {om.muon(0.1): (2.0,), om.muon(0.1, scale=None): (1.0,)}
    scales |= dict.fromkeys((om.route_matrices(mine, om.sgd(0.1)), om.muonh(0.1), om.scion(0.1)), ())
    for tx, expected in scales.items():
        assert om.plan(params, tx)["kernel"].scales == expected


def test_the_plan_may_be_asked_for_one_leaf():
    plan = om.plan({"layer": {"kernel": jnp.ones((2, 3))}}, weight_decay=0.1, others_learning_rate=1e-3)
    assert plan["layer/kernel"].spec == "io"
    assert [plan[0], plan[np.int64(-1)]] == [plan["layer/kernel"]] * 2
    with pytest.raises(KeyError, match=r"no leaf has the path 'layer/kernle'. Similar.*: \['layer/kernel'\]"):
        plan["layer/kernle"]
    with pytest.raises(ValueError, match=r"plan: 'f' is .*, which is not an array"):
        om.plan({"f": jax.nn.relu})


def test_undecided_leaves_and_unused_rules_are_shown():
    text = str(om.plan({"a": jnp.ones((3, 4, 5))}, axes={"blcks/*": None}))
    assert "undecided" in text
    assert "axes={'a': 'bio'}" in text
    assert "The rule 'blcks/*' decides for no leaf." in text


def test_a_large_tree_is_planned_leaf_by_leaf():
    one = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    params = {f"block_{k}": {f"w{j}": one for j in range(10)} for k in range(1000)}
    plan = om.plan(params)
    assert len(plan) == 10_000
    assert len(str(plan).splitlines()) < 10  # alike leaves share a line


def test_masks_and_labels_of_optax_may_be_trees():
    """They have the structure of the parameters, and may look at the keys of a path."""
    params = {
        "hidden": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)},
        "list": [jnp.ones((8, 4)), jnp.ones(4)],
    }
    params = jax.eval_shape(lambda: params)
    mask = jax.tree.map(lambda x: x.ndim > 1, params)
    by_key = optax.partition(
        {True: optax.adam(1e-3), False: optax.sgd(1e-3)},
        lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "hidden", tree),
    )
    two, other = optax.masked(optax.adam(1e-3), mask), optax.masked(om.adam(1e-3), mask)
    routed = om.route_matrices(optax.adamw(1e-3, mask=mask), others=om.sgd(1e-3))
    of = {"hidden/kernel": 512, "hidden/bias": 0, "list/0": 256, "list/1": 0}
    for tx, expected in [
        (two, of),
        (om.skip_nonfinite(other), of),
        (optax.partition({True: om.adam(1e-3), False: optax.sgd(1e-3)}, mask), of),
        (by_key, {"hidden/kernel": 512, "hidden/bias": 64, "list/0": 0, "list/1": 0}),
        (optax.flatten(om.muon(1e-3)), dict.fromkeys(of, 0)),  # one array for all leaves
        (routed, of | {"list/0": 0}),  # it may be the output layer
    ]:
        found = {row.path: row.state_bytes for row in om.plan(params, tx).rows}
        assert found == expected


@pytest.mark.parametrize("layers", [3, 1001])
def test_bytes_of_an_inferred_head_and_beside_unresolved_leaves(layers):
    """The optimizer's state is measured on fewer leaves, but with the plan's routes."""
    sizes = [(8, 16), *[(16, 16)] * layers, (16, 4)]
    params = {
        f"Dense_{k}": {"kernel": jax.ShapeDtypeStruct(size, jnp.float32)} for k, size in enumerate(sizes)
    }
    last = f"Dense_{layers + 1}/kernel"
    for tree in (params, params | {"odd": jax.ShapeDtypeStruct((2, 3, 5), jnp.float32)}):
        plan = om.plan(tree)
        assert plan[last].role == "head, inferred"
        assert plan[last].state_bytes == 2 * 4 * 64  # two moments of AdamW
        assert plan["Dense_1/kernel"].state_bytes == 4 * 256  # one of Muon
    assert plan["odd"].state_bytes == 0
    assert plan["odd"].answers[0] is None


class Module(eqx.Module):
    first: eqx.nn.Linear
    table: object
    layers: list
    act: object
    last: eqx.nn.Linear


def trees():
    """Trees of dictionaries and of other containers, with None leaves and layers told apart by numbers."""
    keys = jax.random.split(jax.random.key(0), 5)
    linear = [eqx.nn.Linear(8, 8, use_bias=k > 1, key=key) for k, key in enumerate(keys)]
    mlp = eqx.nn.MLP(8, 4, 16, 3, key=keys[0])
    module = Module(linear[0], None, linear[1:4], jax.nn.relu, eqx.nn.Linear(8, 4, False, key=keys[4]))
    layer = {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}
    large = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}
    return {
        "dicts": {
            "first": layer,
            "layers": {str(k): layer for k in range(4)},
            "out": {"kernel": jnp.ones((8, 4))},
        },
        "large": {"first": large, "layers": {str(k): large for k in range(3)}, "none": None},
        "pairs": [(jnp.ones((8, 16)), jnp.ones(16)), (jnp.ones((16, 4)), jnp.ones(4)), None],
        "mlp": eqx.filter(mlp, eqx.is_inexact_array),
        "module": eqx.filter(module, eqx.is_inexact_array),
    }


def inside(make):
    """An optimizer by itself, and inside all wrappers."""
    tx = make(0.1)
    mask = jax.tree_util.Partial(jax.tree.map, lambda w: w.ndim > 1)
    return {
        "alone": tx,
        "chain": om.chain(om.clip_by_global_norm(1.0), tx),
        "optax.chain": optax.chain(optax.clip(1.0), tx),
        "skip": om.skip_nonfinite(tx),
        "steps": om.multi_steps(tx, 2),
        "optax.MultiSteps": optax.MultiSteps(tx, 2).gradient_transformation(),
        "frozen": om.partition({"*layers/0/*": "off", "*": "on"}, {"on": tx, "off": optax.set_to_zero()}),
        "two": om.partition({"*layers/[01]/*": "a", "*": "b"}, {"a": tx, "b": om.soap(0.1)}),
        "masked": optax.masked(tx, mask),
        "injected": om.inject_hyperparams(make)(learning_rate=0.1),
        "probe": om.probes.probe(tx, ("update_rms",), every=1),
        "bfloat16": om.in_bfloat16(tx),
    }


CODES = {"*layers/0/*": None, "first/*": om.codecs.Signed8(), "second/*": om.codecs.Nonneg8()}
MAKERS = {name: getattr(om, name) for name in ("adamw", "muon", "normuon", "muonh", "adamh", "scion", "soap")}
MAKERS["int8"] = lambda learning_rate: om.muon(learning_rate, state="int8")
MAKERS["codes"] = lambda learning_rate: om.compress_state(om.adamw(learning_rate), CODES)
MAKERS["routed"] = lambda learning_rate: om.route_matrices(om.sgd(learning_rate, 0.9), om.adam(learning_rate))


@pytest.mark.parametrize(("k", "name"), [*enumerate(MAKERS)], ids=MAKERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bytes_are_those_of_init(k, name):
    """Of optimizers in any wrapper, each with another tree: every array of the state is one leaf's."""
    wrappers = inside(MAKERS[name])
    del wrappers["probe"]  # its numbers are of no leaf
    kinds = trees()
    for first, (kind, params) in enumerate(kinds.items()):
        for around in ("alone", *[*wrappers][(first + k) % len(kinds) :: len(kinds)]):
            tx = wrappers[around]
            state = jax.eval_shape(lambda tree, tx=tx: tx.init(tree), params)
            held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)
            plan = om.plan(params, tx)
            assert sum(row.state_bytes for row in plan) == held, (kind, around)
            assert not any(row.unresolved for row in plan)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sides_and_questions_are_those_inside_wrappers():
    """The rows are those of the optimizer alone; what `init` refuses is unresolved."""
    params = {"hidden": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}, "odd": jnp.ones((2, 3, 5))}
    for name in ("muon", "soap", "muonh", "scion"):
        alone = om.plan(params, getattr(om, name)(0.1))
        assert alone["odd"].unresolved is not None
        for around, tx in inside(getattr(om, name)).items():
            if around not in ("two", "masked"):
                for row, own in zip(om.plan(params, tx), alone, strict=True):
                    found = (row.transform, row.spec, row.role, row.scales, row.unresolved, row.answers)
                    assert found == (
                        own.transform, own.spec, own.role, own.scales, own.unresolved, own.answers,
                    ), (name, around)  # fmt: skip
                with pytest.raises(ValueError, match="'odd' has shape"):
                    jax.eval_shape(lambda tree, tx=tx: tx.init(tree), params)
    rows = om.plan(params, om.mean("i"))
    assert rows["odd"].unresolved is not None
    assert (rows["hidden/bias"].transform, rows["hidden/kernel"].transform) == ("optimizer", "optimizer")


def test_rows_inside_a_partition_are_those_of_its_parts():
    params = {"a": {"kernel": jnp.ones((4, 8))}, "b": {"kernel": jnp.ones((8, 8))}, "c": jnp.ones(8)}
    parts = {
        "a": om.muon(0.1, axes={"blocs/*": None}),
        "b": om.scion(0.1, axes={"b/*": "io"}),
        "c": om.sgd(0.1),
    }
    plan = om.plan(params, om.partition({"a*": "a", "b*": "b", "*": "c"}, parts))
    assert [row.transform for row in plan] == ["muon", "scion", "c"]
    assert plan["a/kernel"].scales == (2**0.5,)
    assert plan.unused == ("blocs/*",)


@pytest.mark.parametrize(
    "tx",
    [
        om.adamw(0.1, mask={"*bais": False, "*": True}),
        om.adamw(0.1, mask={"*": True, "*bais": False}),
        om.partition({"*": "a", "*bais": "b"}, {"a": SGD, "b": FROZEN}),
        om.muon(0.1, shardings={"*bais": None}),
        om.adamw(0.1, state={"*bais": "int8"}),
        om.scion(0.1, norms={"*bais": "sign"}),
        om.scale_by_rules({"*bais": 0.1}),
        om.multi_steps(om.inject_hyperparams(om.adamw)(0.1, mask={"*bais": False, "*": True}), 2),
    ],
)
def test_rules_that_decide_for_no_leaf_are_unused_in_every_transformation(tx):
    plan = om.plan({"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, tx)
    assert plan.unused == ("*bais",)
    assert "The rule '*bais' decides for no leaf." in str(plan)


def test_parts_of_a_partition_have_their_labels():
    """In the column of each leaf and in the sums; of nested partitions the inner label."""
    parts = {"slow": om.adamw(1e-4), "rest": om.partition({"*b": "b", "*": "off"}, {"b": SGD, "off": FROZEN})}
    params = {"a": jnp.ones(3), "b": jnp.ones(4), "c": jnp.ones(5), "n": jnp.ones(2, int)}
    plan = om.plan(params, om.multi_steps(om.partition({"a": "slow", "*": "rest"}, parts), 2))
    assert [row.transform for row in plan] == ["slow", "b", "off", "none"]
    assert "\nslow  1       0         3 " in str(plan)


def test_a_mesh_is_for_wrapped_optimizers_too():
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    params = {"w": jax.ShapeDtypeStruct((16, 32), jnp.float32)}
    alone, around = (om.plan(params, tx, mesh=mesh) for tx in (om.muon(0.1), om.chain(om.muon(0.1))))
    assert alone.over_mesh == around.over_mesh is not None


@pytest.mark.parametrize("make", [om.adamw, om.soap])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_of_many_leaves_each_has_its_own_bytes(make):
    layers = {str(k): {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)} for k in range(1100)}
    rules = {re.compile(r"layers/\d/.*"): "off", "*": "on"}
    tx = om.partition(rules, {"off": optax.set_to_zero(), "on": make(0.1)})
    plan = om.plan({"layers": layers}, tx)
    state = jax.eval_shape(lambda tree: tx.init(tree), {"layers": layers})
    assert {plan[f"layers/{k}/kernel"].state_bytes for k in range(10)} == {0}
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)
    assert sum(row.state_bytes for row in plan) == held > 1000 * 512


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo.py").write_text(
        textwrap.dedent(
            """
            import jax, jax.numpy as jnp
            import equinox as eqx

            def init():
                return {"kernel": jnp.ones((10**6, 10**6)), "embed": jnp.ones((10**6, 70_000)), "name": "x"}

            def mlp():
                return eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(0))

            def undecided():
                return {"a": jnp.ones((2, 3, 4))}

            def abstract():
                return jax.eval_shape(init_arrays)

            def init_arrays():
                return {"layers": {"kernel": jnp.ones((80, 8192, 28672), jnp.bfloat16)}}

            def nothing():
                return None

            def leaves():
                raise SystemExit(7)

            def broken():
                raise RuntimeError("no such file")
            """
        )
    )
    yield "zoo"
    sys.modules.pop("zoo", None)
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]


def test_the_command_plans_what_would_never_fit(model, capsys):
    assert main(["plan", "zoo:init"]) == 0
    out = capsys.readouterr().out
    assert "1000000 x 1000000" in out
    assert "1,070,000,000,000" in out


def test_the_command_takes_shapes(model, capsys):
    assert main(["plan", "zoo:abstract"]) == 0
    assert "80 of 8192 x 28672" in capsys.readouterr().out


def test_the_command_says_what_matches_nothing(model, capsys):
    assert main(["plan", "zoo:init", "--axes", "bloks/*=none", "--axes", "bloks/*=io"]) == 1
    assert "The rule 'bloks/*' decides for no leaf." in capsys.readouterr().out


def test_a_closed_pipe_is_no_error(model):
    """The reader is gone before the first word is written."""
    command = f"{sys.executable} -m optimorph plan zoo:init | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("where", ["importlib.import_module", "optimorph._plan_command.main"])
def test_ctrl_c_is_one_word(model, monkeypatch, capsys, where):
    """Also while jax is being imported."""
    with monkeypatch.context() as changed:
        changed.setattr(where, failing(KeyboardInterrupt()))
        assert main(["plan", "zoo:init"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_missing_package_is_named(monkeypatch, capsys):
    with monkeypatch.context() as changed:
        changed.setattr("importlib.import_module", failing(ModuleNotFoundError(name="rich")))
        with pytest.raises(SystemExit) as stop:
            main(["race"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "optimorph race needs rich: pip install 'optimorph[race]'\n"


def test_a_missing_module_of_its_own_is_not_taken_for_an_extra(monkeypatch):
    with monkeypatch.context() as changed:
        changed.setattr("importlib.import_module", failing(ModuleNotFoundError(name="optimorph._racing")))
        with pytest.raises(ModuleNotFoundError):
            main(["race"])


def failing(error):
    def fail(*args):
        raise error

    return fail


def test_the_command_takes_modules_and_rules(model, capsys):
    assert main(["plan", "zoo:mlp", "--axes", "*layers/2/*=none", "--scale", "none"]) == 0
    out = capsys.readouterr().out
    assert "rule *layers/2/*" in out


def test_the_command_says_what_is_undecided(model, capsys):
    assert main(["plan", "zoo:undecided"]) == 1
    assert "axes={'a': 'bio'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["zoo"], "'zoo' is not of the form MODULE:FUNCTION"),
        (["zoo:absent"], "'zoo:absent' cannot be evaluated: AttributeError"),
        (["nowhere:init"], "ModuleNotFoundError"),
        (["zoo:nothing"], "returns no arrays"),
        (["zoo:leaves"], "SystemExit: 7"),
        (["zoo.py:init"], "type its module, zoo:init"),
        (["zoo:broken"], "RuntimeError: no such file"),
        (["zoo:init", "--axes", "kernel"], "--axes 'kernel' is not of the form PATTERN=SPEC"),
        (["zoo:init", "--scale", "big"], "--scale"),
        ([], "MODULE:FUNCTION"),
    ],
)
def test_bad_input_is_one_line_and_2(model, capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_planning_needs_none_of_the_race(tmp_path):
    """Without flax, rich, matplotlib and scikit-learn the package imports and plans."""
    (tmp_path / "tiny.py").write_text("import jax.numpy as jnp\ndef init(): return {'w': jnp.ones((2, 3))}\n")
    block = "import sys\nfor name in ('flax', 'rich', 'matplotlib', 'sklearn'): sys.modules[name] = None\n"
    code = block + "from optimorph.__main__ import main\nsys.exit(main(['plan', 'tiny:init']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "2 x 3" in done.stdout


def test_learning_rates_of_both_sides():
    """Those of the first step; none where the optimizer does not route, or has none of its own."""
    params = {"dense": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}}
    found = om.plan(params, om.muon(optax.constant_schedule(0.02), others_learning_rate=3e-3))
    assert found.learning_rates == {"muon": np.float32(0.02), "adamw": np.float32(3e-3)}
    assert "0.003" in str(found)
    assert om.plan(params, learning_rate=0.5).learning_rates == {"muon": 0.5, "adamw": 0.5}
    assert om.plan(params, om.muon(0.5, others=optax.adam(0.1))).learning_rates == {"muon": 0.5}
    inner = om.partition({"*": "all"}, {"all": om.adam(0.1)})
    assert om.plan(params, om.muon(0.5, others=inner)).learning_rates == {
        "muon": 0.5,
        "others": np.float32(0.1),
    }
    assert om.plan(params, om.scion(0.5)).learning_rates == {"scion": 0.5, "rms": 0.5}
    traced = jax.jit(lambda rate: om.plan(params, om.muon(rate)).learning_rates)(0.5)
    assert om.plan(params).learning_rates == om.plan(params, om.adamw(0.5)).learning_rates == traced == {}


@pytest.mark.parametrize(
    ("given", "platform", "mode", "way"),
    [
        (None, "tpu", "Auto", "hints"),
        (None, "cpu", "Auto", "custom_partitioning"),
        (None, "tpu", "Explicit", "exchange"),
        ({"*": PartitionSpec("data")}, "tpu", "Auto", "exchange"),
    ],
)
def test_over_a_mesh(given, platform, mode, way):
    """The way, and what a device computes and sends: one of 4 matrices is two even shares of 8 devices."""
    device = AbstractDevice("any", None, platform)
    mesh = AbstractMesh(
        (4, 2), ("data", "model"), axis_types=(getattr(AxisType, mode),) * 2, abstract_device=device
    )
    place = NamedSharding(mesh, PartitionSpec("data"))
    params = {f"w{k}": jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=place) for k in range(4)}
    found = om.plan(params, om.muon(0.1, axes={"*": "io"}, shardings=given), mesh=mesh).over_mesh
    assert (found.way, found.platform) == (way, platform)
    assert found.flops == om.linalg.NewtonSchulz().flops(16, 32)
    assert found.flops / found.least_flops == 2
    assert found.sent == 2 * 3 * 4 * 32 * 4  # to three others and back, 4 rows of 32 float32 numbers
    assert "data 4 x model 2" in str(found)
    with pytest.warns(UserWarning, match="plan: mesh is for optimizers of matrices"):
        assert om.plan(params, om.adamw(0.1), mesh=mesh).over_mesh is None
    with pytest.raises(ValueError, match=r"plan: 'w0' has sharding .* the mesh has no 'fsdp', only \['data'"):
        om.plan(params, axes={"*": "io"}, shardings={"*": PartitionSpec("fsdp")}, mesh=mesh)


def test_what_is_expected_of_known_devices():
    """Seconds by the devices' numbers or the user's; where devices would be idle, matrices are divided."""
    device = AbstractDevice("TPU v5", None, "tpu")
    mesh = AbstractMesh(
        (4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, abstract_device=device
    )
    params = {"w": jax.ShapeDtypeStruct((4, 4096, 14336), jnp.float32)}
    found = om.plan(params, axes={"*": "bio"}, mesh=mesh)
    whole = om.plan(params, axes={"*": "bio"}, mesh=mesh, divide="never").over_mesh
    assert "4 matrices are each divided over several devices" in str(found)
    assert "Expected at 459 Tflop/s and 200 GB/s, 6.25 between nodes" in str(found)
    assert found.over_mesh.flops == 0.5 * whole.flops == found.over_mesh.least_flops
    assert whole.divided == 0
    assert whole.seconds[0] == 2 * found.over_mesh.seconds[0]
    assert sum(whole.seconds) > sum(found.over_mesh.seconds)
    exact = om.muon(0.1, axes={"*": "bio"}, orthogonalizer=om.linalg.Exact())
    assert om.plan(params, exact, mesh=mesh).over_mesh.divided == 0
    twice = om.scion(0.1, axes={"*": "bio"}, orthogonalizer=om.linalg.NewtonSchulz(steps=10))
    assert om.plan(params, twice, mesh=mesh).over_mesh.flops == 2 * found.over_mesh.flops
    unknown = AbstractMesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    assert "The speed of the devices is not known" in str(om.plan(params, axes={"*": "bio"}, mesh=unknown))
    assert "sends 1,644 MB" in str(om.plan(params, axes={"*": "bio"}, mesh=unknown))
    slow = om.Hardware("tpu", flops=1e12, bytes_near=1e6, bytes_far=1e6, node=8)
    given = om.plan(params, axes={"*": "bio"}, mesh=mesh, divide=slow).over_mesh
    assert given.divided == 0
    assert given.seconds[0] == given.flops / 1e12
