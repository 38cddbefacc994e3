"""What the default rules make of public models' parameters; what siblings tell."""

import ast
import functools
import random
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import optimorph as om


def trees():
    """Name → {path: (shape, accepted specs)}."""
    found = {}
    for block in (Path(__file__).parent / "trees.txt").read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("#")]
        if lines:
            leaves = (line.split(" ") for line in lines[1:])
            found[lines[0].split(" | ")[0]] = {
                path: (tuple(map(int, shape.split(","))), [spec.replace("_", " ") for spec in accepted])
                for path, shape, *accepted in leaves
            }
    return found


TREES = trees()
AS_NO_MATRIX = {None: "-", "head": "-"}
"""Answers to what to type for a leaf that is no matrix."""


def shapes(tree):
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, (shape, _) in tree.items()}


def specs(plan):
    """Path → spec, "-" of no matrix, "?" of a question."""
    return {row.path: row.spec or "-?"[row.unresolved is not None] for row in plan}


def planned(params, **arguments):
    return specs(om.plan(params, **arguments))


OTHER_SHAPES = (
    lambda shape: (),
    lambda shape: shape[1:],
    lambda shape: (0, *shape[1:]),
    lambda shape: (*shape, 1),
    lambda shape: (2, *shape),
    lambda shape: (1,) * len(shape),
    lambda shape: shape[:1] * 2,
)


@pytest.mark.parametrize("seed", range(len(OTHER_SHAPES)))
def test_leaves_of_any_shape(seed):
    """Leaves with the names of known models and shapes that nobody expects are decided or asked for."""
    chance = random.Random(seed)
    for tree in chance.sample([*TREES.values()], 20):
        found = {path: shape for path, (shape, _) in tree.items()}
        for path in chance.sample([*found], min(3, len(found))):
            found[path] = OTHER_SHAPES[seed](found[path])
        om.plan({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in found.items()})


@pytest.mark.parametrize(
    "params",
    [
        {"weight": (), "bias": (2, 3)},
        ((), (64, 64)),
        {"out": {"lm_head": (64, 64), "bias": ()}},
        {"lstm": {"weight_ih": (2, 48, 2), "weight_hh": (48, 16)}},
        {"embedding": (), "Conv_0": {"kernel": (2, 2, 2, 16)}, "head": {"kernel": (64, 10)}},
    ],
)
def test_scalars_beside_matrices(params):
    params = jax.tree.map(
        jnp.ones, params, is_leaf=lambda x: type(x) is tuple and all(type(n) is int for n in x)
    )
    om.plan(params)
    om.decay_mask(params)


def one_answer(text):
    """The rules of the last question, which is about all leaves."""
    source = text[text.rindex("axes={") + len("axes=") :].split("\n")
    source = "".join(source[: next(k for k, line in enumerate(source) if line.strip() in ("}", "")) + 1])
    source = source.split("}  #")[0] + ("}" if "}  #" in source else "")
    keys, values = [], []
    tree = ast.parse(source, mode="eval").body
    for key, value in zip(tree.keys, tree.values, strict=True):
        pattern = isinstance(key, ast.Call)
        keys.append(re.compile(key.args[0].value) if pattern else key.value)
        values.append(value.value)
    return dict(zip(keys, values, strict=True))


@functools.cache
def default(name):
    """A tree's plan without any rules."""
    return om.plan(shapes(TREES[name]))


@pytest.mark.parametrize("name", TREES)
def test_no_leaf_of_a_public_model_is_read_wrongly(name):
    found = specs(default(name))
    wrong = {path: (found[path], accepted) for path, (_, accepted) in TREES[name].items()}
    assert {path: pair for path, pair in wrong.items() if pair[0] not in pair[1]} == {}


def test_few_leaves_of_public_models_are_asked():
    found = [spec for name in TREES for spec in specs(default(name)).values()]
    asked = found.count("?")
    assert asked / len(found) < 0.1
    root = Path(__file__).parent.parent
    for page in ("README.md", "docs/guides/routing.md"):
        text = " ".join((root / page).read_text().split())
        assert f"{len(found)} leaves of {len(TREES)} public models" in text, page
        assert f"ask about {asked}" in text, page


@pytest.mark.parametrize("name", TREES)
def test_the_first_answers_are_right_and_enough(name):
    """All of them at once, as the error and the plan print them."""
    tree, params, plan = TREES[name], shapes(TREES[name]), default(name)
    asked = [row.path for row in plan if row.unresolved is not None]
    if not asked:
        return
    first = {row.path: AS_NO_MATRIX.get(row.answers[0], row.answers[0]) for row in plan if row.answers}
    assert {path: spec for path, spec in first.items() if spec not in tree[path][1]} == {}
    with pytest.raises(ValueError, match="Type one of") as error, warnings.catch_warnings(action="ignore"):
        om.muon(0.1).init(params)
    for text in (str(plan), str(error.value)):
        if text.count("Type one of") > 1:
            found = planned(params, axes=one_answer(text[text.index("All at once") :]))
            assert {path: found[path] for path in asked if found[path] not in tree[path][1]} == {}


STACKS = {
    "norms in second place": ({"w/kernel": (64, 3, 16), "norm/scale": (64, 3)}, "ibo"),
    "norms in first place": ({"w/kernel": (3, 64, 16), "norm/scale": (3, 64)}, "bio"),
    "biases": ({"w/kernel": (3, 64, 16), "w/bias": (3, 16)}, "bio"),
    "attention": ({"attn/query/kernel": (3, 64, 4, 16), "norm/scale": (3, 64)}, "bioo"),
    "a norm of one axis": ({"layers/attn/query/kernel": (64, 4, 16), "layers/norm/scale": (64,)}, "ioo"),
    "no siblings": ({"w/kernel": (64, 3, 16)}, "?"),
    "norms that differ": ({"w/kernel": (3, 64, 16), "a/scale": (3, 64), "b/scale": (64,)}, "?"),
    "another size": ({"w/kernel": (4, 64, 16), "norm/scale": (3, 64)}, "?"),
    "both positions": ({"w/kernel": (12, 12, 16), "norm/scale": (12, 12)}, "?"),
    "a layer longer than wide": ({"w/kernel": (64, 3, 16), "norm/scale": (64, 2)}, "?"),
    "experts and their router": ({"moe/w_up": (8, 32, 64), "moe/router/kernel": (32, 8)}, "bio"),
    "experts' other layer": ({"m/w_down": (8, 64, 32), "m/router/kernel": (32, 8)}, "bio"),
    "another router": ({"a/w_up": (8, 32, 64), "b/router/kernel": (32, 8)}, "?"),
    "as many experts as another's": ({"m/w_up": (9, 32, 64), "m/router/kernel": (32, 8)}, "?"),
    "stacked experts": (
        {"l/m/w_up": (8, 3, 32, 64), "l/m/router/kernel": (32, 3, 8), "l/norm/scale": (32, 3)},
        "bbio",
    ),
    "a second factor, not biases": ({"layers/q/b": (8, 96), "layers/q/a": (64, 8)}, "io"),
    "biases, not factors": ({"layers/q/b": (8, 96), "layers/q/w": (8, 64, 96)}, "-"),
    "a second factor with heads": ({"layers/q/lora_b": (8, 4, 24), "layers/q/lora_a": (64, 8)}, "ioo"),
    "factors with outputs first": ({"q/lora_up": (96, 8), "q/lora_down": (8, 64)}, "oi"),
    "stacked factors": ({"q/A": (12, 64, 8), "q/B": (12, 8, 96)}, "bio"),
    "a state space": ({"ssm/B": (8, 96), "ssm/A": (64, 8), "ssm/C": (96, 8)}, "?"),
    "a weight by its bias": ({"m/fc/weight": (64, 16), "m/fc/bias": (16,)}, "io"),
    "a kernel by its bias": ({"m/fc/kernel": (64, 16), "m/fc/bias": (64,)}, "oi"),
    "heads by their bias": ({"odd/kernel": (64, 4, 16), "odd/bias": (4, 16)}, "ioo"),
    "a convolution by its bias": ({"odd/kernel": (3, 64, 16), "odd/bias": (16,)}, "iio"),
    "a transposed convolution": ({"conv/kernel": (3, 3, 16, 64), "conv/bias": (16,)}, "iioi"),
    "a bias that may be stacked": ({"odd/kernel": (3, 64, 3), "odd/bias": (3, 3)}, "?"),
    "beside a layer with a bias": (
        {"m/k/weight": (64, 16), "m/q/weight": (64, 16), "m/q/bias": (16,)},
        "io",
    ),
    "stacked biases of Haiku": ({"odd/b": (8, 3), "odd/w": (8, 64, 3)}, "-"),
    "biases of the last of stacked layers": (
        {"net/head/w": (8, 64, 3), "net/a/w": (8, 16, 64), "net/a/b": (8, 64)},
        "-",
    ),
    "one output in each layer": (
        {
            "net/a/kernel": (2, 16, 64),
            "net/a/bias": (2, 64),
            "net/v/kernel": (2, 64, 1),
            "net/v/bias": (2, 1),
        },
        "bio",
    ),
    "experts in rows": ({"moe/experts/w1": (4096, 32), "moe/router/kernel": (32, 16)}, "(16o)i"),
    "experts in rows, back": ({"moe/experts/w2": (4096, 32), "moe/router/kernel": (32, 16)}, "(16i)o"),
    "an array in a list of modules": ({"0": (26, 10), "1/w": (10, 32), "2/0": (32, 5), "2/1": (5,)}, "?"),
    "a long one": ({"0": (2600, 10), "1/w": (10, 32), "2/0": (32, 5), "2/1": (5,)}, "-"),
    "a gate of experts": ({"m/gate/kernel": (64, 8), "m/experts/up/kernel": (8, 64, 32)}, "-"),
    "a gate of a perceptron": (
        {"m/gate/kernel": (64, 9), "m/experts/up/kernel": (8, 64, 32), "m/down/kernel": (9, 64)},
        "io",
    ),
    "a list of weights": (
        {"f/layers/1/weight": (48, 64), "f/layers/0/weight": (64, 8), "f/layers/2/weight": (20, 48)},
        "oi",
    ),
    "a list of weights, inputs first": (
        {"f/layers/1/weight": (64, 48), "f/layers/0/weight": (8, 64), "f/layers/2/weight": (48, 20)},
        "io",
    ),
    "a perceptron, inputs first": (
        {"b/mlp/linear1/weight": (64, 256), "b/mlp/linear2/weight": (256, 64), "b/norm/scale": (64,)},
        "io",
    ),
    "a perceptron, back": (
        {
            "b/mlp/linear2/weight": (256, 64),
            "b/mlp/linear1/weight": (64, 256),
            "b/norm/scale": (64,),
            "head/kernel": (64, 5),
        },
        "io",
    ),
    "a perceptron without norms": (
        {"b/mlp/linear1/weight": (64, 256), "b/mlp/linear2/weight": (256, 64)},
        "oi",
    ),
    "an adapter": ({"b/up/weight": (64, 8), "b/down/weight": (8, 64), "b/norm/scale": (64,)}, "oi"),
    "gate and input, outputs first": ({"mlp/gating_einsum": (2, 48, 64), "mlp/linear": (48, 64)}, "boi"),
    "gates and inputs of experts": (
        {
            "mlp/gating_einsum/w": (8, 2, 48, 64),
            "mlp/linear/w": (8, 48, 64),
            "mlp/router_logits/w": (64, 8),
        },
        "bboi",
    ),
    "query, key and value counted": ({"attn/qkv/kernel": (64, 3, 64)}, "ibo"),
    "an output of attention": ({"attn/output_proj/kernel": (4, 16, 64)}, "iio"),
    "a vocabulary": ({"first/w": (4096, 64), "head/w": (64, 4096)}, "-"),
    "as many inputs as a vocabulary": ({"first/w": (4096, 512), "head/w": (512, 4096)}, "io"),
    "inputs that are no vocabulary": (
        {"first/w": (4096, 64), "head/w": (64, 10), "logit_temperature": ()},
        "io",
    ),
    "gates of a GRU under vmap": ({"VmapNet_0/GRU_0/Wi": (30, 2), "VmapNet_0/GRU_0/Wh": (30, 10)}, "(3o)i"),
    "one head by its bias": ({"attn/q/kernel": (64, 1, 64), "attn/q/bias": (1, 64)}, "ioo"),
    "queries beside an output with a bias": (
        {"attn/key/w": (64, 4, 16), "attn/post/w": (64, 4, 16), "attn/post/b": (64,)},
        "ioo",
    ),
    "a pair of a convolution and its bias": ({"4/1/0": (3, 3, 64, 16), "4/1/1": (1, 1, 1, 16)}, "iiio"),
    "groups of heads": ({"block_0/attention/query.weights": (64, 2, 4, 8), "norm/scale": (64,)}, "iooo"),
    "groups of heads, back": (
        {"block_0/attention/output.weights": (2, 4, 8, 64), "norm/scale": (64,)},
        "iiio",
    ),
    "gates of a GRU": ({"cell/weight_ih": (30, 2), "cell/weight_hh": (30, 10)}, "(3o)i"),
}


FUSED = {
    "query, key and value": ({"attn_0/linear/w": (64, 192), "attn_0/linear_1/w": (64, 64)}, ("?", "io")),
    "gate and input": ({"mlp_0/up/w": (64, 512), "mlp_0/down/w": (256, 64)}, ("?", "io")),
    "an input for all": ({"mlp_0/up/w": (64, 512), "mlp_0/down/w": (512, 64)}, ("io", "io")),
    "experts": (
        {"moe/w_in": (4, 64, 256), "moe/w_out": (4, 128, 64), "moe/router/w": (64, 4)},
        ("?", "bio", "-"),
    ),
    "one layer of attention": ({"attn_0/q_b/w": (64, 192), "attn_0/linear_1/w": (64, 64)}, ("io", "io")),
    "a head of several layers": (
        {"classifier/0/kernel": (64, 32), "classifier/2/kernel": (32, 9)},
        ("io", "-"),
    ),
    "heads side by side": ({"heads/0/kernel": (64, 32), "heads/1/kernel": (64, 9)}, ("-", "-")),
    "the last layer of a stack": (
        {"a_layer_0/linear/w": (7, 64), "a_layer_1/linear/w": (64, 64), "a_layer_2/linear/w": (64, 5)},
        ("io", "io", "-"),
    ),
    "parts that are not equal": (
        {"layers/0/wi": (64, 608), "layers/0/attn_wo": (64, 64), "layers/0/ff_wo": (256, 64)},
        ("?", "io", "io"),
    ),
    "gate and input as wide as the model": (
        {"moe/up": (4, 64, 64), "moe/down": (4, 32, 64), "moe/router/w": (64, 4)},
        ("?", "bio", "-"),
    ),
    "layers of a head that feed its last": (
        {
            "decode_head/a/kernel": (32, 64),
            "decode_head/fuse/kernel": (64, 64),
            "decode_head/out/kernel": (64, 9),
        },
        ("io", "io", "-"),
    ),
    "a perceptron in a head": (
        {"action_head/torso_1/Dense_0/kernel": (64, 64), "action_head/Dense_0/kernel": (64, 9)},
        ("io", "-"),
    ),
    "equal heads side by side": (
        {"heads/0/kernel": (64, 64), "heads/1/kernel": (64, 64)},
        ("-", "-"),
    ),
    "a convolution before a classifier": (
        {"x/head/conv/kernel": (1, 1, 32, 64), "classifier/kernel": (64, 9)},
        ("iiio", "-"),
    ),
    "a convolution in an output module": (
        {
            "down/conv_a/kernel": (3, 3, 32, 64),
            "down/conv_b/kernel": (3, 3, 64, 64),
            "output_projection/conv1x1/kernel": (1, 1, 64, 9),
        },
        ("iiio", "iiio", "-"),
    ),
    "as many outputs as places of a picture": (
        {"Conv_0/kernel": (3, 3, 4, 32), "Dense_0/kernel": (512, 512), "Dense_1/kernel": (512, 800)},
        ("iiio", "io", "-"),
    ),
    "as many outputs as a vocabulary": (
        {"wte/embedding": (999, 64), "blocks/0/ff_out/kernel": (256, 64), "ff_out/kernel": (64, 999)},
        ("-", "io", "-"),
    ),
    "as many inner outputs as positions": (
        {"wpe/embedding": (512, 64), "blocks/0/ff_proj/kernel": (64, 512)},
        ("-", "io"),
    ),
    "a noise as a picture": (
        {
            "net/Dense_0/kernel": (128, 24576),
            "net/Conv_0/kernel": (3, 3, 1536, 96),
            "net/Conv_1/kernel": (3, 3, 96, 3),
        },
        ("io", "iiio", "-"),
    ),
    "a module of classification": ({"classification/output_kernel": (2, 64)}, ("-",)),
    "decoders of actions": (
        {"body_0/kernel": (64, 64), "action_decoder/kernel": (64, 32), "out/kernel": (32, 9)},
        ("io", "-", "-"),
    ),
    "outputs with a name of their own": (
        {"decoder/input_proj/kernel": (32, 64), "decoder/spec_out_dense/kernel": (64, 32)},
        ("io", "-"),
    ),
    "the last of a list in a list": (
        {"x/0/f/layers/0/kernel": (8, 64), "x/0/f/layers/1/kernel": (64, 32)},
        ("io", "?"),
    ),
    "a weight in a wrapper": ({"linear_0/weight/args/1": (32, 64)}, ("oi",)),
}


@pytest.mark.parametrize("name", FUSED)
def test_what_layers_beside_a_leaf_take_in(name):
    tree, found = FUSED[name]
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in tree.items()}
    plan = planned(params)
    assert tuple(plan[path] for path in tree) == found


def test_first_answers_of_layers_side_by_side():
    """The parts are offered first; of the last of several numbered layers one matrix."""
    wi = {"layers/0/wi": (64, 608), "layers/0/attn_wo": (64, 64), "layers/0/ff_wo": (256, 64)}
    for tree, answers in (
        (wi, ("i(64+16+16+256+256 o)", "io")),
        ({"attn/wqkv/kernel": (96, 96), "attn/out/kernel": (64, 96)}, ("i(64+16+16 o)", "io")),
        ({"attn_0/linear/w": (64, 192), "attn_0/linear_1/w": (64, 64)}, ("i(3o)", "io")),
        ({"block_0/linear_0/w": (64, 64), "block_0/linear_1/w": (64, 192)}, ("io", "i(3o)")),
        ({"x/query_key_value/kernel": (64, 96), "x/dense/kernel": (64, 64)}, ("i(64+16+16 o)", "io")),
        ({"x/key_proj/kernel": (64, 4, 128), "x/dense/kernel": (64, 64)}, ("ioo", "ibo")),
        ({"x/qkv_proj/kernel": (64, 288), "x/out_proj/kernel": (96, 64)}, ("i(3o)", "io")),
        ({"mlp/wi_kernel": (64, 2, 256), "mlp/scale": (64,)}, ("ibo", "ioo")),
        ({"x/out_kernel": (4, 16, 64), "x/scale": (64,)}, ("iio", "bio")),
        ({"x/q_kernel": (64, 4, 32), "x/scale": (64,), "q/scale": (32,)}, ("ioo", "ibo")),
    ):
        params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in tree.items()}
        row = next(row for row in om.plan(params | {"lm_head/kernel": jnp.ones((64, 9))}) if row.unresolved)
        assert row.answers[:2] == answers


@pytest.mark.parametrize("name", STACKS)
def test_siblings_tell_layers_and_experts(name):
    """Without evidence, or with two answers, the leaf is asked about."""
    tree, spec = STACKS[name]
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in tree.items()}
    assert planned(params)[next(iter(tree))] == spec


def test_leaves_of_one_kind_are_one_question():
    """The paths differ in more than numbers; the pattern matches no other leaf."""
    odd, plain = jnp.ones((2, 3, 4)), jnp.ones((4, 4))
    params = {
        name: {"blocks": [{"odd": {"kernel": odd}, "up": {"kernel": plain}}] * 2} for name in ("one", "two")
    }
    text = str(om.plan(params))
    assert "'*/blocks/*/odd/kernel' (4 leaves) has shape" in text
    assert text.count("Type one of") == 1
    assert "?" not in planned(params, axes={"*/blocks/*/odd/kernel": "bio"}).values()
    text = str(om.plan(params | {"x": {"blocks": [{"odd": {"kernel": plain}}]}}))
    assert r"re.compile(r'^(one|two)/blocks/\d+/odd/kernel$'): 'bio'" in text


def test_an_answer_for_some_numbers_means_no_others():
    """The last of three layers has another answer, and its path differs in a number alone."""
    tree = {f"net/dec_{k}/w": (4, 4, n, 64) for k, n in ((1, 64), (2, 64), (3, 3))}
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in tree.items()}
    text = str(om.plan(params))
    found = planned(params, axes=one_answer(text[text.index("All at once") :]))
    assert [*found.values()] == ["iiio", "iiio", "-"]


def test_an_answer_for_a_name_with_wildcards_means_no_others():
    tree = {"a?/w": (4, 2, 4), "ab/w": (4,), "c[0]/w": (4, 2, 4), "c0/w": (4,)}
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in tree.items()}
    text = str(om.plan(params))
    assert r"axes={re.compile(r'^a\?/w$'): 'bio'}" in text
    found = planned(params, axes=one_answer(text[text.index("All at once") :]))
    assert found == {"a?/w": "ibo", "ab/w": "-", "c[0]/w": "ibo", "c0/w": "-"}


def test_layouts_of_frameworks():
    """Each decides what the default rules ask of a model, or read in another order."""
    gpt2 = {
        "h/0/attn/c_attn/kernel": (48, 16),
        "h/0/attn/c_proj/kernel": (16, 16),
        "h/0/mlp/c_fc/kernel": (64, 16),
        "h/0/mlp/c_proj/kernel": (16, 64),
        "h/0/crossattention/c_attn/kernel": (32, 16),
        "h/0/crossattention/q_attn/kernel": (16, 16),
        "h/0/ln_1/scale": (16,),
        "wte/embedding": (99, 16),
    }
    assert [*by_layout(gpt2, om.layouts.hf_flax_gpt2()).values()] == [
        "(3o)i", "oi", "oi", "oi", "(2o)i", "oi", "-", "-",
    ]  # fmt: skip
    decoder = "params/decoder/layers/"
    maxtext = {
        decoder + "moe_block/wi_0": (128, 48, 2048, 768),
        decoder + "self_attention/query/kernel": (2048, 48, 32, 128),
        decoder + "self_attention/out/kernel": (128, 48, 128, 7168),
        decoder + "mlp/wo/kernel": (48, 48, 1024),
        decoder + "moe_block/gate/kernel": (2048, 48, 8),
        decoder + "moe_block/wi_0_bias": (128, 48, 768),
        decoder + "norm/scale": (2048, 48),
        "params/decoder/logits_dense/kernel": (2048, 9999),
    }
    specs = ["bbio", "iboo", "ibio", "ibo", "-", "-", "-", "-"]
    assert [*by_layout(maxtext, om.layouts.maxtext()).values()] == specs
    one = {path: shape[:1] + shape[2:] if "layers" in path else shape for path, shape in maxtext.items()}
    specs = ["bio", "ioo", "iio", "io", "-", "-", "-", "-"]
    assert [*by_layout(one, om.layouts.maxtext(None)).values()] == specs
    t5 = {"encoder/encoder/attention/query/kernel": (8, 8, 8), "decoder/decoder/mlp/wi_0/kernel": (8, 8, 16)}
    assert {*by_layout(t5, om.layouts.t5x()).values()} == {"ibo"}
    assert {*by_layout(t5, om.layouts.t5x(0)).values()} == {"bio"}
    neox = {"h/0/query_key_value/kernel": (16, 48), "h/0/query_key_value/weight": (48, 16)}
    assert [*by_layout(neox, om.layouts.gpt_neox(4)).values()] == ["i(4~3 o)", "(4~3 o)i"]
    torch = {
        "wq": (16, 16),
        "blocks.0.attn.qkv.weight": (48, 16),
        "conv.kernel": (8, 4, 3, 3),
        "fc1.weight": (64, 16),
        "odd": (3, 4),
        "tok_emb.weight": (99, 16),
        "norm.weight": (16,),
    }
    assert [*by_layout(torch, om.layouts.torch()).values()] == ["oi", "(3o)i", "oiii", "oi", "?", "-", "-"]


LAYOUTS = {
    "T5, layers scanned along the second axis": om.layouts.t5x(),
    "T5, layers one by one": om.layouts.t5x(None),
    "GPT-J, GPT-Neo and BLOOM": om.layouts.gpt_neox(16),
    "Pythia, outputs first": om.layouts.gpt_neox(8),
    "GPT-2, a torch state dict": om.layouts.torch(),
    "DeepSeek and gpt-oss, outputs first": om.layouts.torch(),
    "Llama 4 text, outputs first": om.layouts.torch(),
    "TD-MPC2, outputs first": om.layouts.torch(),
    "HSTU recommender, outputs first": om.layouts.torch(),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_layout_reads_a_public_model_wrongly(name):
    found = planned(shapes(TREES[name]), axes=LAYOUTS[name])
    assert {path: spec for path, spec in found.items() if spec not in TREES[name][path][1]} == {}


def by_layout(tree, axes):
    """Path → spec in the tree's own order."""
    found = planned(
        {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in tree.items()}, axes=axes
    )
    return {path: found[path] for path in tree}


FEEDING = {
    "an autoencoder": (
        "Dense_{}/kernel",
        [(784, 256), (256, 8), (8, 256), (256, 784)],
        ["io", "io", "io", "?"],
    ),
    "of PyTorch": ("fc{}/weight", [(256, 784), (8, 256), (256, 8), (784, 256)], ["oi", "oi", "oi", "?"]),
    "a narrow layer": ("Dense_{}/kernel", [(784, 128), (128, 8), (8, 64), (64, 10)], ["io", "io", "io", "-"]),
    "as many actions as observations": (
        "Dense_{}/kernel",
        [(4, 64), (64, 4), (4, 64), (64, 1)],
        ["io", "-", "io", "-"],
    ),
}


@pytest.mark.parametrize(("name", "sizes", "expected"), FEEDING.values(), ids=FEEDING)
def test_a_layer_of_few_outputs_that_another_takes_in_is_no_head(name, sizes, expected):
    tree = {name.format(k): jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in enumerate(sizes)}
    assert [*planned(tree).values()] == expected


def test_a_layer_of_few_outputs_that_another_module_may_take_in_is_asked_about():
    sizes = {"encoder/Dense_1": (256, 8), "decoder/Dense_0": (8, 256), "decoder/Dense_1": (256, 784)}
    tree = {f"{name}/kernel": jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sizes.items()}
    tree["encoder/Dense_0/kernel"] = jax.ShapeDtypeStruct((784, 256), jnp.float32)
    found = planned(tree)
    assert [found[f"{name}/kernel"] for name in sizes] == ["?", "io", "?"]


def test_tables_of_many_rows_without_a_telling_name():
    tree = {
        f"{name}/weight": jax.ShapeDtypeStruct((50_000, 300), jnp.float32) for name in ("center", "context")
    }
    assert [*planned(tree).values()] == ["-", "-"]


def test_roles_in_rules_know_all_leaves():
    """A head that only widths tell is one for factors and for parts too."""
    params = {
        f"Dense_{k}/kernel": jnp.ones(shape) for k, shape in enumerate([(784, 64), (64, 32), (32, 100)])
    }
    factors = om.scale_by_rules({om.roles("head"): 0.5})
    parts = om.partition({om.roles("head"): "a", "*": "b"}, {"a": optax.scale(0.5), "b": optax.identity()})
    for tx in (factors, parts, optax.chain(om.partition({"*": "b"}, {"b": factors}))):
        found, _ = jax.jit(tx.update)(params, tx.init(params), params)
        assert [float(x.max()) for x in found.values()] == [1.0, 1.0, 0.5]


def test_attention_per_head():
    """Where the shapes give the heads, layers stacked or not; whole matrices elsewhere."""
    tree = {
        "layers/attn/query/kernel": (3, 16, 4, 8),
        "layers/attn/out/kernel": (3, 4, 8, 16),
        "layers/norm/scale": (3, 16),
        "last/attn/query/kernel": (16, 4, 8),
        "last/attn/out/kernel": (32, 16),
        "last/norm/scale": (16,),
    }
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in tree.items()}
    with pytest.warns(match="share an axis of 'last/attn/out/kernel'"):
        axes = om.layouts.per_head(params)
    assert [*by_layout(tree, axes).values()] == ["bibo", "bbio", "-", "ibo", "io", "-"]


def test_latent_attention_per_head():
    """The keys and values of each head apart, by the output projection; the user's rules are kept."""
    tree = {
        "attn/wq_b/kernel": (24, 4, 12),
        "attn/wkv_b/kernel": (16, 4, 14),
        "attn/out/kernel": (4, 6, 32),
        "attn/mine/wq": (32, 4, 8),
        "attn/mine/k": (32, 32),
        "last/kernel": (32, 5),
    }
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in tree.items()}
    rules = {"attn/mine/wq": "ioo", "attn/mine/k": "i(4o)", "last/*": "head"}
    found = by_layout(tree, om.layouts.per_head(params, rules))
    assert [*found.values()] == ["ibo", "ib(8+6 o)", "bio", "ibo", "i(4o)", "-"]


def test_latent_attention_of_stacked_layers_per_head():
    tree = {
        "decoder/layers/self_attention/wkv_b/kernel": (16, 3, 4, 14),
        "decoder/layers/self_attention/out/kernel": (4, 3, 6, 32),
    }
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in tree.items()}
    found = by_layout(tree, om.layouts.per_head(params, om.layouts.maxtext(scan_axis=1)))
    assert [*found.values()] == ["ibb(8+6 o)", "bbio"]


def test_attention_whose_heads_share_an_axis_stays_whole():
    """One warning for all leaves, with what to type; latents have no heads."""
    sizes = {"q_proj": (512, 2304), "kv_a_proj_with_mqa": (512, 576), "kv_b_proj": (512, 3072)}
    params = {
        f"layers/{k}/self_attn/{name}/kernel": jax.ShapeDtypeStruct(shape, jnp.float32)
        for k in range(2)
        for name, shape in {**sizes, "o_proj": (1536, 512)}.items()
    }
    with pytest.warns(match=r"axis of 'layers/\*/self_attn/.*Type.*'i\(12o\)'\} for 12 heads") as found:
        assert om.layouts.per_head(params) == {}
    text = str(found[0].message)
    assert all(f"'layers/*/self_attn/{name}/kernel'" in text for name in ("q_proj", "kv_b_proj", "o_proj"))
    assert len(found) == 1
    assert "kv_a" not in text


def test_questions_name_the_layout():
    for path, shape, layout in (
        ("transformer/h/0/attn/c_attn/kernel", (2304, 768), "hf_flax_gpt2()"),
        ("layers/0/attention/query_key_value/kernel", (768, 2304), "gpt_neox(heads=12)"),
        ("decoder/layers/mlp/wi_0/kernel", (64, 60, 256), "maxtext(scan_axis=1)"),
    ):
        params = {path: jax.ShapeDtypeStruct(shape, jnp.float32)}
        assert f"axes=optimorph.layouts.{layout}" in str(om.plan(params))
        rules = eval(f"om.layouts.{layout}")
        assert om.plan(params, axes=rules)[path].unresolved is None


KINDS = {
    "a layer before the head": ({"pre_logits/kernel": (64, 64), "head/kernel": (64, 10)}, "io"),
    "the last of transposed convolutions, Haiku": ({"decoder/conv2_d_transpose_3/w": (6, 6, 3, 32)}, "-"),
    "GPT-2, inputs first": (
        {"h/0/attn/c_proj/kernel": (64, 64), "h/0/attn/c_attn/kernel": (64, 192)},
        "io",
    ),
    "GPT-2, outputs first": (
        {"h/0/attn/c_proj/kernel": (64, 64), "h/0/attn/c_attn/kernel": (192, 64)},
        "oi",
    ),
    "experts one after the other": (
        {"f/router/weight": (4, 64), "f/experts/mlp/w1": (512, 64), "f/experts/mlp/w2": (512, 64)},
        {"f/experts/mlp/w1": "(4o)i", "f/experts/mlp/w2": "(4i)o"},
    ),
    "one bias for all blocks": ({"hid/kernel": (8, 64, 32), "hid/bias": (256,)}, {"hid/kernel": "bio"}),
    "a window of one channel": ({"up/w": (3, 1, 64), "up/b": (64,)}, {"up/w": "?"}),
    "a transposed square": ({"convt_pre/weight": (32, 32, 16), "convt_pre/bias": (32,)}, "?"),
    "a window of 30": ({"conv1/weight": (30, 80, 16), "conv1/bias": (16,)}, "?"),
    "a layer over tokens": ({"blocks/0/linear_tokens/weight": (196, 196)}, "oi"),
    "pixels": ({"pixel_embed/proj/weight": (24, 3, 7, 7)}, "-"),
    "arrays with indices": ({"blocks/0/linear_up/w[0,0] 64x0e,64x0e": (64, 64)}, "io"),
    "a layer of a prenet": ({"prenet/final_layer/weight": (64, 32), "layers/0/up/weight": (256, 64)}, "oi"),
    "attention's output": ({"layer/0/rel_attn/o": (768, 12, 64)}, "?"),
    "a list of squares": ({"0": (64, 64), "1": (64, 64)}, "?"),
    "a list whose widths fit": ({"0": (32, 64), "1": (64, 64), "2": (64, 9)}, {"0": "io", "1": "io"}),
    "a list of outputs first": ({"0": (64, 32), "1": (64, 64), "2": (9, 64)}, {"0": "oi", "1": "oi"}),
    "a list with biases": ({"0/0": (64, 64), "0/1": (64,), "1/0": (9, 64), "1/1": (9,)}, "oi"),
    "layers of a list": ({"layers/0/base_weight": (64, 32), "layers/1/base_weight": (9, 64)}, "oi"),
    "an array called a weight": ({"in_weight": (64, 32)}, "?"),
    "experts by the model's width": (
        {
            "mlp/gate/weight": (8, 64),
            "mlp/experts/down_proj": (8, 64, 32),
            "mlp/experts/up_proj": (8, 32, 64),
        },
        {"mlp/experts/down_proj": "boi", "mlp/experts/up_proj": "boi"},
    ),
    "experts by the width of norms": (
        {"experts/down_proj": (8, 64, 32), "norm/weight": (64,)},
        {"experts/down_proj": "boi"},
    ),
    "factors of a weight": (
        {"layers/0/weight/a": (64, 4), "layers/0/weight/b": (4, 32)},
        {"layers/0/weight/a": "oi", "layers/0/weight/b": "oi"},
    ),
    "projections called heads": (
        {"layer/query_head/linear/kernel": (64, 64), "layer/value_head/linear/kernel": (64, 64)},
        {"layer/query_head/linear/kernel": "io", "layer/value_head/linear/kernel": "io"},
    ),
    "a head of values": ({"value_head/linear/kernel": (64, 64)}, "-"),
    "a square in a head of more outputs": ({"lm_head/dense/kernel": (64, 64), "lm_head/bias": (512,)}, "io"),
    "a projection of an embedding": (
        {"field_embedding/weight": (64, 16), "field_embedding/bias": (64,), "embedding/weight": (99, 16)},
        "oi",
    ),
    "a wrapped layer": (
        {"head/mlp/0/layer/kernel": (32, 64), "head/linear/layer/kernel": (64, 9)},
        {"head/mlp/0/layer/kernel": "io", "head/linear/layer/kernel": "-"},
    ),
    "gates": ({"rssm/gru_x_linear/kernel": (64, 192)}, "?"),
    "gates of hidden states": (
        {"lstm/cell/kernel": (32, 256), "lstm/cell/recurrent_kernel": (64, 256), "h2h/weight": (192, 64)},
        {"lstm/cell/kernel": "i(4o)", "lstm/cell/recurrent_kernel": "i(4o)", "h2h/weight": "(3o)i"},
    ),
    "a convolution to a picture": ({"decoder/layers_3/kernel": (4, 4, 96, 3)}, "-"),
    "a transposed convolution by its module": ({"deconv/0/conv/kernel": (5, 64, 64)}, "?"),
    "no convolution": ({"audio/conv_out/kernel": (768, 64)}, "io"),
    "fixed frequencies": ({"pe_layer/gaussian_matrix": (2, 64)}, "-"),
    "values of an agent": ({"value/out/kernel": (64, 51)}, "-"),
    "queries and keys": ({"attn/qk/weight": (128, 64)}, "(2o)i"),
    "the last projection of a decoder": ({"decoder/season_projection/weight": (9, 64)}, "?"),
}

FIRST_ANSWERS = {
    "modulation": ({"block_0/ada_proj/kernel": (64, 384)}, "i(6o)"),
    "modulation, outputs first": ({"blocks/0/ada_lin/1/weight": (384, 64)}, "(6o)i"),
    "an array in a tree of kernels": ({"in_weight": (64, 32), "x/kernel": (64, 64)}, "io"),
    "an array in a tree of weights": ({"in_weight": (64, 32), "x/weight": (64, 64)}, "oi"),
    "a list of outputs first with tables": (
        {"2": (256, 64), "0": (9, 64), "1": (64, 64), "3": (64, 256), "4": (9, 64)},
        "oi",
    ),
    "gate and input of experts": (
        {
            "mlp/experts/gate_up_proj": (8, 64, 64),
            "mlp/gate/weight": (8, 64),
            "mlp/experts/down_proj": (8, 64, 32),
        },
        "b(2o)i",
    ),
    "keys and values across": ({"h/0/crossattention/c_attn/kernel": (128, 64)}, "(2o)i"),
    "a transposed convolution of PyTorch": ({"decoder/upsampler/0/weight": (64, 32, 16)}, "ioi"),
    "the first layer of two": (
        {"x/fc_in/kernel": (64, 256), "x/fc_out/kernel": (128, 64), "y/down/kernel": (256, 64)},
        "i(2o)",
    ),
    "a flat name": ({"layers/attn_wout": (6, 4, 16, 64), "layers/norm": (6, 64)}, "biio"),
    "a form for each pair": ({"pn/kernel": (16, 741, 16)}, "ibo"),
}


@pytest.mark.parametrize("name", FIRST_ANSWERS)
def test_first_answers_by_what_is_beside_a_leaf(name):
    tree, answer = FIRST_ANSWERS[name]
    plan = om.plan({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in tree.items()})
    row = plan[next(iter(tree))]
    assert row.unresolved
    assert row.answers[0] == answer


@pytest.mark.parametrize("name", KINDS)
def test_kinds_that_were_read_wrongly(name):
    params, expected = KINDS[name]
    found = planned({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in params.items()})
    expected = {next(iter(params)): expected} if isinstance(expected, str) else expected
    assert {path: found[path] for path in expected} == expected


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        (
            {
                "attention/query": (1024, 24, 16, 64),
                "attention/out": (16, 24, 64, 1024),
                "mlp/wi_0": (1024, 24, 2816),
                "mlp/wo": (2816, 24, 1024),
            },
            ["iboo", "ibio", "ibo", "ibo"],
        ),
        (
            {
                "attention/query": (768, 12, 768),
                "attention/out": (768, 12, 768),
                "mlp/wi_0": (768, 12, 2048),
                "mlp/wo": (2048, 12, 768),
            },
            ["ibo"] * 4,
        ),
        (
            {
                "attention/query": (24, 1024, 16, 64),
                "attention/out": (24, 16, 64, 1024),
                "mlp/wi_0": (24, 1024, 2816),
                "mlp/wo": (24, 2816, 1024),
            },
            ["bioo", "biio", "bio", "bio"],
        ),
    ],
)
def test_the_axis_that_all_leaves_share_is_offered_first(leaves, expected):
    """No norm and no bias tells which axis counts the layers."""
    params = {
        f"encoder/encoder/{name}/kernel": jax.ShapeDtypeStruct(n, jnp.float32) for name, n in leaves.items()
    }
    plan = om.plan(params)
    assert [plan[path].answers[0] for path in params] == expected
    layout = "layouts.t5x(scan_axis=1)" in str(plan["encoder/encoder/mlp/wo/kernel"].unresolved)
    assert layout == (expected[-1] == "ibo")


def test_a_long_rule_is_written_once_in_a_question():
    name = "/".join(["a_long_name_of_a_module"] * 3)
    leaf, plain = jnp.ones((2, 3, 4)), jnp.ones((4, 4))
    params = {f"{name}/{way}/{x}/odd/kernel": leaf for way in ("in", "out") for x in ("one", "two")}
    params[f"{name}/other/odd/kernel"] = plain
    text = str(om.plan(params))
    rule = rf"^{name}/(in/one|in/two|out/one|out/two)/odd/kernel$"
    assert text.count(rule) == 1
    assert f"  leaves = re.compile(r'{rule}')\n  axes={{leaves: 'bio'}}  #" in text
    assert [*planned(params, axes={re.compile(rule): "bio"}).values()].count("bio") == 4
