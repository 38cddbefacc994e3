"""Which leaf goes where: rules, the default names, partition and masks, in any tree."""

import dataclasses
import re
import warnings
from contextlib import nullcontext
from typing import NamedTuple

import catalog
import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
from flax import nnx
from flax.core import FrozenDict

import optimorph as om
from optimorph._core.paths import by_path, leaf_paths
from optimorph._routing.name_rule import UNDECIDED
from optimorph._routing.names import by_name
from optimorph.probes import SPECTRAL, probe


def specs(params, axes=None):
    """Path → spec, of the matrices."""
    return {row.path: row.spec for row in om.plan(params, axes=axes) if row.spec is not None}


TREE = {
    "embed": {"table": jnp.ones((8, 4))},
    "blocks": [{"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)} for _ in range(2)],
    "last": {"kernel": jnp.ones((4, 6))},
}


def test_first_rule_wins_and_the_rest_falls_to_the_names():
    assert specs(TREE) == {"blocks/0/kernel": "io", "blocks/1/kernel": "io", "last/kernel": "io"}
    assert specs(TREE, {"blocks/0/*": None, "*/kernel": "oi"}) == {
        "blocks/1/kernel": "oi",
        "last/kernel": "oi",
    }
    assert specs(TREE, {"*/kernel": "oi", "blocks/0/*": None})["blocks/0/kernel"] == "oi"


def test_patterns_may_be_regular_expressions():
    found = specs(TREE, {re.compile(r"^blocks/\d+/k"): None, re.compile("last"): "oi"})
    assert found == {"last/kernel": "oi"}


def test_rules_may_be_a_function():
    found = specs(TREE, lambda path, shape: "oi" if shape == (8, 4) else None)
    assert found == {"embed/table": "oi"}
    assert specs(TREE, lambda path, shape: om.linalg.Axes("oi") if "last" in path else None) == {
        "last/kernel": "oi"
    }


def test_rules_may_be_a_tree():
    tree = jax.tree.map(lambda x: None if x.ndim < 2 else "oi", TREE)
    tree["last"]["kernel"] = None
    assert specs(TREE, tree) == {"embed/table": "oi", "blocks/0/kernel": "oi", "blocks/1/kernel": "oi"}
    assert specs({"w": jnp.ones((2, 3)), "v": jnp.ones((2, 3))}, {"w": "oi", "v": None}) == {"w": "oi"}


def test_rules_may_be_a_callable_module_of_specs():
    model = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_array)
    rules = jax.tree.map(lambda x: "io" if x.ndim == 2 else None, params)
    assert specs(params, rules) == {"layers/0/weight": "io", "layers/1/weight": "io"}


def test_a_bare_spec_is_refused():
    with pytest.raises(ValueError, match=r"muon: axes must map patterns .* to specs.* axes=\{'\*': 'io'\}"):
        om.muon(0.1, axes="io")


def test_all_undecided_leaves_are_listed_at_init():
    params = {
        "a": jnp.ones((2, 3, 4)),
        "b": {"weight": jnp.ones((2, 3, 4))},
        "c": {"kernel": jnp.ones((2, 3))},
    }
    with pytest.raises(ValueError, match="no rule says") as error:
        om.muon(0.1).init(params)
    message = str(error.value)
    for words in ("muon: 'a' has shape (2, 3, 4)", "axes={'a': 'bio'}", "axes={'b/weight': 'boi'}", "None}"):
        assert words in message
    assert "'c'" not in message
    om.muon(0.1, axes={"a": "bio", "b/*": None}).init(params)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("io", ["'w'", "(2, 3, 4)", "describes 2 axes, not 3", "axes={'w': 'bio'}"]),
        ("b(5i)o", ["'w'", "(2, 3, 4)", "an axis of 3 does not divide"]),
        ("bxo", ["'w'", "(2, 3, 4)", "'bxo' does not describe a matrix", "axes={'w': 'bio'}"]),
        (True, ["'w'", "(2, 3, 4)", "True is not a spec", "axes={'w': 'bio'}"]),
        (["i", "o"], ["'w'", "['i', 'o'] is not a spec"]),
        ("b(99999999999o)i", ["'w'", "does not describe a matrix"]),
    ],
)
def test_bad_specs_name_the_leaf_its_shape_and_one_that_fits(spec, words):
    with pytest.raises(ValueError, match="muon") as error:
        om.muon(0.1, axes={"w*": spec}).init({"w": jnp.ones((2, 3, 4))})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["orthogonalize", "scale_by_shape"])
def test_the_transforms_take_the_same_rules(name):
    tx = getattr(om, name)(axes={"*": "io"})
    with pytest.raises(ValueError, match=f"{name}: 'w' has shape"):
        tx.init({"w": jnp.ones(3)})
    tx = getattr(om, name)(axes={"w": None, "*": "oi"})
    params = {"w": jnp.ones(3), "m": jnp.ones((4, 1))}
    updates, _ = tx.update(params, tx.init(params))
    np.testing.assert_array_equal(updates["w"], params["w"])
    assert bool(jnp.any(updates["m"] != params["m"]))


NAMES = {
    # path, shape → spec; None is no matrix
    ("attn/heads/query/kernel", (8, 2, 4)): "ioo",
    ("multi_head/kernel", (8, 8)): "io",
    ("embedding_model/layers/0/kernel", (8, 8)): "io",
    ("normalized/kernel", (8, 8)): "io",
    ("blocks/ln1/weight", (3, 8)): None,
    ("blocks/b1", (3, 8)): None,
    ("lm_head/kernel", (8, 11)): None,
    ("LMHead_0/kernel", (8, 11)): None,
    ("head/fc/kernel", (8, 11)): None,
    ("value_head/kernel", (8, 1)): None,
    ("relpos_bias/rel_embedding", (32, 4)): None,
    ("layers/A_log", (3, 8)): None,
    ("lora_b", (2, 8)): "io",
    ("lora_A/weight", (2, 8)): "oi",
    ("attn/qkv/kernel", (8, 3, 2, 4)): "iboo",
    ("attn/qkv/kernel", (8, 16)): UNDECIDED,
    ("attn/qkv/weight", (24, 8)): "(3o)i",
    ("cell/weight_hh", (12, 4)): "(3o)i",
    ("lstm/weight_hh", (16, 4)): "(4o)i",
    ("layers/conv/kernel", (3, 3, 8, 16)): UNDECIDED,
    ("layers/0/conv/kernel", (3, 3, 8, 16)): "iiio",
    ("layers/attn/query/kernel", (4, 8, 8)): "bio",
    ("ScanBlock_0/attn/query/kernel", (4, 8, 8)): "bio",
    ("ScanBlock_0/Dense_0/kernel", (8, 8)): "io",
    ("layers/pre/weight", (4, 8)): UNDECIDED,
    ("layers/kernel", (4, 8)): "io",
    ("layers/experts/wi", (2, 4, 8, 16)): "bbio",
    ("moe/experts/weight", (4, 16, 8)): "boi",
    ("decoder/layers/mlp/wi_0/kernel", (64, 3, 128)): "ibo",
    ("decoder/layers/mlp/wi_0/kernel", (3, 64, 128)): "bio",
    ("decoder/layers_0/mlp/wi_0/kernel", (64, 128)): "io",
    ("depthwise/weight", (8, 1, 3, 3)): None,
    ("conv/weight", (8, 4, 3)): "oii",
    ("kernel", (1, 8)): None,
    ("anything", (4, 8)): UNDECIDED,
    ("item_factors", (50000, 32)): UNDECIDED,
    ("hash_bucket_1/weights", (10000, 16)): UNDECIDED,
    ("sparse_features/user_id", (100000, 32)): UNDECIDED,
    ("", (4, 8)): "io",  # no name at all
    ("0", (4, 8)): "?",  # in a list
    ("layers/3/attn/kv_a", (7168, 512)): "io",
    ("layers/3/mlp/ws_up", (7168, 2048)): "io",
    ("emb_l/0/weight", (1000, 16)): None,
    ("embeddings/user_id/weight", (1000, 16)): None,
    ("tables/country/weight", (200, 16)): None,
    ("quantizer/codevectors", (1, 640, 128)): None,
    ("x_embedder/proj/kernel", (2, 2, 4, 1152)): None,
    (
        "transformer/h/0/attn/c_proj/kernel",
        (768, 768),
    ): UNDECIDED,  # outputs come first in Hugging Face's Flax
    ("transformer/h/0/mlp/c_fc/kernel", (3072, 768)): UNDECIDED,
    ("transformer/h/0/mlp/c_fc/kernel", (768, 3072)): "io",
    ("cls/seq_relationship/kernel", (768, 2)): None,
    ("action_out_proj/kernel", (1024, 32)): None,
    ("conv_out/kernel", (3, 3, 320, 4)): None,
    ("out_conv/kernel", (1, 1, 64, 3)): None,
    ("final_conv/weight", (3, 64, 1, 1)): None,
    ("to_rgb/kernel", (1, 1, 64, 3)): None,
    ("dec/imgout/kernel", (5, 5, 128, 3)): None,
    ("down_blocks_0/resnets_0/conv_out/kernel", (3, 3, 320, 320)): "iiio",
    ("down_blocks_0/attentions_0/proj_in/kernel", (1, 1, 320, 320)): "iiio",
    ("ff/net_0/proj/kernel", (320, 2560)): "i(2o)",
    ("ff/net_0/proj/kernel", (320, 1280)): "io",
    ("blocks_0/adaLN_modulation/Dense_0/kernel", (1152, 6912)): UNDECIDED,
    ("params/decoder/layers/layer_0/mlp/shared_expert/wo/kernel", (512, 12, 2048)): "ibo",
    ("params/decoder/layers/layer_0/mlp/routed_experts/gate/kernel", (2048, 12, 512)): UNDECIDED,
    ("params/decoder/layers_0/mhc_attention/res_beta", (4, 4)): None,
    ("RWKVBlock_0/time_faaaa", (12, 64)): None,
    ("Dense_0/kernel", (768, 65536)): None,
    ("Dense_0/kernel", (100, 6272)): "io",
    ("Dense_2/kernel", (256, 6)): None,
    ("actor_params/Dense_0/kernel", (512, 6)): None,
    ("fc2/weight", (10, 256)): None,
    ("Dense_1/kernel", (256, 64)): "io",
    ("anything", (2, 4, 8)): UNDECIDED,
    ("decoder/layers/attention/out/kernel", (3, 4, 4, 16)): "biio",
    ("encoder/layers/Conv_0/kernel", (7, 5, 64)): UNDECIDED,
    ("decoder/layers/dt_proj/kernel", (48, 32, 1024)): UNDECIDED,
    ("layers/0/attn/kv_einsum/w", (2, 4, 2048, 256)): "boio",
    ("attn/kv/kernel", (16, 2, 4, 4)): UNDECIDED,
    ("attn/in_proj/kernel", (16, 3, 4, 4)): UNDECIDED,
    ("mlp/w1", (12, 8, 16, 64)): UNDECIDED,
    ("attn/qkv/kernel", (16, 4, 3, 4)): "iobo",
    ("attn/qkv/kernel", (16, 3, 4, 4)): "iboo",
    ("attn/qkv/kernel", (16, 3, 3, 4)): UNDECIDED,
    ("tok_emb/weight", (11, 16)): None,
    ("token_emb", (11, 16)): None,
    ("emb/weight", (11, 16)): None,
    ("label_emb", (11, 16)): None,
    ("pos_enc", (11, 16)): None,
    ("positional_encoding", (11, 16)): None,
    ("pe", (11, 16)): None,
    ("W_E", (11, 16)): None,
    ("W_pos", (11, 16)): None,
    ("rel_pos_h", (11, 16)): None,
    ("vocab/weight", (11, 16)): None,
    ("lookup/table", (11, 16)): None,
    ("word_vectors", (11, 16)): None,
    ("relative_attention_bias/weight", (11, 16)): None,
    ("wte/weight", (11, 16)): None,
    ("wpe", (11, 16)): None,
    ("codebook", (11, 16)): None,
    ("output/weight", (16, 11)): None,
    ("output/kernel", (16, 11)): None,
    ("out/kernel", (16, 11)): None,
    ("heads/0/kernel", (16, 11)): None,
    ("qa_outputs/kernel", (16, 11)): None,
    ("W_U", (16, 11)): None,
    ("head/layers/2/kernel", (16, 11)): None,
    ("unembed", (16, 11)): None,
    ("params/out/kernel", (16, 11)): None,
    ("blocks/seq/layers/0/weight", (3, 16)): UNDECIDED,
    ("layers/attn_norm", (12, 16)): None,
    ("layers/ffn_norm", (12, 16)): None,
    ("rms_att_weight", (12, 16)): None,
    ("input_layernorm", (12, 16)): None,
    ("norm/w", (12, 16)): None,
    ("h/ln_1/w", (12, 16)): None,
    ("h/rms/weight", (12, 16)): None,
    ("h/rms", (12, 16)): None,
    ("norm_weights", (12, 16)): None,
    ("ls1", (12, 16)): None,
    ("moe/ln/w", (12, 16)): None,
    ("moe/norms", (12, 16)): None,
    ("scan/w_norm", (12, 16)): None,
    ("batch_stats/norm/mean", (12, 16)): None,
    ("moe/experts/gate/kernel", (8, 16, 64)): "bio",
    ("experts/0/gate/kernel", (16, 64)): "io",
    ("MoEBlock_0/mlp/gate/kernel", (16, 64)): "io",
    ("expert_mlp/gate/kernel", (16, 64)): "io",
    ("moe/gate", (16, 8)): None,
    ("moe/w_gate", (16, 8)): None,
    ("moe/wg", (16, 8)): None,
    ("moe/gating/kernel", (16, 8)): None,
    ("mlp/switch/kernel", (16, 8)): None,
    ("params/decoder/moe_layers_0/self_attention/wq_b/kernel", (1536, 128, 192)): "ioo",
    ("MoEBlock_0/attn/DenseGeneral_0/kernel", (16, 4, 4)): UNDECIDED,
    ("MoEBlock_0/MultiHeadDotProductAttention_0/query/kernel", (16, 4, 4)): "ioo",
    ("MoEBlock_0/MultiHeadDotProductAttention_0/out/kernel", (4, 4, 16)): "iio",
    ("q_lora/a", (16, 2)): "io",
    ("q_lora/b", (2, 16)): "io",
    ("adapter/A", (16, 2)): "io",
    ("lora/wq/B", (2, 16)): "io",
    ("lora_params/blocks/0/q/b", (2, 16)): "io",
    ("ssm/B", (16, 2)): UNDECIDED,
    ("cell/g", (16, 16)): UNDECIDED,
    ("ctscan_encoder/Conv_0/kernel", (3, 3, 8, 16)): "iiio",
    ("ScanTransformer_0/patchify/Conv_0/kernel", (3, 3, 8, 16)): UNDECIDED,
    ("attn/Wqkv", (16, 48)): "i(3o)",
    ("attn/qkv_w", (16, 48)): "i(3o)",
    ("in_proj_weight", (48, 16)): "(3o)i",
    ("MultiHead_0/Head_0/key/kernel", (16, 4)): "io",
    ("sa_head/key/kernel", (16, 4)): "io",
    ("ConvBlock_0/Dense_0/kernel", (8, 4)): "io",
    ("convnext_block/pw1/kernel", (8, 4)): "io",
    ("blocks/mlp/layers/0/weight", (3, 64, 16)): "boi",
    ("layers/mlp/layers/0/kernel", (3, 16, 64)): "bio",
    ("mlp/layers/0/kernel", (16, 64)): "io",
    ("layers/layers/0/kernel", (16, 64)): "io",
    ("layers/layers/0/weight", (16, 64)): "oi",
    ("cell/weight_ih", (64, 8)): UNDECIDED,
    ("cell/weight_hh", (64, 16)): "(4o)i",
    ("h/0/mlp/c_fc/kernel", (16, 64)): "io",
    ("stem/kernel", (3, 3, 3, 16)): "iiio",
    ("layers/0/weight", (16, 8, 3, 3)): "oiii",
    ("unet/down/0/conv1/kernel", (3, 3, 8, 16)): "iiio",
    ("value_head/kernel", (8, 4)): None,
    ("lora_A/kernel", (8, 2)): "io",
    ("conv/block/weight", (8, 1, 3)): None,
    ("MoeBlock_0/wo", (4, 8, 16)): "bio",
    ("decoder/layers/self_attention/qkv_proj/kernel", (64, 2, 3, 4, 16)): "ibboo",
    ("decoder/scanned_blocks/mlp/wo/kernel", (64, 2, 16)): "ibo",
    ("layers/stacked/moe/experts/w1/weight", (2, 4, 8, 16)): "bbio",
    ("Dense_0/kernel", (16, 11)): "io",
    ("x/kernel", (3, 3, 3, 8, 16)): "iiiio",
    ("x/weight", (16, 8, 3, 3, 3)): "oiiii",
    ("conv1_d_transpose/w", (5, 6, 4)): "ioi",
    ("conv/weight", (8, 4, 3, 3)): "oiii",
    ("conv/weight", (8, 4, 3, 3, 3)): "oiiii",
    ("transformer/layers/blocks/0/q_proj/weight", (4, 2, 8, 16)): "oooi",
    ("transformer/layers/blocks/0/k_proj/weight", (4, 8, 16)): "ooi",
    ("transformer/layers/blocks/0/o_proj/weight", (16, 4, 8)): "oii",
    ("attn/o_proj/kernel", (4, 4, 16)): "iio",
    ("mha/out_proj/kernel", (4, 4, 16)): "iio",
    ("msa/c_proj/kernel", (16, 16)): "io",
    ("x/gamma", (3, 8)): None,
    ("x/beta", (3, 8)): None,
    ("ln_1/gain", (3, 8)): None,
    ("patch_embed/proj/conv/kernel", (4, 4, 3, 8)): None,
    ("dec/pos_embed", (16, 8)): None,
    ("decoder/layers/self_attention/wkv_b/kernel", (64, 2, 4, 16)): "iboo",
    # stacks that no name says, told from heads and windows by their sizes
    ("h/attn/q_proj/kernel", (12, 768, 768)): UNDECIDED,
    ("h/attn/q_proj/kernel", (768, 12, 64)): "ioo",
    ("h/attn/query/kernel", (768, 12, 64)): "ioo",
    ("self_attn/query/kernel", (12, 768, 12, 64)): UNDECIDED,
    ("self_attn/query/kernel", (12, 768, 768)): UNDECIDED,
    ("layers/attn/query/kernel", (768, 12, 64)): UNDECIDED,
    ("transformer/attn/out/kernel", (12, 768, 768)): UNDECIDED,
    ("transformer/attn/out/kernel", (3, 768, 768)): UNDECIDED,
    ("transformer/attn/out/kernel", (3, 512, 768)): UNDECIDED,
    ("transformer/attn/out/kernel", (12, 64, 768)): "iio",
    ("transformer/attn/out/kernel", (1, 64, 64)): "iio",
    ("self_attn/out/kernel", (12, 12, 64, 768)): UNDECIDED,
    ("h/conv/kernel", (12, 5, 256, 256)): UNDECIDED,
    ("h/conv/kernel", (12, 3, 3, 256, 256)): UNDECIDED,
    ("layers/conv/kernel", (12, 3, 256, 256)): "biio",
    ("conv/kernel", (7, 1, 8, 16)): "iiio",
    ("conv/kernel", (1, 3, 3, 8, 16)): "iiiio",
    ("h/ff/up/kernel", (12, 8, 768, 3072)): UNDECIDED,
    ("h/ff/up/kernel", (8, 8, 768, 3072)): UNDECIDED,
    ("h/up/kernel", (12, 8, 768, 3072)): UNDECIDED,
    ("h/up/kernel", (12, 1, 768, 3072)): UNDECIDED,
    ("h/up/weight", (12, 768, 8, 4)): UNDECIDED,
    ("ConvAttention_0/query/kernel", (384, 6, 64)): "ioo",
    ("ConvBlock_0/proj/kernel", (384, 6, 64)): UNDECIDED,
    ("ConvBlock_0/proj/kernel", (12, 64, 64)): UNDECIDED,
    ("ConvBlock_0/proj/kernel", (3, 3, 64, 64)): "iiio",
    ("h/conv1d/kernel", (384, 6, 64)): UNDECIDED,
    # MaxText, whose layers are the second axis where the sizes say so
    ("decoder/layers/mlp_local/wi_0/kernel", (3584, 21, 14336)): "ibo",
    ("decoder/layers/mlp_global/wo/kernel", (14336, 21, 3584)): "ibo",
    ("decoder/layers/self_attention_local/query/kernel", (3584, 21, 16, 256)): "iboo",
    ("decoder/layers/self_attention_global/out/kernel", (16, 21, 256, 4096)): "ibio",
    ("decoder/layers/self_attention_global/out/kernel", (16, 21, 256, 3584)): "ibio",
    ("decoder/layers/self_attention/out/kernel", (28, 16, 128, 1024)): UNDECIDED,
    ("decoder/layers/self_attention/out/kernel", (28, 16, 128, 2048)): "biio",
    ("decoder/layers/mlp/wi_0/kernel", (48, 48, 1024)): UNDECIDED,
    ("decoder/moe_layers/shared_experts/wi_0/kernel", (48, 32, 1024)): UNDECIDED,
    ("decoder/layers/self_attention/query/kernel", (48, 32, 4, 16)): UNDECIDED,
    ("decoder/layers/self_attention/query/kernel", (4, 64, 4, 16)): "bioo",
    ("decoder/layers/other/kernel", (4096, 32, 4096)): UNDECIDED,
    ("layers/dt_proj/kernel", (48, 32, 1024)): "bio",
    # heads
    ("logitdense/kernel", (16, 64)): None,
    ("decoder/logitdense/kernel", (16, 64)): None,
    ("decoder/out/kernel", (16, 64)): None,
    ("params/decoder/out/kernel", (16, 64)): None,
    ("decoder/output_projection/kernel", (16, 64)): None,
    ("transformer/output/kernel", (16, 64)): None,
    ("gpt/readout/kernel", (16, 64)): None,
    ("fc_out/kernel", (16, 64)): None,
    ("model/proj_out/kernel", (16, 64)): None,
    ("final_proj/kernel", (16, 64)): None,
    ("final_layer/linear/weight", (64, 16)): None,
    ("score/weight", (3, 16)): None,
    ("cls/predictions/decoder/kernel", (16, 64)): None,
    ("fc/weight", (64, 16)): None,
    ("mlp/out/kernel", (64, 16)): "io",
    ("blocks/0/out/kernel", (64, 16)): "io",
    ("block/out/kernel", (64, 16)): "io",
    ("mlp/fc_out/kernel", (64, 16)): "io",
    ("attn/out/kernel", (16, 16)): "io",
    ("attention/output/kernel", (16, 16)): "io",
    ("blocks/0/attn/proj_out/kernel", (16, 16)): "io",
    ("fc1/weight", (64, 16)): "oi",
    ("layers/0/heads/0/wq", (16, 64)): "io",
    ("mixer/out_heads/kernel", (16, 64)): "io",
    # embeddings
    ("shared/pytree/0/weight", (64, 16)): None,
    ("shared/weight", (64, 16)): None,
    ("tok/weight", (64, 16)): None,
    ("token/weight", (64, 16)): None,
    ("tokens/weight", (64, 16)): None,
    ("position/weight", (64, 16)): None,
    ("positions/weight", (64, 16)): None,
    ("segment/weight", (2, 16)): None,
    ("positions", (64, 16)): None,
    ("posemb", (64, 16)): None,
    ("abs_pos", (64, 16)): None,
    ("latents", (64, 16)): None,
    ("object_queries", (64, 16)): None,
    ("prompt", (64, 16)): None,
    ("label_table", (64, 16)): None,
    ("attn/queries/weight", (64, 16)): "oi",
    ("time_emb_proj/kernel", (16, 64)): "io",
    ("lookup_proj/kernel", (16, 64)): "io",
    ("relative_attention/w", (16, 64)): "io",
    ("relative_position_bias/w", (32, 4)): None,
    ("patch_embed_proj/kernel", (48, 16)): None,
    # biases, routers, norms, vectors
    ("experts/b1", (8, 2048)): None,
    ("moe/b1", (8, 2048)): None,
    ("moe/experts/b_up", (8, 2048)): None,
    ("layers/moe/experts/b_up", (12, 8, 2048)): None,
    ("MoE_0/b2", (8, 2048)): None,
    ("layers/mlp/b_up", (12, 2048)): None,
    ("layers/0/ssm/B", (16, 4)): UNDECIDED,
    ("layers/ssm/B", (12, 16, 4)): UNDECIDED,
    ("experts/gate/kernel", (2048, 8)): None,
    ("moe/gate_0/kernel", (2048, 8)): None,
    ("moe/Gate_0/Dense_0/kernel", (2048, 8)): None,
    ("moe/Dense_0/kernel", (2048, 8)): None,
    ("moe/Dense_0/kernel", (2048, 4096)): "io",
    ("moe/gate/kernel", (8, 64, 256)): UNDECIDED,
    ("mlp/gate/kernel", (2048, 64)): None,
    ("mlp/gate/weight", (64, 2048)): None,
    ("layers/mlp/gate/kernel", (12, 2048, 64)): None,
    ("mlp/gate/kernel", (2048, 5632)): "io",
    ("mlp/gate/weight", (5632, 2048)): "oi",
    ("layers/mlp/gate/kernel", (12, 2048, 5632)): "bio",
    ("norm_proj/w", (16, 64)): "io",
    ("blocks/norm_mlp/w", (12, 64)): UNDECIDED,
    ("pre_norm_mlp/w", (16, 64)): UNDECIDED,
    ("pre_norm_mlp/kernel", (16, 64)): "io",
    ("blocks/w0", (12, 16)): UNDECIDED,
    ("h/alpha", (12, 16)): None,
    ("blocks/time_decay", (12, 16)): None,
    # any other name
    ("", (3, 4)): "io",
    ("transformer.wte.weight", (64, 16)): None,
    ("lm_head.weight", (64, 16)): None,
    ("layers.0.mlp.up.weight", (64, 16)): "oi",
    ("layers.mlp.up.kernel", (12, 16, 64)): "bio",
    ("query_key_value/kernel", (16, 48)): UNDECIDED,
    ("query_key_value/weight", (48, 16)): UNDECIDED,
    ("rnn/cell/dense_i/kernel", (16, 64)): UNDECIDED,
    ("rnn/cell/dense_h/kernel", (16, 64)): "i(4o)",
    ("rnn/cell/dense_h/kernel", (16, 48)): "i(3o)",
    ("rnn/cell/dense_h/kernel", (16, 16)): "io",
    ("transformer/blocks/stacked/attn/c_attn/weight", (12, 3, 12, 64, 768)): "bbooi",
    ("transformer/blocks/blocks/0/attn/c_attn/weight", (3, 12, 64, 768)): "booi",
    ("transformer/blocks/stacked/attn/c_proj/weight", (12, 768, 12, 64)): "boii",
    ("transformer/blocks/stacked/mlp/c_proj/weight", (12, 768, 3072)): "boi",
}


@pytest.mark.parametrize(("path", "shape"), NAMES, ids=[f"{path} {shape}" for path, shape in NAMES])
def test_what_names_say(path, shape):
    assert by_name(path, shape)[1] == NAMES[path, shape]


@pytest.mark.parametrize("path", dict.fromkeys(path for path, _ in NAMES))
def test_names_say_something_of_any_shape_and_by_any_number(path):
    for shape in [(), (3,), (0, 4), (2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 4, 5, 6), (2,) * 6]:
        role, spec = by_name(path, shape)
        assert role
        assert spec in (None, UNDECIDED) or om.linalg.Axes(spec).ndim == len(shape)
        assert by_name(re.sub(r"\d+", "17", path), shape) == (role, spec)


def test_names_may_have_several_lines():
    assert by_name("a name\nof two lines/kernel", (4, 3)) == ("dense", "io")


@dataclasses.dataclass
class Data:
    kernel: jax.Array
    bias: jax.Array


jax.tree_util.register_dataclass(Data, ["kernel", "bias"], [])


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 11, rngs=rngs)


KERNEL, BIAS = jnp.ones((4, 3)), jnp.zeros(3)
TREES = {
    "dict": {"hidden": {"kernel": KERNEL, "bias": BIAS}},
    "frozen dict": FrozenDict({"hidden": {"kernel": KERNEL, "bias": BIAS}}),
    "dataclass": {"hidden": Data(KERNEL, BIAS)},
    "tuples": ((KERNEL, BIAS),),
    "nnx state": nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param),
    "nnx pure dict": nnx.to_pure_dict(nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param)),
    "equinox": eqx.filter(eqx.nn.MLP(4, 3, 4, 0, key=jax.random.key(0)), eqx.is_array),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_any_tree_under_jit_and_eval_shape(tree):
    tx = om.muon(0.02)
    state = jax.jit(tx.init)(tree)
    chex.assert_trees_all_equal_structs(state, jax.eval_shape(tx.init, tree))
    updates, _ = jax.jit(tx.update)(tree, state, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree)
    assert len(specs(tree)) == len([leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 2])
    assert specs(tree) == specs(jax.eval_shape(lambda: tree))


def test_boxes_are_no_part_of_a_name():
    class Box:
        def __init__(self, inside):
            self.inside = inside

    jax.tree_util.register_pytree_node(Box, lambda box: ((box.inside,), None), lambda _, x: Box(*x))
    tree = {"embed": {"weight": Box(jnp.ones((4, 3)))}}
    assert leaf_paths(tree) == ["embed/weight"]
    assert leaf_paths(nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))) == ["bias", "kernel"]

    class Named(NamedTuple):
        data_array: jax.Array

    class Variable(NamedTuple):
        value: Named

    penzai = {"mlp/out.weights": Variable(Named(jnp.ones((4, 3))))}
    assert leaf_paths(penzai) == ["mlp/out.weights"]


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


def test_the_state_is_made_inside_nnx_jit():
    model = Nnx(nnx.Rngs(0))

    @nnx.jit
    def make(model):
        return om.partition(
            {"embed/*": "off", "*": "on"}, {"off": optax.set_to_zero(), "on": om.adam(0.1)}
        ).init(nnx.state(model, nnx.Param))

    held = {path.split("average/")[-1] for path in leaf_paths(make(model))}
    assert "head/kernel" in held
    assert "embed/embedding" not in held


def test_a_mask_may_be_a_callable_module():
    """Of booleans, of all leaves or of the whole model with its functions: a tree, which nobody calls."""
    model = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for tree in (params, model):
        mask = jax.tree.map(lambda x: eqx.is_array(x) and x.ndim > 1, tree)
        tx = om.adamw(0.1, weight_decay=0.5, mask=mask)
        updates, _ = tx.update(zeros, tx.init(params), params)
        moved = {path: bool(jnp.any(u != 0)) for path, u in by_path(updates).items()}
        assert moved == {path: path.endswith("weight") for path in moved}


@pytest.mark.parametrize("boolean", [bool, np.bool_, np.array, jnp.array], ids=lambda x: x.__name__)
def test_booleans_of_any_library(boolean):
    """In a tree and in what a function returns, where they are known; a mask has to be known in a program."""
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    tree = {"kernel": boolean(True), "bias": boolean(False)}
    for mask in (tree, lambda _: tree):
        tx = om.add_decayed_weights(1.0, mask)
        for update in (tx.update, jax.jit(tx.update)):
            updates, _ = update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
            assert (updates["kernel"] == 1).all()
            assert not updates["bias"].any()


@pytest.mark.parametrize("value", [0, 1.0, jnp.ones(1, bool), jnp.array(1)])
def test_what_is_no_boolean(value):
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    tx = om.add_decayed_weights(1.0, {"kernel": True, "bias": value})
    with pytest.raises(ValueError, match=r"add_decayed_weights: the mask is .* for 'bias'"):
        tx.init(params)


def test_equinox_training():
    model = eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(0))
    tx = om.muon(0.02, axes={"layers/2/weight": None})
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        gradients = eqx.filter_grad(lambda m: (jax.vmap(m)(jnp.ones((4, 3))) ** 2).mean())(model)
        updates, state = tx.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    stepped, _ = step(model, state)
    assert bool(jnp.any(stepped.layers[0].weight != model.layers[0].weight))


def test_factors_by_rules():
    """The first rule that matches, one number for each layer of a stack, and 1 for all other leaves."""
    g = {"layers": {"kernel": jnp.ones((3, 2, 4))}, "embed": {"table": jnp.ones((8, 4))}, "bias": jnp.ones(3)}
    tx = om.scale_by_rules({"layers/*": [0.25, 0.5, 1.0], "*embed*": 0.125})
    updates, _ = jax.jit(tx.update)(g, tx.init(g))
    np.testing.assert_array_equal(updates["layers"]["kernel"][:, 0, 0], [0.25, 0.5, 1.0])
    np.testing.assert_array_equal(updates["embed"]["table"], 0.125)
    np.testing.assert_array_equal(updates["bias"], 1)
    second = om.scale_by_rules({"layers/*": [[0.25, 0.5]]})
    updates, _ = second.update(g, second.init(g))
    np.testing.assert_array_equal(updates["layers"]["kernel"][0, :, 0], [0.25, 0.5])
    with pytest.raises(ValueError, match=r"shape \(1, 3\)\. Type a number, or one for"):
        om.scale_by_rules({"layers/*": [[0.25, 0.5, 1.0]]}).init(g)
    with pytest.raises(ValueError, match=r"'bias' has shape \(3,\), but its factor has shape \(2,\)"):
        om.scale_by_rules({"bias": [1.0, 2.0]}).init(g)
    for factor in (1j, True, "x"):
        with pytest.raises(ValueError, match="scale_by_rules: the factor of 'bias' must be a real number"):
            om.scale_by_rules({"bias": factor}).init(g)
    with pytest.raises(ValueError, match=r"scale_by_rules: rules must be a mapping"):
        om.scale_by_rules(3.0)
    with pytest.warns(UserWarning, match="scale_by_rules: no leaf matches the rule 'embde/"):
        om.scale_by_rules({"embde/*": 1.0, "*": 1.0}).init(g)
    tx, large = om.chain(om.ema(0.9), om.scale_by_rules({"w": [1.0] * 128})), {"w": jnp.ones((128, 128))}
    tx = om.compress_state(tx)
    state = tx.init(large)
    with pytest.raises(ValueError, match="compress_state: put scale_by_rules outside"):
        tx.update(large, state)


def test_roles_are_masks_partitions_and_factors():
    g = {
        "head": {"kernel": jnp.ones((4, 8))},
        "norm": {"scale": jnp.ones(4)},
        "up": {"kernel": jnp.ones((4, 4))},
    }
    decayed = om.add_decayed_weights(1.0, mask=om.not_roles("norm", "head"))
    zero = jax.tree.map(jnp.zeros_like, g)
    updates, _ = decayed.update(zero, decayed.init(g), g)
    assert {path for path, x in by_path(updates).items() if jnp.any(x)} == {"up/kernel"}
    tx = om.partition(om.role_of, {"dense": om.sgd(1.0), "norm": om.sgd(2.0), "head": om.sgd(3.0)})
    updates, _ = tx.update(g, tx.init(g), g)
    assert {path: float(x.min()) for path, x in by_path(updates).items()} == {
        "head/kernel": -3.0,
        "norm/scale": -2.0,
        "up/kernel": -1.0,
    }
    assert om.roles("norm", "bias")("norm/scale", (4,))
    both = om.chain(
        om.sgd(1.0), om.scale_by_rules(lambda path, shape: 0.5 if om.roles("head")(path, shape) else 1)
    )
    updates, _ = both.update(g, both.init(g), g)
    assert {path: float(x.min()) for path, x in by_path(updates).items()}["head/kernel"] == -0.5
    with pytest.raises(ValueError, match=r"not_roles: 'norms' is not a role\. Type 'norm', or another of"):
        om.not_roles("norms")


def test_decay_mask_leaves_out_vectors_also_of_stacked_layers():
    params = {
        "embed": {"embedding": jnp.ones((64, 8))},
        "layers": {
            "norm": {"scale": jnp.ones((3, 8))},
            "up": {"kernel": jnp.ones((3, 8, 32)), "bias": jnp.ones((3, 32))},
        },
        "head": {"kernel": jnp.ones((8, 64)), "bias": jnp.ones(64)},
    }
    decayed = {path for path, x in by_path(om.decay_mask(params)).items() if x}
    assert decayed == {"embed/embedding", "layers/up/kernel", "head/kernel"}
    tx = om.adamw(0.1, weight_decay=0.5, mask=om.decay_mask)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert {path for path, x in by_path(updates).items() if jnp.any(x)} == decayed
    assert om.labels({om.decay_mask: "decayed", "*": "not"})(params)["head"] == {
        "kernel": "decayed",
        "bias": "not",
    }


def test_rules_of_labels_and_masks_know_all_leaves():
    """The head without a telling name is found by the widths of the others."""
    params = layers(Dense_0=(28, 64), Dense_1=(64, 64), Dense_2=(64, 11))
    found = om.labels({om.roles("head"): "head", "*": "other"})(params)
    assert {path for path, x in by_path(found).items() if x == "head"} == {"Dense_2/kernel"}
    tx = om.add_decayed_weights(1.0, mask={om.roles("head"): True, "*": False})
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert {path for path, x in by_path(updates).items() if jnp.any(x)} == {"Dense_2/kernel"}


@pytest.mark.parametrize("name", ["deconv1", "conv_transpose", "up1", "upsample", "conv_tr"])
def test_transposed_convolutions_are_asked_about_without_a_bias(name):
    """PyTorch has the inputs of their weight first, Equinox the outputs; a bias tells."""
    weight = jax.ShapeDtypeStruct((64, 32, 4, 4), jnp.float32)
    (row,) = om.plan({f"{name}/weight": weight})
    assert row.unresolved is not None
    assert {"ioii", "oiii"} < {*row.answers}
    for outputs, spec in ((32, "ioii"), (64, "oiii")):
        bias = jax.ShapeDtypeStruct((outputs,), jnp.float32)
        plan = om.plan({f"{name}/weight": weight, f"{name}/bias": bias})
        assert plan[f"{name}/weight"].spec == spec


def test_roles_are_keys_of_rules():
    """In factors, states, labels, masks and specs; the first key that matches decides."""
    params = {"embed": jnp.ones((64, 128)), "norm": {"scale": jnp.ones(64)}, "up": {"w": jnp.ones((64, 64))}}
    table, other = om.roles("embedding"), om.not_roles("norm")
    tx = om.scale_by_rules({"up/*": 3.0, table: 0.5, other: 2.0})
    updates, _ = tx.update(params, tx.init(params))
    assert {path: float(x.max()) for path, x in by_path(updates).items()} == {
        "embed": 0.5,
        "norm/scale": 1.0,
        "up/w": 3.0,
    }
    assert om.labels({table: "a", "*": "b"})(params) == {
        "embed": "a",
        "norm": {"scale": "b"},
        "up": {"w": "b"},
    }
    state = om.lion(0.1, state={table: None, "*": om.codecs.Float8()}).init(params)
    kept = [x.shape for x in jax.tree.leaves(state) if x.dtype == jnp.float32 and x.size > 1000]
    assert kept == [params["embed"].shape]
    masked = om.add_decayed_weights(1.0, mask={table: False, "*": True})
    updates, _ = masked.update(jax.tree.map(jnp.zeros_like, params), masked.init(params), params)
    assert not updates["embed"].any()
    assert updates["up"]["w"].all()
    row = om.plan({"odd": jnp.ones((8, 8))}, axes={om.roles("undecided"): "io"})["odd"]
    assert (row.spec, row.role) == ("io", "rule roles('undecided')")


def test_parts_know_the_whole_tree():
    """Another transformation has the head; without it the last hidden layer would be the output."""
    rng = np.random.default_rng(0)
    sizes = [(20, 32), (32, 48), (48, 10)]
    params = {f"Dense_{k}": {"kernel": jnp.asarray(rng.normal(size=s))} for k, s in enumerate(sizes)}

    def label(path, shape):
        return "last" if shape[1] == 10 else "hidden"

    parts = om.partition(label, {"last": om.sgd(0.1), "hidden": om.muon(0.1)})
    with warnings.catch_warnings(action="error"):
        state = parts.init(params)
        updates, _ = parts.update(params, state, params)
    whole = om.muon(0.1, axes={"Dense_2/kernel": "head"})
    expected, _ = whole.update(params, whole.init(params), params)
    for k in range(2):
        found = updates[f"Dense_{k}"]["kernel"]
        np.testing.assert_array_equal(found, expected[f"Dense_{k}"]["kernel"])


def test_roles_of_the_whole_tree():
    """All roles that the plan shows, in a mask of any transformation; a head that widths tell is a head."""
    params = layers(Dense_0=(28, 64), Dense_1=(64, 64), Dense_2=(64, 11)) | {
        "odd": jnp.ones((3, 5)),
        "ids": jnp.zeros(3, jnp.int32),
    }
    plan = om.plan(params)
    assert {"head, inferred", "integer", "undecided", "bias", "dense"} == {row.role for row in plan}
    for role in {row.role for row in plan}:
        chosen = {path for path, x in by_path(om.roles(role)(params)).items() if x}
        assert chosen == {row.path for row in plan if row.role == role}
        assert not any(
            a == b
            for a, b in zip(
                jax.tree.leaves(om.roles(role)(params)),
                jax.tree.leaves(om.not_roles(role)(params)),
                strict=True,
            )
        )
    assert om.roles("head")(params)["Dense_2"] == {"kernel": True, "bias": False}
    assert om.role_of("Dense_2/kernel", (64, 11)) == "dense"
    assert om.role_of("Dense_2/kernel", (64, 11), params) == "head"
    for kind in ("first", "second", "slow"):  # of a moment, as `state=` has it
        assert om.role_of(f"{kind}/decoder/kernel", (64, 64)) == om.role_of("decoder/kernel", (64, 64))
        assert om.role_of(f"{kind}/Dense_2/kernel", (64, 11), params) == "head"
    assert om.role_of("odd", (3, 5)) == "undecided"
    with pytest.raises(
        ValueError, match=r"role_of: no leaf of params has the path 'Dense_3/kernel'\. Similar"
    ):
        om.role_of("Dense_3/kernel", (64, 11), params)
    del params["ids"]
    tx = om.adamw(0.1, weight_decay=0.5, mask=om.not_roles("head", "bias", "undecided"))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert {path for path, x in by_path(updates).items() if jnp.any(x)} == {
        "Dense_0/kernel",
        "Dense_1/kernel",
    }
    masked = optax.masked(optax.set_to_zero(), om.roles("head"))
    updates, _ = masked.update(params, masked.init(params))
    assert {path for path, x in by_path(updates).items() if not jnp.any(x)} == {"Dense_2/kernel"}


def test_state_by_role():
    """Moments have the roles of their leaves."""
    params = {"embed": {"embedding": jnp.ones((64, 64))}, "up": {"kernel": jnp.ones((64, 64))}}
    codecs = {"first": om.codecs.Signed8(), "second": om.codecs.Nonneg8()}
    tx = om.adamw(
        1e-3,
        state=lambda path, shape: codecs[path.split("/")[0]] if om.role_of(path, shape) == "dense" else None,
    )
    held = {leaf.dtype.name for leaf in jax.tree.leaves(tx.init({"up": params["up"]})) if leaf.size >= 4096}
    assert held & {"int8", "uint8"}
    held = {leaf.dtype.name for leaf in jax.tree.leaves(tx.init({"embed": params["embed"]})) if leaf.ndim}
    assert held == {"float32"}


@pytest.mark.parametrize(
    "make",
    [
        lambda state: om.adamw(0.1, state=state),
        lambda state: om.muon(0.1, axes={"Dense_2/kernel": None}, state=state),
        lambda state: om.compress_state(optax.GradientTransformation(*om.adam(0.1)), state, elementwise=True),
        lambda state: om.compress_state(optax.GradientTransformation(*om.adam(0.1)), state),
    ],
    ids=["adamw", "muon", "elementwise", "trees"],
)
def test_state_by_roles_of_the_whole_tree(make):
    """A head that only widths tell is a head in rules of moments too, at `init`, `update` and afterwards."""
    params = layers(Dense_0=(28, 64), Dense_1=(64, 64), Dense_2=(64, 65))
    tx = make({om.roles("head"): None})
    state = tx.init(params)
    for _ in range(2):
        sizes = {leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype.itemsize == 1}
        assert sizes == {64 * 64}  # both kernels would have codes by their names
        _, state = tx.update(params, state, params)
    om.carry_state(state, tx, params, written_by=tx)


def test_what_is_no_role_is_refused():
    with pytest.raises(
        ValueError, match=r"roles: \['norm', 'bias'\] is not a role\. Type roles\('norm', 'bias'\)"
    ):
        om.roles(["norm", "bias"])
    with pytest.raises(
        ValueError, match=r"role_of: it takes a path and a shape, but got 'w' and 3\. Type role_of"
    ):
        om.role_of("w", 3)
    assert om.role_of("norm/scale", [4]) == "norm"


def layers(**sizes):
    """Dense layers with biases: name → (in, out)."""
    return {name: {"kernel": jnp.ones(size), "bias": jnp.ones(size[1])} for name, size in sizes.items()}


OUTPUTS = {
    "the last of three": (layers(Dense_0=(28, 64), Dense_1=(64, 64), Dense_2=(64, 11)), "Dense_2"),
    "in a model": ({"net": layers(fc1=(28, 64), fc2=(64, 11))}, "net/fc2"),
    "with convolutions": (
        layers(Dense_0=(512, 64), Dense_1=(64, 11)) | {"Conv_0": layers(a=(8, 512))},
        "Dense_1",
    ),
    "as many outputs as the embedding has rows": (
        {
            "Embed_0": {"embedding": jnp.ones((11, 64))},
            "Block_0": layers(Dense_0=(64, 256), Dense_1=(256, 64)),
            **layers(Dense_0=(64, 11)),
        },
        "Dense_0",
    ),
    "a Q network": (layers(fc1=(28, 64), fc2=(64, 64), q=(64, 5)), "q"),
    "words, with a name that no rule knows": (
        {
            "Embed_0": {"embedding": jnp.ones((99, 64))},
            "Block_0": layers(Dense_0=(64, 256), Dense_1=(256, 64)),
            **layers(vocab_proj=(64, 99)),
        },
        "vocab_proj",
    ),
    "words of a decoder, as many as its perceptron is wide": (
        {
            "decoder": {
                "Embed_0": {"embedding": jnp.ones((256, 64))},
                "Block_0": layers(fc1=(64, 256), fc2=(256, 64)),
                **layers(vocab_proj=(64, 256)),
            },
            "encoder": layers(stem=(32, 64)),
        },
        "decoder/vocab_proj",
    ),
    "fewer words than a recurrent layer takes in": (
        {
            "Embed_0": {"embedding": jnp.ones((65, 96))},
            "lstm": {"cell": layers(dense_i=(96, 512), dense_h=(128, 512))},
            **layers(to_vocab=(128, 65)),
        },
        "to_vocab",
    ),
    "a higher number in another module": (
        {"MLP_0": layers(Dense_0=(28, 256), Dense_1=(256, 64)), **layers(Dense_0=(64, 11))},
        "Dense_0",
    ),
    "an embedding that is the output layer too": (
        {"Embed_0": {"embedding": jnp.ones((11, 16))}, **layers(Dense_0=(16, 64), Dense_1=(64, 16))},
        None,
    ),
    "a head": (layers(Dense_0=(28, 64), Dense_1=(64, 64), head=(64, 13)), None),
    "one layer": (layers(Dense_0=(28, 64)), None),
    "a norm behind it": (
        layers(Dense_0=(28, 64), Dense_1=(64, 11)) | {"norm": {"scale": jnp.ones(11)}},
        None,
    ),
    "a gate and an input side by side": (layers(Dense_0=(32, 128), Dense_1=(64, 32)), None),
    "a fused query": (layers(Dense_0=(16, 48), Dense_1=(16, 16), Dense_2=(16, 16)), "Dense_2"),
    "in a block": ({"layers": [{"mlp": layers(fc1=(28, 64), fc2=(64, 11))}]}, None),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_output_layer_by_widths(name):
    """It is not orthogonalized, and a warning says what to type; the plan and updates say the same."""
    params, path = OUTPUTS[name]
    named = {"head/kernel", "Embed_0/embedding", "decoder/Embed_0/embedding"}
    tx = om.muon(0.1, others=optax.set_to_zero())
    with pytest.warns(UserWarning, match="output layer") if path else nullcontext():
        state = tx.init(params)
    updates, _ = jax.jit(tx.update)(params, state, params)
    still = {key for key, x in by_path(updates).items() if x.ndim == 2 and not jnp.any(x)}
    assert still - named == ({f"{path}/kernel"} if path else set())
    assert {row.path for row in om.plan(params) if row.role == "head, inferred"} == still - named
    if path:
        confirmed = om.muon(0.1, axes={f"{path}/kernel": None}).init(params)  # without a warning
        assert jax.tree.structure(confirmed.inner_states["matrix"]) == jax.tree.structure(
            state.inner_states["matrix"]
        )


ENDS = {
    "beside a named head": (
        layers(Dense_0=(28, 64), Dense_1=(64, 11), head=(64, 13)),
        {"Dense_1/kernel"},
    ),
    "two outputs": (
        layers(Dense_0=(28, 64), Dense_1=(64, 11), Dense_2=(64, 12)),
        {"Dense_1/kernel", "Dense_2/kernel"},
    ),
    "an autoencoder": (
        layers(Dense_0=(28, 64), Dense_1=(64, 16), Dense_2=(16, 64), Dense_3=(64, 28)),
        {"Dense_3/kernel"},
    ),
    "an encoder and a decoder": (
        {
            "encoder": layers(fc1=(784, 500), fc2_mean=(500, 20), fc2_logvar=(500, 20)),
            "decoder": layers(fc1=(20, 500), fc2=(500, 784)),
        },
        {"decoder/fc2/kernel"},
    ),
}


ENDS |= {
    "as many outputs as the model's inputs, and another layer that none takes in": (
        {
            "Encoder_0": layers(Dense_0=(23, 64), Dense_1=(64, 48)),
            "Decoder_0": layers(Dense_0=(64, 64), Dense_12=(64, 23)),
        },
        {"Encoder_0/Dense_1/kernel", "Decoder_0/Dense_12/kernel"},
    ),
    "a named head, and an end that only the first layer of another module takes in": (
        {
            "first": layers(proj=(23, 64)),
            "a": layers(Dense_0=(64, 64)),
            "last": layers(proj=(64, 23)),
            "b": layers(head=(64, 5)),
        },
        {"last/proj/kernel"},
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_several_output_layers_and_autoencoders_are_asked(name):
    """What the question offers first, "head", is an answer; None says that it is not a matrix."""
    params, asked = ENDS[name]
    assert {row.path for row in om.plan(params) if row.unresolved} == asked
    with pytest.raises(ValueError, match="may be the output layer") as error:
        om.muon(0.1).init(params)
    for path in asked:
        text = str(error.value)
        assert text.index(f"axes={{{path!r}: 'head'}}") < text.index(f"axes={{{path!r}: 'io'}}")
        assert f"axes={{{path!r}: 'head'}}  # the output layer" in text
    plan = om.plan(params, axes=dict.fromkeys(asked, "head"))
    assert all(plan[path].role == "head" and plan[path].spec is None for path in asked)
    om.muon(0.1, axes=dict.fromkeys(asked)).init(params)


HIDDEN, WORDS = (64, 64), {"embed/embedding": (999, 64)}
CRITIC = {"Dense_3/w": (376, 64), "Dense_4/w": HIDDEN, "Dense_5/w": (64, 1)}
ACTOR_CRITIC = {"Dense_0/w": (376, 64), "Dense_1/w": HIDDEN} | CRITIC
LAST = {
    "another name": ({"graph_decoder/w": (64, 11), "l1/w": HIDDEN, "l0/w": (28, 64)}, "-"),
    "channels of an image": (
        {"d/Dense_0/w": (11, 72), "d/up/kernel": (3, 3, 8, 3), "e/Conv_0/w": (3, 3, 3, 8), "e/l/w": (72, 11)},
        "io",
    ),
    "a convolution": ({"Conv_0/kernel": (1, 1, 64, 11), "Up_0/Conv_0/kernel": (3, 3, 9, 64)}, "-"),
    "a convolution with outputs first": ({"l/2/weight": (11, 8, 1, 1), "l/1/weight": (8, 3, 3, 3)}, "-"),
    "a convolution before a dense layer": (
        {"Conv_1/w": (3, 3, 8, 9), "Conv_0/w": (3, 3, 3, 8), "d/w": (36, 9)},
        "iiio",
    ),
    "a convolution beside a skip": (
        {"Conv_1/w": (3, 3, 8, 9), "Conv_0/w": (3, 3, 3, 8), "up/kernel": (1, 1, 17, 5)},
        "iiio",
    ),
    "a convolution of inputs": ({"Conv_0/kernel": (1, 9, 14), "a/conv/kernel": (3, 14, 9)}, "?"),
    "as wide as hidden layers": ({"l3/w": HIDDEN, "l2/w": HIDDEN, "l1/w": (28, 64)}, "-"),
    "weights without layers": ({"w2": (64, 11), "b2": (11,), "w1": (28, 64), "b1": (64,)}, "-"),
    "pairs in lists": ({"1/0": (64, 11), "1/1": (11,), "0/0": (28, 64), "0/1": (64,)}, "-"),
    "outputs first": ({"2/weight": (11, 64), "0/weight": (64, 28)}, "-"),
    "behind layers with names": ({"Dense_0/kernel": HIDDEN, "attn/query/kernel": HIDDEN} | WORDS, "?"),
    "of a tied model": ({"w2": (256, 64), "w1": (64, 256)} | WORDS, "io"),
    "of a part": ({"pooler/dense/kernel": HIDDEN} | WORDS, "io"),
    "before layers with names": ({"w2": HIDDEN, "w1": HIDDEN, "wq": HIDDEN, "wk": HIDDEN}, "io"),
    "an actor with many actions": ({"Dense_2/w": (64, 17)} | ACTOR_CRITIC, "?"),
    "an actor as wide as its layers": ({"Dense_2/w": HIDDEN} | ACTOR_CRITIC, "?"),
    "an actor beside a critic": ({"a/w2": (64, 17), "a/w1": (376, 64), "Dense_0/w": (64, 1)}, "-"),
    "inputs side by side": ({"l1/w": HIDDEN, "l0/w": (9, 64), "l2/w": (128, 64), "l3/w": (64, 1)}, "io"),
    "in blocks": ({"blocks/1/w2": HIDDEN, "blocks/1/w1": HIDDEN, "blocks/0/w2": HIDDEN}, "io"),
}


@pytest.mark.parametrize("name", LAST)
def test_the_last_layer_of_a_chain(name):
    """It is inferred if nothing else can be the output, and asked for if it may be a hidden layer."""
    tree, expected = LAST[name]
    plan = om.plan({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in tree.items()})
    row = plan[next(iter(tree))]
    assert (row.spec or "-?"[row.unresolved is not None]) == expected


CONVOLUTIONS = {
    "Conv_0/kernel": (3, 3, 3, 8),
    "Conv_1/kernel": (3, 3, 8, 16),
}
FLATTENED = {
    "a dense layer": ({"Dense_0/kernel": (64, 10)}, {}),
    "a dense layer with a name": ({"head/kernel": (64, 10)}, {}),
    "a dense layer with one output": ({"Dense_0/kernel": (64, 1)}, {}),
    "the mean and the variance": ({"mean/kernel": (64, 4), "logvar/kernel": (64, 4)}, {}),
    "a dense layer that is no matrix by a rule": ({"last/kernel": (64, 20)}, {"last/kernel": None}),
    "a head by a rule": ({"last/kernel": (64, 20)}, {"last/kernel": "head"}),
    "a dense layer of other inputs": ({"Dense_0/kernel": (68, 10)}, {}),
    "a dense layer with a name, of other inputs": ({"head/kernel": (68, 10)}, {}),
}


@pytest.mark.parametrize("name", FLATTENED)
@pytest.mark.parametrize("colors", [1, 3])
def test_a_convolution_that_is_flattened_is_no_output_layer(name, colors):
    """A dense layer takes in its channels of several places; if its inputs say otherwise, the rules ask."""
    last, axes = FLATTENED[name]
    tree = CONVOLUTIONS | {"Conv_0/kernel": (3, 3, colors, 8)} | last
    plan = om.plan({path: jax.ShapeDtypeStruct(n, jnp.float32) for path, n in tree.items()}, axes=axes)
    row = plan["Conv_1/kernel"]
    assert (row.spec or "-?"[row.unresolved is not None]) == ("?" if "other inputs" in name else "iiio")
    assert all(plan[path].spec is None and plan[path].unresolved is None for path in last)


@pytest.mark.parametrize("window", [7, 8, 11])
@pytest.mark.parametrize(("behind", "spec"), [((3, 3, 32, 64), "iiio"), ((32, 64), None)])
def test_large_windows_are_patches_if_no_convolution_is_behind(window, behind, spec):
    tree = {"conv/kernel": (window, window, 4, 32), "up/kernel": behind, "head/kernel": (64, 6)}
    of_equinox = {path.replace("kernel", "weight"): shape[::-1] for path, shape in tree.items()}
    for shapes in (tree, of_equinox):
        plan = om.plan({path: jax.ShapeDtypeStruct(n, jnp.float32) for path, n in shapes.items()})
        found = plan[next(iter(shapes))].spec
        assert found == (("iiio" if shapes is tree else "oiii") if spec or window < 8 else None)


@pytest.mark.parametrize("codes", [{}, {"quantizer/embeddings": (64, 512)}])
def test_the_last_convolution_is_asked_also_beside_an_embedding(codes):
    """An embedding may be the output layer too, but not of images."""
    weights = {
        "encoder/~/enc_1": (4, 4, 3, 64),
        "encoder/~/enc_2": (4, 4, 64, 128),
        "to_codes": (1, 1, 128, 64),
    }
    weights |= {
        "decoder/~/dec_1": (3, 3, 64, 128),
        "decoder/~/dec_2": (4, 4, 64, 128),
        "decoder/~/dec_3": (4, 4, 3, 64),
    }
    outputs = {
        "encoder/~/enc_1": 64,
        "encoder/~/enc_2": 128,
        "to_codes": 64,
        "decoder/~/dec_1": 128,
        "decoder/~/dec_2": 64,
        "decoder/~/dec_3": 3,
    }
    tree = {f"{path}/w": shape for path, shape in weights.items()} | codes
    tree |= {f"{path}/b": (size,) for path, size in outputs.items()}
    plan = om.plan({path: jax.ShapeDtypeStruct(n, jnp.float32) for path, n in tree.items()})
    assert [path for path in tree if plan[path].unresolved] == ["decoder/~/dec_3/w"]


@pytest.mark.parametrize("names", ["UV", "WH", "pq"])
def test_two_tables_of_factors_are_asked(names):
    one, other = names
    tree = {one: (1000, 16), other: (500, 16), "mlp/Dense_0/kernel": (32, 64), "mlp/Dense_1/kernel": (64, 1)}
    plan = om.plan({path: jax.ShapeDtypeStruct(n, jnp.float32) for path, n in tree.items()})
    assert [path for path in tree if plan[path].unresolved] == [one, other]


def test_a_flattened_convolution_with_outputs_first():
    tree = {"conv1/weight": (8, 1, 3, 3), "conv2/weight": (16, 8, 3, 3), "linear/weight": (10, 64)}
    plan = om.plan({path: jax.ShapeDtypeStruct(n, jnp.float32) for path, n in tree.items()})
    assert [plan[path].spec for path in tree] == [None, "oiii", None]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("outputs", [3, 12])
def test_the_output_layer_behind_one_convolution(channels, outputs):
    """The number of channels, and a window of as many places as there are outputs, do not matter."""
    tree = {"conv/weight": (4, channels, 3, 3), "lin/weight": (outputs, 64)}
    plan = om.plan({path: jax.ShapeDtypeStruct(n, jnp.float32) for path, n in tree.items()})
    assert plan["lin/weight"].role == "head, inferred"


def test_a_confirmed_output_layer_makes_no_other_one():
    tree = {"graph_decoder/w": (64, 11), "l1/w": HIDDEN, "l0/w": (28, 64)}
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in tree.items()}
    for answer in (None, "head"):
        plan = om.plan(params, axes={"graph_decoder/w": answer})
        assert [plan[path].spec for path in tree] == [None, "io", "io"]


def test_missing_gradients_and_the_output_layer():
    """Without parameters it cannot be told from widths; with them `init` and `update` agree."""
    params = layers(Dense_0=(4, 16), Dense_1=(16, 20), Dense_2=(20, 3))
    tx = om.muon(0.1)
    with pytest.warns(UserWarning, match="output layer"):
        state = tx.init(params)
    gradients = params | {"Dense_2": {"kernel": None, "bias": None}}
    updates, _ = tx.update(gradients, state, params)
    assert updates["Dense_2"]["kernel"] is None
    with pytest.raises(
        ValueError, match=r"muon: some gradients are None.*Type tx\.update\(gradients, state, params\)"
    ):
        tx.update(gradients, state)
    with_ids = params | {"ids": jnp.zeros(4, jnp.int32)}
    assert om.plan(with_ids, tx)["Dense_2/kernel"].transform == "adamw"


def test_partition_sends_leaves_where_the_rules_say():
    rules = {"embed/*": "frozen", re.compile("bias$"): "slow", "*": "fast"}
    tx = om.partition(rules, {"frozen": optax.set_to_zero(), "slow": om.sgd(1.0), "fast": om.sgd(2.0)})
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, TREE), tx.init(TREE), TREE)
    assert set(map(float, jnp.unique(updates["embed"]["table"]))) == {0.0}
    assert set(map(float, jnp.unique(updates["blocks"][1]["bias"]))) == {-1.0}
    assert set(map(float, jnp.unique(updates["last"]["kernel"]))) == {-2.0}


def test_a_frozen_leaf_has_no_state():
    tx = om.partition({"*kernel": "on", "*": "off"}, {"on": om.adamw(0.1), "off": optax.set_to_zero()})
    held = {leaf.shape for leaf in jax.tree.leaves(tx.init(TREE)) if leaf.shape}
    assert held == {(4, 4), (4, 6)}


def test_partition_names_every_leaf_without_a_transform():
    with pytest.raises(ValueError, match="partition: no rule matches 'embed/table'") as error:
        om.partition({"blocks/*": "on"}, {"on": om.sgd(0.1)}).init(TREE)
    assert "'last/kernel'" in str(error.value)
    with pytest.raises(
        ValueError, match=r"partition: the label of 'last/kernel' is 'of', but transforms has \['on'\]"
    ):
        om.partition({"last/*": "of", "*": "on"}, {"on": om.sgd(0.1)}).init(TREE)


def test_labels_serve_optax():
    choose = om.labels({"*bias": "b", "*": "w"})
    tx = optax.partition({"b": optax.set_to_zero(), "w": optax.scale(3.0)}, choose)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, TREE), tx.init(TREE))
    assert float(updates["blocks"][0]["bias"][0]) == 0.0
    assert float(updates["last"]["kernel"][0, 0]) == 3.0


@pytest.mark.parametrize(
    "mask",
    [
        {"*bias": False, "embed/*": False, "*": True},
        {"*bias": None, "embed/*": None, "*": "io"},
        om.labels({"*bias": False, "embed/*": False, "*": True}),
        om.labels(lambda path, shape: len(shape) > 1 and "embed" not in path),
    ],
    ids=["booleans", "specs", "labels", "function"],
)
@pytest.mark.parametrize("recipe", [om.adamw, om.nadamw, om.muon, om.sgd])
def test_weight_decay_masks_take_the_same_rules(mask, recipe):
    tx = recipe(0.1, weight_decay=0.5, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, TREE)
    ones = jax.tree.map(jnp.ones_like, TREE)
    updates, _ = tx.update(zeros, tx.init(ones), ones)
    decayed = {
        path for path, leaf in zip(leaf_paths(updates), jax.tree.leaves(updates), strict=True) if leaf.any()
    }
    assert decayed == {"blocks/0/kernel", "blocks/1/kernel", "last/kernel"}


def test_a_mask_may_still_be_a_prefix_tree():
    tx = om.add_decayed_weights(0.5, {"embed": False, "blocks": False, "last": True})
    updates, _ = tx.update(TREE, tx.init(TREE), TREE)
    np.testing.assert_array_equal(updates["last"]["kernel"], 1.5 * TREE["last"]["kernel"])
    np.testing.assert_array_equal(updates["embed"]["table"], TREE["embed"]["table"])


def test_a_prefix_in_other_containers():
    """Such as a dictionary for a module; what the mask lacks is named."""
    model = {
        "embed": eqx.nn.Embedding(8, 4, key=jax.random.key(0)),
        "last": eqx.nn.Linear(4, 4, key=jax.random.key(0)),
    }
    tx = om.add_decayed_weights(0.5, {"embed": False, "last": {"weight": True, "bias": False}})
    updates, _ = tx.update(model, tx.init(model), model)
    np.testing.assert_array_equal(updates["last"].weight, 1.5 * model["last"].weight)
    np.testing.assert_array_equal(updates["embed"].weight, model["embed"].weight)
    with pytest.raises(ValueError, match="has no value for 'last/bias'"):
        om.add_decayed_weights(0.5, {"embed": False, "last": {"weight": True}}).init(model)


PREFIXES = {
    "modules": lambda a, b: ({"embed": b, "blocks": a, "last": b}, {"blocks/*": a, "*": b}),
    "among patterns": lambda a, b: ({"*/bias": b, "blocks/1": a, "*": b}, {"blocks/1/kernel": a, "*": b}),
    "the first decides": lambda a, b: ({"blocks": a, "blocks/0/bias": b, "*": b}, {"blocks/*": a, "*": b}),
    "nested": lambda a, b: (
        {"embed": b, "blocks": [{"kernel": a, "bias": b}, a], "last": b},
        {"blocks/0/bias": b, "blocks/*": a, "*": b},
    ),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_a_path_decides_for_all_leaves_below_it(name):
    """As in the prefix trees that optax takes."""
    labels = [om.labels(rules)(TREE) for rules in PREFIXES[name]("a", "b")]
    assert labels[0] == labels[1]
    transforms = {"a": om.sgd(0.1, 0.9), "b": om.adam(0.1)}
    parts = [om.partition(rules, transforms).init(TREE) for rules in PREFIXES[name]("a", "b")]
    chex.assert_trees_all_equal(*parts)
    txs = [om.scale_by_rules(rules) for rules in PREFIXES[name](0.0, 2.0)]
    chex.assert_trees_all_equal(*(tx.update(TREE, tx.init(TREE))[0] for tx in txs))
    plans = [om.plan(TREE, axes=rules) for rules in PREFIXES[name](None, ...)]
    assert [row.spec for row in plans[0]] == [row.spec for row in plans[1]]
    assert not plans[0].unused


def test_a_path_says_how_the_moments_below_it_are_stored():
    params = {"mlp": {"up": jnp.ones((64, 64)), "down": jnp.ones((64, 64))}, "head": jnp.ones((64, 64))}
    state = om.adam(0.1, state={"first/mlp": om.codecs.Signed8(), "*": None}).init(params)
    dtypes = [x.dtype for x in jax.tree.leaves(state) if x.shape == (64, 64)]
    assert dtypes.count(jnp.int8) == 2


def test_one_sharding_stands_for_all_leaves():
    """As in `jax.jit`: a tree of one leaf is a prefix of any tree."""
    tx, spec = om.muon(0.1, shardings=jax.sharding.PartitionSpec()), jax.sharding.PartitionSpec("data")
    tx.update(TREE, tx.init(TREE), TREE)
    mesh = jax.sharding.AbstractMesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match=r"'blocks/0/kernel' has shape \(4, 4\), but .* divides 4 by 8"):
        om.plan(TREE, mesh=mesh, shardings=spec)


def test_trees_whose_names_have_brackets():
    """Trees of values are no rules, whatever the names of modules are."""
    params = {"layers[0]": {"w": jnp.ones((8, 4))}, "layers[1]": {"w": jnp.ones((8, 4))}}
    updates, _ = (tx := om.scale_by_rules(jax.tree.map(lambda x: 0.5, params))).update(
        params, tx.init(params)
    )
    assert all((u == 0.5).all() for u in jax.tree.leaves(updates))
    om.muon(0.1, axes=jax.tree.map(lambda x: "io", params)).init(params)
    om.adamw(0.1, mask=jax.tree.map(lambda x: True, params)).init(params)
    om.partition(jax.tree.map(lambda x: "all", params), {"all": om.sgd(0.1)}).init(params)


def is_matrix(path, shape):
    return jnp.asarray(len(shape)) > 1


@pytest.mark.parametrize(
    "tx",
    [
        om.adamw(0.1, mask=is_matrix),
        om.adamw(0.1, mask=lambda params: jax.tree.map(lambda w: jnp.asarray(w.ndim) > 1, params)),
        om.adamw(0.1, mask={is_matrix: False, "*": True}),
        om.multi_steps(om.adam(0.1), 2, maximum=is_matrix),
        optax.masked(om.adam(0.1), om.labels(is_matrix)),
        om.scale_by_rules(lambda path, shape: 1 / jnp.sqrt(len(shape))),
        om.scion(0.1, radius=lambda path, shape: jnp.sqrt(2 * len(shape)), axes={"w": "io", "b": None}),
        om.muon(0.1, axes=lambda path, shape: "io" if is_matrix(path, shape) else None),
        om.muon(0.1, scale=lambda i, o: jnp.sqrt(jnp.maximum(1, o / i)), axes={"w": "io", "b": None}),
        om.normuon(0.1, scale=lambda i, o: jnp.bfloat16(2), axes={"w": "io", "b": None}),
        om.mean("i", om.ema(0.9), where=lambda i, o: jnp.asarray(i) > o, axes={"w": "io", "b": None}),
    ],
)
def test_functions_of_shapes_may_use_jax_numpy(tx):
    """Inside `jax.jit` too, where their numbers would be traced."""
    params = {"w": jnp.eye(4, 3) + 0.1, "b": jnp.ones(3)}
    state = tx.init(params)
    eager, jitted = (update(params, state, params)[0] for update in (tx.update, jax.jit(tx.update)))
    jax.tree.map(lambda a, b: rounding.close(a, b, units=64), eager, jitted)


@pytest.mark.parametrize(
    "factor", [jnp.bfloat16(2), jnp.asarray(2, jnp.bfloat16), np.asarray(jnp.bfloat16(2))]
)
def test_factors_may_be_of_bfloat16(factor):
    """As `optax.inject_hyperparams` makes them of bfloat16 parameters."""
    params = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3)}
    found, expected = (
        tx.update(params, tx.init(params), params)[0]["w"]
        for number in (factor, 2.0)
        for tx in [om.chain(om.scale_by_rules({"*": number}), om.scion(0.1, radius=number, axes={"*": "io"}))]
    )
    np.testing.assert_array_equal(found, expected)


def test_trees_made_of_parameters_with_none_are_rules():
    """As of Equinox's models, whose functions a filter replaces by None."""
    params = {"layer": {"kernel": jnp.ones((64, 64)), "activation": None}}
    codecs = {"first": jax.tree.map(lambda _: om.codecs.Signed8(), params)}
    om.partition(jax.tree.map(lambda _: "all", params), {"all": om.sgd(0.1)}).init(params)
    om.adamw(0.1, state=codecs).init(params)
    assert om.plan(params, om.adamw(0.1, state=codecs)).unused == ()


def test_labels_warn_of_unused_rules():
    params = {"hidden": {"kernel": jnp.ones((3, 3))}}
    with pytest.warns(UserWarning, match="no leaf matches the rule 'hiden/.' .* Similar: 'hidden/kernel'"):
        optax.masked(om.ema(0.9), om.labels({"hiden/*": False, "*": True})).init(params)


@pytest.mark.parametrize(
    "make",
    [
        lambda rules: om.partition(dict(zip(rules, "st", strict=True)), {"s": om.sgd(0.1), "t": om.sgd(0.2)}),
        lambda rules: om.adamw(0.1, mask=rules),
        lambda rules: om.scale_by_rules({pattern: float(value) for pattern, value in rules.items()}),
        lambda rules: om.muon(
            0.1, axes={pattern: "io" if value else None for pattern, value in rules.items()}
        ),
    ],
    ids=["partition", "mask", "scale_by_rules", "axes"],
)
def test_rules_behind_one_for_all_are_reported(make):
    params = {"a": {"kernel": jnp.ones((3, 3))}, "b": {"kernel": jnp.ones((3, 3))}}
    with pytest.warns(
        UserWarning, match=r"'\*' is in front of 'a/\*' and decides for every leaf. Put '\*' last"
    ):
        make({"*": True, "a/*": False}).init(params)
    make({"a/*": False, "*": True}).init(params)


def test_labels_of_trees_with_none_warn_of_unused_rules():
    """As of Equinox's models, whose functions are None; a leaf without a gradient is a leaf."""
    rules = om.labels({"*weight*": True, "*": False})
    with pytest.warns(UserWarning, match=r"no leaf matches the rule '\*weight\*'"):
        rules({"activation": None, "kernel": jnp.ones((3, 3))})
    rules({"weight": None, "kernel": jnp.ones((3, 3))})
    rules({"part": optax.MaskedNode(), "kernel": jnp.ones((3, 3))})


def test_what_is_typed_as_the_error_says_is_enough():
    params = {"a[0]": jnp.ones((3, 4, 5)), "b*": jnp.ones((3, 4, 5))}
    om.muon(0.1, axes={"a[0]": "bio", "b*": "bio"}).init(params)


def test_shardings_that_say_replicated_need_no_mesh():
    """What the error inside `shard_map` says to type is right outside too."""
    tx, params = om.muon(0.1, shardings={"*": jax.sharding.PartitionSpec()}), {"kernel": jnp.ones((8, 8))}
    updates, _ = tx.update(params, tx.init(params), params)
    plain, _ = om.muon(0.1).update(params, om.muon(0.1).init(params), params)
    np.testing.assert_array_equal(updates["kernel"], plain["kernel"])


def test_a_tree_without_matrices_is_reported():
    for tree in ({"embed": {"embedding": jnp.ones((8, 4))}, "scale": jnp.ones(3)}, jnp.ones(12)):
        with pytest.warns(UserWarning, match=r"muon: no leaf is a matrix.*optimorph\.plan"):
            om.muon(0.1).init(tree)


NOTHING = {
    "muon: no leaf is a matrix": om.muon(0.1),
    "orthogonalize: no leaf is a matrix, so no gradient changes": om.orthogonalize(),
    "scale_by_shape: no leaf is a matrix, so no update is scaled": om.scale_by_shape(),
    "in_eigenbasis: no leaf is a matrix, so none has a basis": om.in_eigenbasis(om.ema(0.9), decay=0.9),
    "in_bfloat16: the state has no array of real numbers": om.in_bfloat16(om.sgd(0.1)),
    "in_bfloat16: the state has no array of real": om.in_bfloat16(optax.sgd(0.1)),
    "clip_attention_logits: no module has both": om.clip_attention_logits(),
    "probe: no leaf has 'update_stable_rank', which needs a matrix": probe(om.adam(0.1), SPECTRAL),
    "probe: no leaf has 'cosine', which needs a first moment": probe(om.sgd(0.1), "cosine"),
}


@pytest.mark.parametrize("words", NOTHING)
def test_nothing_to_do_is_said(words):
    """Once, in `init`; not for a part of the parameters without leaves, nor where `axes` say it."""
    tx, params = NOTHING[words], {"scale": jnp.ones(3)}
    with pytest.warns(UserWarning, match=words) as caught:
        tx.update(params, tx.init(params), params)
    assert len([each for each in caught if words in str(each.message)]) == 1
    with warnings.catch_warnings(action="error"):
        om.partition({"*": "other"}, {"part": tx, "other": om.sgd(0.1)}).init(params)
        om.orthogonalize(axes={"*": None}).init(params)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ("*kernel", r"the mask is '\*kernel'"),
        ({"*bias": "no", "*": True}, r"the mask is 'no' for 'bias'"),
        ({"kernel": 1.5, "bias": 1.5}, r"the mask is 1\.5 for '(kernel|bias)'"),
        (lambda path: "bias" not in path, ".*returned one boolean"),
        ({"kernel": True}, "the mask has no value for 'bias'"),
    ],
    ids=["a pattern", "a word", "a number", "of a path alone", "of some leaves"],
)
def test_masks_that_mean_nothing_are_refused(mask, words):
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    for name in ("add_decayed_weights", *catalog.recipes_with("learning_rate", "weight_decay", "mask")):
        rate = {} if name == "add_decayed_weights" else {"learning_rate": 0.1}
        tx = getattr(om, name)(**rate, weight_decay=0.1, mask=mask)
        with pytest.raises(ValueError, match=f"^{name}: {words}"):
            tx.init(params)


def test_rules_that_match_nothing_are_reported():
    params = {"dense": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    with pytest.warns(UserWarning, match=r"'dense/bais' of mask\. Similar: 'dense/bias'"):
        om.adamw(0.1, weight_decay=0.1, mask={"dense/bais": False, "*": True}).init(params)
    with pytest.warns(UserWarning, match=r"partition: no leaf matches the rule 'norm/\*' of rules"):
        om.partition({"norm/*": "a", "*": "b"}, {"a": om.sgd(0.1), "b": om.adam(0.1)}).init(params)


@pytest.mark.parametrize(
    "rules", [{"bloks/*": None}, {"bloks/0/kernel": None}, {"bloks": [{"kernel": "io"}]}]
)
def test_rules_without_a_leaf_are_reported(rules):
    with pytest.warns(UserWarning, match="muon: no leaf matches the rule 'bloks/"):
        om.muon(0.1, axes=rules).init(TREE)
    assert om.plan(TREE, axes=rules).unused


def refusal(params, **arguments):
    with pytest.raises(ValueError, match="no rule says") as error:
        om.muon(0.1, **arguments).init(params)
    return str(error.value)


def test_leaves_that_differ_in_numbers_are_asked_once():
    params = {"layers": [{"attn": {"qkv": {"kernel": jnp.ones((8, 16))}}} for _ in range(12)]}
    message = refusal(params)
    assert "muon: 'layers/*/attn/qkv/kernel' (12 leaves) has shape (8, 16)" in message
    assert message.count("has shape") == 1
    assert "axes={'layers/*/attn/qkv/kernel': 'io'}" in message
    assert len(specs(params, {"layers/*/attn/qkv/kernel": "io"})) == 12
    assert "'layers/*/attn/qkv/kernel' (12 leaves) has shape" in str(om.plan(params))


def test_what_is_typed_for_alike_leaves_means_no_others():
    odd, plain = jnp.ones((2, 3, 4)), jnp.ones((4, 4))
    params = {"layers": [{"kernel": odd, "mlp": {"kernel": plain}} for _ in range(3)]}
    message = refusal(params)
    assert "axes={re.compile(r'^layers/\\d+/kernel$'): 'bio'}" in message
    axes = {re.compile(r"^layers/\d+/kernel$"): "bio"}
    assert set(specs(params, axes).values()) == {"bio", "io"}


def test_every_undecided_leaf_is_named():
    names = [f"w{a}{b}" for a in "abcde" for b in "abcde"]
    message = refusal({name: jnp.ones((2, 3, 4)) for name in names})
    assert "... and 5 more leaves: 'wea', 'web'" in message
    assert all(repr(name) in message for name in names)


def test_a_rule_may_leave_it_to_the_names():
    params = {"embed": {"embedding": jnp.ones((8, 4))}, "up": {"kernel": jnp.ones((4, 6))}, "b": jnp.ones(8)}
    assert specs(params, lambda path, shape: "oi" if path == "b/w" else ...) == {"up/kernel": "io"}
    assert specs(params, {"embed/*": ..., "b": ..., "*": "oi"}) == {"up/kernel": "oi"}
    tree = {"embed": {"embedding": "oi"}, "up": {"kernel": ...}, "b": None}
    assert specs(params, tree) == {"embed/embedding": "oi", "up/kernel": "io"}
    with pytest.raises(ValueError, match="labels: no rule matches 'b'"):
        om.labels(lambda path, shape: ... if path == "b" else "fast")(params)


def test_a_bare_array_and_flat_dictionaries():
    assert specs(jnp.ones((3, 4))) == {"": "io"}
    flat = {"embed.embedding": jnp.ones((8, 4)), "layers.0.up.weight": jnp.ones((8, 4))}
    assert specs(flat) == {"layers.0.up.weight": "oi"}
    flat = {("embed", "embedding"): jnp.ones((8, 4)), ("layers", 0, "up", "weight"): jnp.ones((8, 4))}
    assert specs(flat) == {"layers/0/up/weight": "oi"}


def test_a_tied_embedding_of_equinox_is_an_embedding():
    a, b = jax.random.split(jax.random.key(0))
    pair = eqx.nn.Embedding(11, 8, key=a), eqx.nn.Linear(8, 11, key=b)
    shared = eqx.nn.Shared(pair, lambda pair: pair[1].weight, lambda pair: pair[0].weight)
    params = eqx.filter({"shared": shared, "hidden": eqx.nn.Linear(8, 8, key=a)}, eqx.is_array)
    assert specs(params) == {"hidden/weight": "oi"}


@pytest.mark.parametrize("make", [om.muon, om.orthogonalize])
def test_what_is_no_array_is_named(make):
    model = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
    words = r"'activation.*' is .*, which is not an array\. Leave out such leaves: eqx\.filter"
    tx = make(0.1) if make is om.muon else make()
    with pytest.raises(ValueError, match=words):
        tx.init(model)


ASKED = {
    ("x", (3, 1, 64)): ["None}  # not a matrix", "'bio'"],
    ("x/weight", (64, 1, 3)): ["None}  # not a matrix", "'boi'"],
    ("x/weight", (12, 3, 12, 64, 768)): ["'bbooi'"],
    ("x/weight", (12, 768, 12, 64)): ["'booi'", "'boii'"],
    ("x/kernel", (12, 3, 3, 3, 8, 8)): ["'biiiio'"],
    ("x", (2, 2, 2, 2, 2, 3, 4)): ["None}  # not a matrix", "'bbbbbio'"],
    ("query_key_value/kernel", (48, 144)): ["'i(3o)'", "'i(36o)'"],
    ("rnn/cell/dense_i/kernel", (5, 16)): ["'io'", "'i(4o)'"],
}


@pytest.mark.parametrize(("path", "shape"), ASKED, ids=[f"{path} {shape}" for path, shape in ASKED])
def test_likely_answers_are_offered(path, shape):
    message = refusal({path: jax.ShapeDtypeStruct(shape, jnp.float32)})
    places = [message.index(word) for word in ASKED[path, shape]]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("params", "arguments"),
    [
        ({"hidden": {"kernel": (8, 16)}, "head": {"kernel": (16, 4)}}, {}),
        ({"Dense_0": {"kernel": (8, 16)}, "Dense_1": {"kernel": (16, 4)}}, {"axes": {"Dense_1/*": "head"}}),
        ({"Dense_0": {"kernel": (8, 16)}, "Dense_1": {"kernel": (16, 4)}}, {}),
    ],
    ids=["by name", "by a rule", "by widths"],
)
def test_the_head_of_scion(params, arguments):
    """However it is found, each step is ρ sign(m) / inputs, with ρ = 3000."""
    params = jax.tree.map(jnp.ones, params, is_leaf=lambda x: type(x) is tuple)
    tx = om.scion(0.1, weight_decay=0.0, **arguments)
    with warnings.catch_warnings():
        if not arguments and "head" not in params:
            warnings.filterwarnings("ignore", "scion: 'Dense_1/kernel' .* Type .*: 'head'} to confirm this")
        updates, _ = tx.update(params, tx.init(params), params)
    (head,) = (u for u in jax.tree.leaves(updates) if u.shape == (16, 4))
    rounding.close(head, jnp.full((16, 4), -0.1 * 3000 / 16))


@pytest.mark.parametrize(
    "tx",
    [
        om.adamh(0.1),
        om.keep_norm(om.sign()),
        om.hyperball(0.1),
        om.orthogonalize(),
        om.scale_by_shape(),
        om.factored(0.9),
    ],
)
def test_undecided_leaves_are_refused_before_the_run(tx):
    params = {"item_factors": jnp.ones((8, 4)), "bias": jnp.ones(4)}
    with pytest.raises(ValueError, match="'item_factors' has shape"):
        tx.init(params)
