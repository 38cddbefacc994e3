"""Real models, and shapes with the names of others, whose plans are written down in `tests/plans`."""

import functools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen, nnx

from optimorph._racing.tasks import text

WIDTH, HEADS = 16, 4


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        y = linen.LayerNorm()(x)
        x = x + linen.MultiHeadDotProductAttention(HEADS, name="attention")(y)
        y = linen.Dense(4 * WIDTH, name="up")(linen.LayerNorm()(x))
        return x + linen.Dense(WIDTH, name="down")(linen.gelu(y)), None


class LinenTransformer(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(11, WIDTH, name="embed")(tokens)
        x = x + self.param("pos_embedding", linen.initializers.normal(), (1, tokens.shape[-1], WIDTH))
        stack = linen.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="layers")(x, None)
        return linen.Dense(11, name="lm_head")(linen.LayerNorm(name="final_norm")(x))


class Cnn(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, (3, 3), rngs=rngs)
        self.conv3d = nnx.Conv(4, 16, (3, 3, 3), rngs=rngs)
        self.conv1d = nnx.Conv(4, 16, (5,), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.classifier = nnx.Linear(32, 10, rngs=rngs)


class VitBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(WIDTH, 64, rngs=rngs), nnx.gelu, nnx.Linear(64, WIDTH, rngs=rngs)
        )


class Vit(nnx.Module):
    def __init__(self, rngs):
        self.patch_embed = nnx.Conv(3, WIDTH, (4, 4), strides=(4, 4), rngs=rngs)
        self.cls_token = nnx.Param(jnp.zeros((1, 1, WIDTH)))
        self.pos_embed = nnx.Param(jnp.zeros((1, 17, WIDTH)))
        self.blocks = nnx.List([VitBlock(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)


class TiedBlock(nnx.Module):
    def __init__(self, rngs):
        self.attn_qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.mlp = nnx.LoRALinear(WIDTH, WIDTH, lora_rank=2, rngs=rngs)
        self.lstm = nnx.OptimizedLSTMCell(WIDTH, WIDTH, rngs=rngs)


class Tied(nnx.Module):
    """The embedding is the head too; the blocks are stacked by vmap."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, WIDTH, rngs=rngs)

        @nnx.split_rngs(splits=3)
        @functools.partial(nnx.vmap, in_axes=0, out_axes=0)
        def make(rngs):
            return TiedBlock(rngs)

        self.blocks = make(rngs)


class EquinoxBlock(eqx.Module):
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=a)
        self.up = eqx.nn.Linear(WIDTH, 64, key=b)
        self.down = eqx.nn.Linear(64, WIDTH, key=c)


class EquinoxTransformer(eqx.Module):
    embedding: eqx.nn.Embedding
    stem: eqx.nn.Conv2d
    gru: eqx.nn.GRUCell
    layers: list
    blocks: EquinoxBlock
    lm_head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(11, WIDTH, key=key)
        self.stem = eqx.nn.Conv2d(3, 8, 3, key=key)
        self.gru = eqx.nn.GRUCell(8, WIDTH, key=key)
        self.layers = [EquinoxBlock(key) for key in keys]
        self.blocks = eqx.filter_vmap(EquinoxBlock)(keys)
        self.lm_head = eqx.nn.Linear(WIDTH, 11, key=key)


class Moe(linen.Module):
    @linen.compact
    def __call__(self, x):
        linen.Dense(4, use_bias=False, name="router")(x)
        split = {"params": True}
        experts = linen.vmap(
            linen.Dense, variable_axes={"params": 0}, split_rngs=split, in_axes=None, axis_size=4
        )
        experts(32, name="experts_up")(x)
        self.param("experts", linen.initializers.normal(), (4, 32, WIDTH))
        return linen.Dense(WIDTH, name="shared_expert")(x)


def shapes(tree):
    """A flat mapping of slashed paths to shapes, as nested dictionaries of shapes."""
    root = {}
    for path, shape in tree.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, root)[last] = (
            jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        )
    return root


class Named:
    """A leaf in a box without keys, as Haliax has it."""

    def __init__(self, array):
        self.array = array


jax.tree_util.register_pytree_node(Named, lambda box: ((box.array,), None), lambda _, leaf: Named(*leaf))


def maxtext_llama():
    """Llama-3-8B, its layers scanned along the second axis."""
    layers = "params/decoder/layers/"
    return shapes(
        {
            "params/token_embedder/embedding": (128256, 4096),
            "params/decoder/decoder_norm/scale": (4096,),
            "params/decoder/logits_dense/kernel": (4096, 128256),
            layers + "pre_self_attention_layer_norm/scale": (4096, 32),
            layers + "post_self_attention_layer_norm/scale": (4096, 32),
            layers + "self_attention/query/kernel": (4096, 32, 32, 128),
            layers + "self_attention/key/kernel": (4096, 32, 8, 128),
            layers + "self_attention/value/kernel": (4096, 32, 8, 128),
            layers + "self_attention/out/kernel": (32, 32, 128, 4096),
            layers + "mlp/wi_0/kernel": (4096, 32, 14336),
            layers + "mlp/wi_1/kernel": (4096, 32, 14336),
            layers + "mlp/wo/kernel": (14336, 32, 4096),
        }
    )


def maxtext_mixtral():
    """Two scanned layers of a mixture of experts, and one layer beside them."""
    layers = "params/decoder/layers/"
    return shapes(
        {
            layers + "MoeBlock_0/gate/kernel": (4096, 2, 8),
            layers + "MoeBlock_0/wi_0": (8, 2, 4096, 14336),
            layers + "MoeBlock_0/wo": (8, 2, 14336, 4096),
            layers + "self_attention/wq_a/kernel": (4096, 2, 1536),
            layers + "self_attention/wq_b/kernel": (1536, 2, 32, 192),
            layers + "shared_experts/wi_0/kernel": (4096, 2, 2048),
            "params/decoder/layers_2/self_attention/query/kernel": (4096, 32, 128),
            "params/decoder/layers_2/self_attention/out/kernel": (32, 128, 4096),
            "params/decoder/layers_2/mlp/wi_0/kernel": (4096, 14336),
            "params/decoder/layers_2/MoeBlock_0/wi_0": (8, 4096, 14336),
        }
    )


def maxtext_gemma():
    """Gemma-2-9B, whose 42 layers are 21 scanned pairs of a local and a global one."""
    layers = "params/decoder/layers/"
    kinds = ("local", "global")
    return shapes(
        {"params/token_embedder/embedding": (256128, 3584), "params/decoder/decoder_norm/scale": (3584,)}
        | {layers + f"pre_self_attention_norm_{kind}/scale": (3584, 21) for kind in kinds}
        | {layers + f"self_attention_{kind}/query/kernel": (3584, 21, 16, 256) for kind in kinds}
        | {layers + f"self_attention_{kind}/value/kernel": (3584, 21, 8, 256) for kind in kinds}
        | {layers + f"self_attention_{kind}/out/kernel": (16, 21, 256, 3584) for kind in kinds}
        | {layers + f"mlp_{kind}/wi_0/kernel": (3584, 21, 14336) for kind in kinds}
        | {layers + f"mlp_{kind}/wo/kernel": (14336, 21, 3584) for kind in kinds}
    )


def levanter_gpt():
    """GPT-2 small, its layers stacked, query, key and value in one weight."""
    blocks = "transformer/blocks/stacked/"
    tree = shapes(
        {
            "embeddings/token_embeddings/weight": (50257, 768),
            "embeddings/position_embeddings/weight": (1024, 768),
            "transformer/ln_f/weight": (768,),
            blocks + "ln_1/weight": (12, 768),
            blocks + "ln_1/bias": (12, 768),
            blocks + "attn/c_attn/weight": (12, 3, 12, 64, 768),
            blocks + "attn/c_attn/bias": (12, 3, 12, 64),
            blocks + "attn/c_proj/weight": (12, 768, 12, 64),
            blocks + "mlp/c_fc/weight": (12, 3072, 768),
            blocks + "mlp/c_proj/weight": (12, 768, 3072),
        }
    )
    return jax.tree.map(Named, tree)


def levanter_llama():
    """Llama-3-8B, its layers stacked, its heads axes of their own, its outputs first."""
    layers = "transformer/layers/stacked/"
    tree = shapes(
        {
            "embeddings/token_embeddings/weight": (128256, 4096),
            "lm_head/weight": (128256, 4096),
            "transformer/norm/weight": (4096,),
            layers + "input_layernorm/weight": (32, 4096),
            layers + "post_attention_layernorm/weight": (32, 4096),
            layers + "self_attn/q_proj/weight": (32, 8, 4, 128, 4096),
            layers + "self_attn/k_proj/weight": (32, 8, 128, 4096),
            layers + "self_attn/v_proj/weight": (32, 8, 128, 4096),
            layers + "self_attn/o_proj/weight": (32, 4096, 32, 128),
            layers + "mlp/gate_proj/weight": (32, 14336, 4096),
            layers + "mlp/up_proj/weight": (32, 14336, 4096),
            layers + "mlp/down_proj/weight": (32, 4096, 14336),
            "unstacked/layers/blocks/0/self_attn/k_proj/weight": (8, 128, 4096),
            "unstacked/layers/blocks/0/self_attn/o_proj/weight": (4096, 32, 128),
        }
    )
    return jax.tree.map(Named, tree)


def haiku():
    """What Haiku's modules call their parameters."""
    return shapes(
        {
            "net/~/conv2_d/w": (3, 3, 4, 8),
            "net/~/conv2_d/b": (8,),
            "net/~/conv1_d/w": (3, 4, 8),
            "net/~/conv2_d_transpose/w": (3, 3, 6, 4),
            "net/~/depthwise_conv2_d/w": (3, 3, 1, 12),
            "net/~/embed/embeddings": (11, 16),
            "net/~/layer_norm/scale": (16,),
            "net/~/layer_norm/offset": (16,),
            "net/~/linear/w": (16, 8),
            "net/~/multi_head_attention/query/w": (16, 16),
            "net/~/lstm/linear/w": (24, 64),
            "net/~/gru/w_i": (8, 48),
            "__layer_stack_no_per_layer/mlp/~/linear_0/w": (3, 16, 16),
            "__layer_stack_no_per_layer/mlp/~/linear_0/b": (3, 16),
        }
    )


def plain():
    """Lists, tuples and dictionaries, in float32."""
    draw = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return {
        "layers": [(draw((4, 8)), draw((8,))), (draw((8, 2)), draw((2,)))],
        "w1": draw((4, 8)),
        "b1": draw((8,)),
        "stacked": {"w": draw((3, 8, 8)), "b": draw((3, 8))},
        "attn": {"c_attn": {"kernel": draw((8, 24))}},
        "temperature": draw(()),
    }


def _linen(module, *args):
    return jax.eval_shape(module.init, jax.random.key(0), *args)["params"]


def _nnx(make):
    return nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)


def _equinox(make):
    return eqx.filter(eqx.filter_eval_shape(make, jax.random.key(0)), lambda x: hasattr(x, "shape"))


MODELS = {
    "linen transformer, scanned": lambda: _linen(LinenTransformer(), jnp.zeros((1, 5), int)),
    "linen mixture of experts": lambda: _linen(Moe(), jnp.zeros((2, WIDTH))),
    "nnx gpt": lambda: _nnx(lambda rngs: text.GPT(65, rngs)),
    "nnx cnn": lambda: _nnx(Cnn),
    "nnx vit": lambda: _nnx(Vit),
    "nnx tied embeddings, stacked": lambda: _nnx(Tied),
    "equinox mlp": lambda: _equinox(lambda key: eqx.nn.MLP(3, 2, 8, 2, key=key)),
    "equinox transformer": lambda: _equinox(EquinoxTransformer),
    "maxtext llama-3-8b": maxtext_llama,
    "maxtext mixture of experts": maxtext_mixtral,
    "maxtext gemma-2-9b": maxtext_gemma,
    "levanter llama-3-8b": levanter_llama,
    "levanter gpt-2": levanter_gpt,
    "haiku": haiku,
    "plain": plain,
}
"""Name → parameters, as shapes."""


def path(name):
    """The file of a model's plan."""
    return Path(__file__).parent / "plans" / f"{name.replace(',', '').replace(' ', '-')}.txt"


if __name__ == "__main__":  # write the plans anew; read what changed before you commit it
    import optimorph

    for name, make in MODELS.items():
        path(name).parent.mkdir(exist_ok=True)
        path(name).write_text(f"{optimorph.plan(make())}\n")
