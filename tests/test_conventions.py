"""Which leaves are matrices where nobody says so: trees as many code bases lay them out."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import linen
from optax.contrib import MuonDimensionNumbers as Axes

import sumo_optax


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def tree_of(shapes):
    tree = {}
    for path, shape in shapes.items():
        *modules, leaf = path.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = array(*shape)
    return tree


def found(tree):
    """Inputs and outputs of every matrix, by path."""
    axes = sumo_optax.flax_dimension_numbers(tree)
    flat = jax.tree_util.tree_flatten_with_path(axes, is_leaf=lambda x: isinstance(x, Axes))[0]
    return {
        "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path): (
            tuple(spec.reduction_axis),
            tuple(spec.output_axis),
        )
        for path, spec in flat
    }


IO = ((0,), (1,))  # in, out
BIO = ((1,), (2,))
OI = ((1,), (0,))
BOI = ((2,), (1,))

# What code bases lay out, and the matrices in it.
TREES = {
    "layers on the second axis": (
        {
            "layers/mlp/wi_0/kernel": (32, 3, 64),
            "layers/mlp/wo/kernel": (64, 3, 32),
            "layers/attention/query/kernel": (32, 3, 4, 16),
            "layers/attention/out/kernel": (4, 3, 16, 32),
            "layers/norm/scale": (32, 3),
        },
        {
            "layers/mlp/wi_0/kernel": ((0,), (2,)),
            "layers/mlp/wo/kernel": ((0,), (2,)),
            "layers/attention/query/kernel": ((0,), (2, 3)),
            "layers/attention/out/kernel": ((0, 2), (3,)),
        },
    ),
    "layers on the second axis, no norms": (
        {
            "layers/mlp/wi_0/kernel": (32, 3, 64),
            "layers/mlp/wo/kernel": (64, 3, 32),
            "layers/attention/query/kernel": (32, 3, 4, 16),
        },
        {
            "layers/mlp/wi_0/kernel": ((0,), (2,)),
            "layers/mlp/wo/kernel": ((0,), (2,)),
            "layers/attention/query/kernel": ((0,), (2, 3)),
        },
    ),
    "layers in several places": (
        {
            "layers/up/kernel": (32, 64, 3),
            "layers/query/kernel": (32, 3, 4, 16),
            "layers/norm/scale": (3, 32),
        },
        {"layers/up/kernel": IO, "layers/query/kernel": ((0,), (2, 3))},
    ),
    "norms called weight": (
        {
            "query_proj/weight": (6, 32, 32),
            "up/weight": (6, 128, 32),
            "norm1/weight": (6, 32),
        },
        {"query_proj/weight": BOI, "up/weight": BOI},
    ),
    "raw arrays of all layers": (
        {"wq": (6, 32, 32), "w1": (6, 32, 64), "w2": (6, 64, 32), "gains": (6, 32)},
        {"wq": BIO, "w1": BIO, "w2": BIO},
    ),
    "out before in": (
        {"conv1/weight": (32, 16, 3, 3), "up/weight": (3, 128, 64), "up/bias": (3, 128)},
        {"conv1/weight": ((1, 2, 3), (0,)), "up/weight": BOI},
    ),
    "out before in, biases": (
        {
            "conv/weight": (32, 16, 3, 3),
            "conv/bias": (32, 1, 1),
            "fc/weight": (128, 64),
            "fc/bias": (128,),
            "square/weight": (64, 64),
            "flax/weight": (64, 128),
            "flax/bias": (128,),
        },
        {"conv/weight": ((1, 2, 3), (0,)), "fc/weight": OI, "square/weight": OI, "flax/weight": IO},
    ),
    "a path that ends in an index": (
        {"up/kernel/0": (3, 64, 128), "up/bias/0": (3, 128)},
        {"up/kernel/0": BIO},
    ),
    "a leaf called value": (
        {"attn/query": (32, 4, 8), "attn/value": (32, 4, 8)},
        {"attn/query": ((0,), (1, 2)), "attn/value": ((0,), (1, 2))},
    ),
    "einsum kernels": (
        {
            "attn/q_einsum/w": (8, 64, 16),
            "attn/kv_einsum/w": (2, 4, 64, 16),
            "attn/attn_vec_einsum/w": (8, 16, 64),
            "mlp/gating_einsum": (2, 64, 256),
            "mlp/linear": (256, 64),
        },
        {
            "attn/q_einsum/w": ((1,), (0, 2)),
            "attn/kv_einsum/w": ((2,), (1, 3)),
            "attn/attn_vec_einsum/w": ((0, 1), (2,)),
            "mlp/gating_einsum": BIO,
            "mlp/linear": IO,
        },
    ),
    "einsum kernels, transposed": (
        {
            "mlp/gating_einsum/w": (2, 256, 64),
            "mlp/linear/w": (256, 64),
            "attn/qkv_einsum/w": (3, 8, 64, 16),
        },
        {
            "mlp/gating_einsum/w": BOI,
            "mlp/linear/w": IO,
            "attn/qkv_einsum/w": ((2,), (1, 3)),
        },
    ),
    "heads first": (
        {"attn/q/w": (4, 32, 8), "attn/k/w": (2, 32, 8), "attn/o/w": (4, 8, 32)},
        {
            "attn/q/w": ((1,), (0, 2)),
            "attn/k/w": ((1,), (0, 2)),
            "attn/o/w": ((0, 1), (2,)),
        },
    ),
    "axes of size 1": ({"mix": (1, 8, 6), "up": (8, 1, 6)}, {"mix": BIO, "up": ((0,), (2,))}),
    "experts": (
        {"MoeBlock_0/wi_0": (8, 4096, 14336), "MoeBlock_0/gate/kernel": (4096, 8)},
        {"MoeBlock_0/wi_0": BIO, "MoeBlock_0/gate/kernel": IO},
    ),
    "experts by their router": (
        {
            "mlp/gate_proj": (4, 64, 128),
            "mlp/down_proj": (4, 128, 64),
            "mlp/router/kernel": (64, 4),
        },
        {"mlp/gate_proj": BIO, "mlp/down_proj": BIO, "mlp/router/kernel": IO},
    ),
    "experts of a router that is out before in": (
        {
            "mlp/router/weight": (4, 64),
            "mlp/router/bias": (4,),
            "mlp/experts/gate_up_proj": (4, 64, 192),
            "mlp/experts/gate_up_proj_bias": (4, 192),
            "mlp/experts/down_proj": (4, 96, 64),
        },
        {
            "mlp/router/weight": OI,
            "mlp/experts/gate_up_proj": BIO,
            "mlp/experts/down_proj": BIO,
        },
    ),
    "heads of models and tables": (
        {
            "logits_dense/kernel": (64, 100),
            "logitdense/kernel": (64, 100),
            "output/kernel": (64, 100),
            "proj_out/kernel": (64, 100),
            "net/~/logits/w": (64, 100),
            "emb/w": (100, 64),
            "layers_0/output/kernel": (64, 64),
        },
        {"layers_0/output/kernel": IO},
    ),
    "vectors, stacked": (
        {
            "dt_bias": (64, 12),
            "A_log": (64, 12),
            "sinks": (64, 12),
            "wi_bias": (32, 2880),
            "conv1d/kernel": (4, 1, 512),
            "cls": (1, 1, 64),
        },
        {},
    ),
}


@pytest.mark.parametrize("shapes, matrices", TREES.values(), ids=TREES)
def test_trees(shapes, matrices):
    assert found(tree_of(shapes)) == matrices


# Sizes that leaves share by chance, or because it is the model's width.
NO_STACKS = {
    "as many heads as numbers in each": (
        {"query/kernel": (16, 4, 4), "query/bias": (4, 4)},
        {"query/kernel": ((0,), (1, 2))},
    ),
    "a block that reads the width alone": (
        {"query/kernel": (16, 2, 8), "up/kernel": (16, 40), "up/bias": (40,)},
        {"query/kernel": ((0,), (1, 2)), "up/kernel": IO},
    ),
    "heads, with a norm of each": (
        {
            "q/kernel": (32, 4, 8),
            "k/kernel": (32, 4, 8),
            "out/kernel": (4, 8, 32),
            "q_norm/scale": (4, 8),
        },
        {"q/kernel": ((0,), (1, 2)), "k/kernel": ((0,), (1, 2)), "out/kernel": ((0, 1), (2,))},
    ),
    "convolutions over time": (
        {"conv_0/w": (3, 8, 16), "conv_1/w": (3, 16, 16), "conv_2/w": (3, 16, 8)},
        {f"conv_{i}/w": ((0, 1), (2,)) for i in range(3)},
    ),
    "a layer alone": (
        {"layers/q_proj/kernel": (1, 8, 8), "layers/norm/scale": (1, 8)},
        {"layers/q_proj/kernel": BIO},
    ),
    "a cube": ({"up/kernel": (4, 4, 4), "up/bias": (4, 4)}, {}),
}


@pytest.mark.parametrize("shapes, matrices", NO_STACKS.values(), ids=NO_STACKS)
def test_no_stacks(shapes, matrices):
    assert found(tree_of(shapes)) == matrices


def test_names_with_slashes_are_several():
    """Haiku's parameters are two levels deep."""
    tree = {
        "net/~/logits": {"w": array(64, 100), "b": array(100)},
        "net/~/linear": {"w": array(64, 128), "b": array(128)},
        "net/~/conv2_d": {"w": array(3, 3, 8, 16), "b": array(16)},
    }
    assert found(tree) == {"net/~/linear/w": IO, "net/~/conv2_d/w": ((0, 1, 2), (3,))}


# Metadata


class Variable:
    """As NNX's are: one array, and what is said about it."""

    def __init__(self, value, **metadata):
        self.value, self.metadata = value, metadata

    def get_metadata(self):
        return self.metadata

    def copy(self, **metadata):
        return Variable(self.value, **(self.metadata | metadata))


jax.tree_util.register_pytree_with_keys(
    Variable,
    lambda x: (((jax.tree_util.GetAttrKey("value"), x.value),), tuple(x.metadata.items())),
    lambda metadata, children: Variable(children[0], **dict(metadata)),
)

VARIABLES = {
    "layers, heads": ((6, 32, 4, 8), dict(out_sharding=("layers", "embed", "heads", "kv"))),
    "layers second": ((32, 6, 64), dict(sharding_names=("embed", "layers", "mlp"))),
    "scan axis": ((32, 6, 64), dict(param_scan_axis=1)),
    "experts": ((8, 6, 32, 64), dict(out_sharding=("exp", "layers", "embed", "mlp"))),
    "heads first": ((4, 32, 8), dict(out_sharding=("heads", "embed", None))),
    "out of heads": ((4, 8, 32), dict(out_sharding=("heads", "kv", "embed"))),
    "router": ((32, 8), dict(out_sharding=("embed", "exp"))),
    "axes of a mesh": ((32, 8), dict(out_sharding=(("fsdp", "data"), None))),
    "vocabulary": ((32, 100), dict(out_sharding=("embed", "vocab"))),
}
SAID = {
    "layers, heads": ((1,), (2, 3)),
    "layers second": ((0,), (2,)),
    "scan axis": ((0,), (2,)),
    "experts": ((2,), (3,)),
    "heads first": ((1,), (0, 2)),
    "out of heads": ((0, 1), (2,)),
    "router": IO,
    "axes of a mesh": IO,
}


@pytest.mark.parametrize("name", VARIABLES)
def test_axis_names_of_variables(name):
    shape, metadata = VARIABLES[name]
    tree = {"layer": {"w": Variable(array(*shape), **metadata)}}
    assert list(found(tree).values()) == ([SAID[name]] if name in SAID else [])


def test_several_names_on_an_axis_are_of_a_mesh():
    sharding = (("fsdp", "expert"), "tensor", None)
    tree = {"query": {"kernel": Variable(array(32, 4, 8), out_sharding=sharding)}}
    assert list(found(tree).values()) == [((0,), (1, 2))]


def test_what_init_alone_was_told_is_asked_for():
    """As with nnx.Optimizer, which gives `update` arrays without their variables."""
    is_variable = lambda x: isinstance(x, Variable)
    pure = lambda tree: jax.tree.map(
        lambda x: x.value if is_variable(x) else x, tree, is_leaf=is_variable
    )
    names = ("heads", "embed", "kv")
    params = {"mix": Variable(jnp.ones((4, 32, 8)), sharding_names=names), "w": jnp.ones((8, 6))}
    tx = sumo_optax.scale_by_sumo(2)
    with pytest.raises(ValueError, match="mix is not a matrix here.*flax_dimension_numbers"):
        tx.update(pure(params), pure(tx.init(params)))
    told = sumo_optax.flax_dimension_numbers(params)
    tx = sumo_optax.scale_by_sumo(2, weight_dimension_numbers=told)
    _, state = jax.eval_shape(tx.update, pure(params), pure(tx.init(params)))
    assert state.basis["mix"].shape == (32, 2)


def test_axis_names_of_linen_boxes():
    tree = {
        "up": {"kernel": linen.Partitioned(array(32, 6, 64), names=("embed", "layers", "mlp"))},
        "attn": {
            "kernel": linen.LogicallyPartitioned(array(4, 32, 8), names=("heads", "embed", "kv"))
        },
    }
    assert list(found(tree).values()) == [((1,), (0, 2)), ((0,), (2,))]


# Types of modules


def test_equinox_layers_are_out_in_whatever_their_shapes():
    key = jax.random.key(0)
    attention = eqx.filter_vmap(lambda key: eqx.nn.MultiheadAttention(2, 32, key=key))
    model = eqx.filter_eval_shape(
        lambda: {
            "attention": attention(jax.random.split(key, 6)),
            "conv": eqx.nn.Conv2d(16, 32, 3, key=key),
            "depthwise": eqx.nn.Conv1d(16, 16, 3, groups=16, key=key),
            "lookup": eqx.nn.Embedding(10, 4, key=key),
            "cell": eqx.nn.LSTMCell(4, 8, key=key),
        }
    )
    names = ("query", "key", "value", "output")
    assert found(eqx.filter(model, lambda x: hasattr(x, "shape"))) == {
        **{f"attention/{name}_proj/weight": BOI for name in names},
        "conv/weight": ((1, 2, 3), (0,)),
        "cell/weight_ih": OI,
        "cell/weight_hh": OI,
    }


@dataclasses.dataclass(frozen=True)
class Axis:
    name: str
    size: int


class NamedArray(eqx.Module):
    array: jax.Array
    axes: tuple[Axis, ...] = eqx.field(static=True)


class Linear(eqx.Module):
    weight: NamedArray
    bias: NamedArray
    In: Axis = eqx.field(static=True)
    Out: tuple[Axis, ...] = eqx.field(static=True)


Linear.__module__ = "haliax.nn.linear"


def test_haliax_layers_say_which_axes_are_which():
    layers, embed, heads, size = Axis("l", 3), Axis("e", 32), Axis("h", 4), Axis("s", 8)
    named = lambda *axes: NamedArray(array(*(a.size for a in axes)), axes)
    linear = lambda *axes: Linear(named(*axes), named(layers, heads, size), embed, (heads, size))
    model = {"q": linear(layers, heads, size, embed), "q2": linear(embed, layers, heads, size)}
    assert found(model) == {
        "q/weight/array": ((3,), (1, 2)),
        "q2/weight/array": ((0,), (2, 3)),
    }


# Whole models, as their code bases lay them out. No leaf is ambiguous, and no axis wrong.


def layered(shapes, layers):
    """Those with a * in their path for each layer."""
    numbered = {k: v for k, v in shapes.items() if "*" not in k}
    for i in range(layers):
        numbered |= {k.replace("*", str(i)): v for k, v in shapes.items() if "*" in k}
    return numbered


def scanned(shapes, layers, axis):
    """Those with a * in their path stacked on an axis, or on the last if they have fewer."""
    insert = lambda s: (*s[: min(axis, len(s))], layers, *s[min(axis, len(s)) :])
    return {without_star(k): insert(v) if "*" in k else v for k, v in shapes.items()}


def without_star(path):
    return path.replace("/*", "").replace("_*", "")


GEMMA = {
    "embedder/input_embedding": (256128, 2304),
    "final_norm/scale": (2304,),
    "layer_*/attn/q_einsum/w": (8, 2304, 256),
    "layer_*/attn/kv_einsum/w": (2, 4, 2304, 256),
    "layer_*/attn/attn_vec_einsum/w": (8, 256, 2304),
    "layer_*/attn/_query_norm/scale": (256,),
    "layer_*/mlp/gating_einsum": (2, 2304, 9216),
    "layer_*/mlp/linear": (9216, 2304),
    "layer_*/pre_attention_norm/scale": (2304,),
    "layer_*/post_attention_norm/scale": (2304,),
    "layer_*/pre_ffw_norm/scale": (2304,),
    "layer_*/post_ffw_norm/scale": (2304,),
}
TUNIX_GEMMA_4 = {
    k.replace("layer_*", "layers/*"): v for k, v in GEMMA.items() if "mlp" not in k
} | {
    "layers/*/mlp/gate_proj/kernel": (2304, 9216),
    "layers/*/mlp/down_proj/kernel": (9216, 2304),
    "layers/*/attn/k_einsum/w": (2, 2304, 512),
    "layers/*/moe/gating_einsum": (16, 2, 704, 2304),
    "layers/*/moe/linear": (16, 704, 2304),
    "layers/*/moe/router_logits": (2304, 16),
    "layers/*/moe/router_scale": (2304,),
    "layers/*/moe/per_expert_scale": (16,),
    "layers/*/skip_scale": (1,),
}
TUNIX_QWEN = {
    "embedder/input_embedding": (1000, 64),
    "lm_head/w": (64, 1000),
    "final_norm/w": (64,),
    "layers/*/input_layernorm/w": (64,),
    "layers/*/attn/q_proj/w": (64, 8, 16),
    "layers/*/attn/k_proj/w": (64, 2, 16),
    "layers/*/attn/v_proj/w": (64, 2, 16),
    "layers/*/attn/o_proj/w": (8, 16, 64),
    "layers/*/attn/q_norm/w": (16,),
    "layers/*/attn/q_bias": (128,),
    "layers/*/mlp/gate_proj": (4, 64, 96),
    "layers/*/mlp/up_proj": (4, 64, 96),
    "layers/*/mlp/down_proj": (4, 96, 64),
    "layers/*/mlp/router/kernel": (64, 4),
}
TUNIX_LLAMA = {k: v for k, v in TUNIX_QWEN.items() if "mlp" not in k} | {
    "layers/*/mlp/gate_proj/kernel": (64, 96),
    "layers/*/mlp/up_proj/kernel": (64, 96),
    "layers/*/mlp/down_proj/kernel": (96, 64),
}
MAXTEXT = {
    "params/token_embedder/embedding": (1000, 64),
    "params/decoder/logits_dense/kernel": (64, 1000),
    "params/decoder/decoder_norm/scale": (64,),
    "params/decoder/layers/*/pre_self_attention_layer_norm/scale": (64,),
    "params/decoder/layers/*/self_attention/query/kernel": (64, 8, 16),
    "params/decoder/layers/*/self_attention/key/kernel": (64, 2, 16),
    "params/decoder/layers/*/self_attention/value/kernel": (64, 2, 16),
    "params/decoder/layers/*/self_attention/out/kernel": (8, 16, 64),
}
MAXTEXT_LLAMA = MAXTEXT | {
    "params/decoder/layers/*/mlp/wi_0/kernel": (64, 96),
    "params/decoder/layers/*/mlp/wi_1/kernel": (64, 96),
    "params/decoder/layers/*/mlp/wo/kernel": (96, 64),
}
MAXTEXT_MIXTRAL = MAXTEXT | {
    "params/decoder/layers/*/MoeBlock_0/gate/kernel": (64, 4),
    "params/decoder/layers/*/MoeBlock_0/wi_0": (4, 64, 96),
    "params/decoder/layers/*/MoeBlock_0/wi_1": (4, 64, 96),
    "params/decoder/layers/*/MoeBlock_0/wo": (4, 96, 64),
}
MAXTEXT_GPT_OSS = MAXTEXT | {
    "params/decoder/layers/*/GptOssAttention/query/kernel": (64, 8, 16),
    "params/decoder/layers/*/GptOssAttention/query/bias": (8, 16),
    "params/decoder/layers/*/GptOssAttention/out/kernel": (8, 16, 64),
    "params/decoder/layers/*/GptOssAttention/out/bias": (64,),
    "params/decoder/layers/*/GptOssAttention/sinks": (8,),
    "params/decoder/layers/*/GptOssMlp/gate/kernel": (64, 4),
    "params/decoder/layers/*/GptOssMlp/gate/bias": (4,),
    "params/decoder/layers/*/GptOssMlp/wi_0": (4, 64, 96),
    "params/decoder/layers/*/GptOssMlp/wi_0_bias": (4, 96),
    "params/decoder/layers/*/GptOssMlp/wo": (4, 96, 64),
    "params/decoder/layers/*/GptOssMlp/wo_bias": (4, 64),
}
MAXTEXT_DEEPSEEK = MAXTEXT_MIXTRAL | {
    "params/decoder/layers/*/self_attention/wq_a/kernel": (64, 48),
    "params/decoder/layers/*/self_attention/wq_b/kernel": (48, 8, 24),
    "params/decoder/layers/*/self_attention/wkv_a/kernel": (64, 40),
    "params/decoder/layers/*/self_attention/wkv_b/kernel": (32, 8, 28),
    "params/decoder/layers/*/self_attention/kv_norm/scale": (32,),
}
# Attention that stands in a block named after its experts, and is none of them.
_among_experts = lambda path: path.replace("r/layers", "r/moe_layers").replace("Moe", "moe/Moe")
MAXTEXT_DEEPSEEK = {_among_experts(path): shape for path, shape in MAXTEXT_DEEPSEEK.items()} | {
    "params/decoder/moe_layers/*/moe/shared_experts/wi_0/kernel": (64, 48),
    "params/decoder/moe_layers/*/self_attention/o_a_proj/kernel": (2, 64, 24),
    "params/decoder/moe_layers/*/self_attention/csa_compressor/position_bias": (4, 24),
}
VIT = {
    "embedding/kernel": (16, 16, 3, 64),
    "embedding/bias": (64,),
    "pos_embedding": (1, 196, 64),
    "cls": (1, 1, 64),
    "MAPHead_0/probe": (1, 1, 64),
    "MAPHead_0/MultiHeadDotProductAttention_0/query/kernel": (64, 4, 16),
    "MAPHead_0/MultiHeadDotProductAttention_0/out/kernel": (4, 16, 64),
    "MAPHead_0/MlpBlock_0/Dense_0/kernel": (64, 256),
    "MAPHead_0/LayerNorm_0/scale": (64,),
    "Transformer/encoder_norm/scale": (64,),
    "Transformer/encoderblock_*/LayerNorm_0/scale": (64,),
    "Transformer/encoderblock_*/MultiHeadDotProductAttention_0/query/kernel": (64, 4, 16),
    "Transformer/encoderblock_*/MultiHeadDotProductAttention_0/query/bias": (4, 16),
    "Transformer/encoderblock_*/MultiHeadDotProductAttention_0/out/kernel": (4, 16, 64),
    "Transformer/encoderblock_*/MultiHeadDotProductAttention_0/out/bias": (64,),
    "Transformer/encoderblock_*/MlpBlock_0/Dense_0/kernel": (64, 256),
    "Transformer/encoderblock_*/MlpBlock_0/Dense_0/bias": (256,),
    "Transformer/encoderblock_*/MlpBlock_0/Dense_1/kernel": (256, 64),
    "Transformer/encoderblock_*/MlpBlock_0/Dense_1/bias": (64,),
    "head/kernel": (64, 1000),
}
RESNET = {
    "conv_init/kernel": (7, 7, 3, 64),
    "bn_init/scale": (64,),
    "BottleneckResNetBlock_*/Conv_0/kernel": (1, 1, 64, 16),
    "BottleneckResNetBlock_*/Conv_1/kernel": (3, 3, 16, 16),
    "BottleneckResNetBlock_*/BatchNorm_0/scale": (16,),
    "BottleneckResNetBlock_*/conv_proj/kernel": (1, 1, 16, 64),
    "Dense_0/kernel": (64, 1000),
    "Dense_0/bias": (1000,),
}
# Matrices of one layer, by the module (or leaf) that ends their path: inputs and outputs.
ROLES = {
    "q_einsum/w": ((1,), (0, 2)),
    "kv_einsum/w": ((2,), (1, 3)),
    "attn_vec_einsum/w": ((0, 1), (2,)),
    "k_einsum/w": ((1,), (0, 2)),
    "mlp/gating_einsum": BIO,
    "moe/gating_einsum": ((3,), (2,)),
    "moe/linear": BIO,
    **{name: ((0,), (1, 2)) for name in ("q_proj/w", "k_proj/w", "v_proj/w")},
    **{f"{name}/kernel": ((0,), (1, 2)) for name in ("query", "key", "value", "wq_b", "wkv_b")},
    **{name: ((0, 1), (2,)) for name in ("o_proj/w", "out/kernel")},
    "o_a_proj/kernel": BIO,
    **{name: BIO for name in ("wi_0", "wi_1", "wo", "gate_proj", "up_proj", "down_proj")},
    **{
        f"{name}/kernel": ((0, 1, 2), (3,))
        for name in ("Conv_0", "Conv_1", "conv_proj", "conv_init")
    },
}
NONE = (
    "embed",
    "norm",
    "Norm",
    "bias",
    "logits",
    "head/",
    "lm_head",
    "probe",
    "_scale",
    "sinks",
    "cls",
    "bn_",
)


def expected(shapes):
    """By hand: what is no matrix by a part of its path, what is one by its role, else (in, out)."""
    of_role = lambda path: [v for k, v in ROLES.items() if ("/" + path).endswith("/" + k)] or [IO]
    return {path: of_role(path)[-1] for path in shapes if not any(part in path for part in NONE)}


def moved(axes, axis, one):
    """The axes of a matrix once a stack is put before `axis`, or at the end of fewer axes."""
    at = min(axis, len(one))
    return tuple(tuple(a + (a >= at) for a in side) for side in axes)


MODELS = {
    "Gemma 2 2B": (GEMMA, False),
    "Gemma 4, Tunix": (TUNIX_GEMMA_4, False),
    "Qwen 3, Tunix": (TUNIX_QWEN, False),
    "Llama 3, Tunix": (TUNIX_LLAMA, False),
    "Llama, MaxText": (MAXTEXT_LLAMA, True),
    "Mixtral, MaxText": (MAXTEXT_MIXTRAL, True),
    "GPT-OSS, MaxText": (MAXTEXT_GPT_OSS, True),
    "DeepSeek, MaxText": (MAXTEXT_DEEPSEEK, True),
    "ViT, big_vision": (VIT, True),
    "ResNet, Flax": (RESNET, False),
}


@pytest.mark.parametrize("shapes, _", MODELS.values(), ids=MODELS)
def test_models_layer_by_layer(shapes, _):
    shapes = layered(shapes, 2)
    assert found(tree_of(shapes)) == expected(shapes)
    assert_nothing_ambiguous(tree_of(shapes))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shapes", [x for x, scans in MODELS.values() if scans],
                         ids=[k for k, (_, scans) in MODELS.items() if scans])  # fmt: skip
def test_models_scanned(shapes, axis):
    stacked = scanned(shapes, 3, axis)
    one = expected(shapes)
    matrices = {
        without_star(path): moved(axes, axis, shapes[path]) if "*" in path else axes
        for path, axes in one.items()
    }
    assert found(tree_of(stacked)) == matrices
    assert_nothing_ambiguous(tree_of(stacked))


def assert_nothing_ambiguous(tree):
    report = sumo_optax.describe(4, tree)
    assert {leaf.role for leaf in report.leaves} == {"matrix", "fallback"}
    jax.eval_shape(sumo_optax.sumo(1e-3, 4).init, tree)  # and no warning


def test_state_of_gemma_2_2b_is_its_embeddings():
    report = sumo_optax.describe(8, tree_of(layered(GEMMA, 26)))
    of = lambda kind, role: sum(getattr(x, kind) for x in report.leaves if x.role == role)
    assert of("state_bytes", "matrix") < 0.05 * of("adamw_bytes", "matrix")
    embedding = next(x for x in report.leaves if x.path == "embedder/input_embedding")
    assert of("state_bytes", "fallback") < 1.001 * embedding.adamw_bytes
