"""The parameters of a decoder, from its sizes or from its config.json on Hugging Face."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sumo_optax._paths import PyTree

QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION = (*QKV, "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
FOUR_NORMS = (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


class Model(NamedTuple):
    """The shape of a decoder; of a LLaMA, where nothing else is said."""

    vocab: int
    width: int
    hidden: int  # of an MLP, or of one expert
    layers: int
    heads: int  # of queries
    query_width: int  # heads times the width of one
    key_width: int  # the same of keys and values
    tied: bool = False  # whether the embedding is the output head as well
    gated: bool = True  # whether the MLP has a gate
    joined_qkv: bool = False  # whether queries, keys and values come from one matrix
    joined_gate: bool = False  # whether gate and up are one matrix
    biases: tuple[str, ...] = ()  # the projections that have one
    norms: tuple[str, ...] = NORMS  # of a layer
    norm_biases: bool = False
    head_norms: bool = False  # of queries and keys, over the width of a head
    positions: int = 0  # that have a learned embedding
    experts: int = 0  # in each layer; 0 for an MLP alone
    shared_hidden: int = 0  # of an expert that takes every token


def parameters(model: Model, dtype: Any) -> PyTree:
    """Shapes of the parameters, all layers stacked."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)

    def dense(name: str, *shape: int, stack: tuple[int, ...] = (model.layers,)) -> PyTree:
        bias = {"bias": array(*stack, shape[-1])} if name in model.biases else {}
        return {"kernel": array(*stack, *shape)} | bias

    def norm(*shape: int) -> PyTree:
        return {"scale": array(*shape)} | ({"bias": array(*shape)} if model.norm_biases else {})

    def attention() -> PyTree:
        d, q, k = model.width, model.query_width, model.key_width
        widths = dict(zip(QKV, (q, k, k), strict=True))
        projections = {name: dense(name, d, width) for name, width in widths.items()}
        if model.joined_qkv:
            bias = {"bias": array(model.layers, q + 2 * k)} if "q_proj" in model.biases else {}
            projections = {"qkv_proj": {"kernel": array(model.layers, d, q + 2 * k)} | bias}
        over_heads = {"scale": array(model.layers, q // model.heads)}
        norms = {"q_norm": over_heads, "k_norm": over_heads} if model.head_norms else {}
        return projections | {"o_proj": dense("o_proj", q, d)} | norms

    def mlp(hidden: int, *experts: int) -> PyTree:
        d, stack = model.width, (model.layers, *experts)
        ends = {"down_proj": dense("down_proj", hidden, d, stack=stack)}
        if model.gated and model.joined_gate:
            return {"gate_up_proj": dense("gate_up_proj", d, 2 * hidden, stack=stack)} | ends
        starts = ("gate_proj", "up_proj") if model.gated else ("up_proj",)
        return {name: dense(name, d, hidden, stack=stack) for name in starts} | ends

    def mixture() -> PyTree:
        if not model.experts:
            return {"mlp": mlp(model.hidden)}
        router = {"kernel": array(model.layers, model.width, model.experts)}
        found = {"router": router, "experts": mlp(model.hidden, model.experts)}
        if model.shared_hidden:
            gate = {"kernel": array(model.layers, model.width, 1)}
            found |= {"shared_expert": mlp(model.shared_hidden), "shared_expert_gate": gate}
        return found

    d = model.width
    head = {} if model.tied else {"lm_head": dense("lm_head", d, model.vocab, stack=())}
    positions = {"embed_positions": {"embedding": array(model.positions, d)}}
    norms = {name: norm(model.layers, d) for name in model.norms}
    return (
        {"embed_tokens": {"embedding": array(model.vocab, d)}}
        | (positions if model.positions else {})
        | {"layers": {"self_attn": attention()} | mixture() | norms, "norm": norm(d)}
        | head
    )


class Family(NamedTuple):
    """In what the config.json of a `model_type` differs from that of LLaMA."""

    names: Mapping[str, str] = {}  # of its sizes
    left_out: Mapping[str, Any] = {}  # what its files may leave out
    traits: Mapping[str, Any] = {}  # of every model, for `Model`
    hidden_over_width: int | None = None  # where its files leave out the hidden width
    more_positions: int | None = None  # learned, beyond those said; None where none is learned
    may_have_experts: bool = False


LLAMA = Family()
GEMMA = {"tie_word_embeddings": True, "head_dim": 256}
GEMMA_3 = Family(
    left_out={**GEMMA, "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4},
    traits={"norms": FOUR_NORMS, "head_norms": True},
)
GPT_2_NAMES = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
PLAIN = {"gated": False, "norm_biases": True}  # as before LLaMA

FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": Family(may_have_experts=True),
    "qwen2": Family(traits={"biases": QKV}),
    "qwen2_moe": Family(traits={"biases": QKV}, may_have_experts=True),
    "qwen3": Family(traits={"head_norms": True}, left_out={"head_dim": 128}),
    "qwen3_moe": Family(
        traits={"head_norms": True}, left_out={"head_dim": 128}, may_have_experts=True
    ),
    "gemma": Family(left_out=GEMMA),
    "gemma2": Family(left_out=GEMMA, traits={"norms": FOUR_NORMS}),
    "gemma3": GEMMA_3,
    "gemma3_text": GEMMA_3,
    "phi3": Family(traits={"joined_qkv": True, "joined_gate": True}),
    "phi": Family(traits={**PLAIN, "biases": (*ATTENTION, *MLP, "lm_head"), "norms": NORMS[:1]}),
    "gpt2": Family(
        names=GPT_2_NAMES,
        left_out={"tie_word_embeddings": True},
        hidden_over_width=4,
        more_positions=0,
        traits={**PLAIN, "joined_qkv": True, "biases": (*ATTENTION, *MLP)},
    ),
    "gpt_neox": Family(
        left_out={"attention_bias": True}, traits={**PLAIN, "joined_qkv": True, "biases": MLP}
    ),
    "opt": Family(
        names={"intermediate_size": "ffn_dim"},
        left_out={"tie_word_embeddings": True},
        more_positions=2,
        traits={**PLAIN, "biases": (*ATTENTION, *MLP)},
    ),
}

# A file may say so of projections; experts go by several names.
BIASES = {"attention_bias": ATTENTION, "mlp_bias": MLP}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")

# What changes the shapes in a way that is not known here, unless it has this value.
NOT_KNOWN = {
    "kv_lora_rank": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "add_cross_attention": False,
    "qk_layernorm": False,
}


def read_config(path: Path) -> tuple[Model, str]:
    """The shape in a decoder's config.json, and a remark on how it was read, or "".

    `path` is the file or its folder.
    """
    if path.is_dir():
        path = path / "config.json"
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object")
    try:
        return _of_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _of_config(config: Mapping[str, Any]) -> tuple[Model, str]:
    if isinstance(config.get("text_config"), dict):
        inner = {"model_type": config.get("model_type"), **config["text_config"]}
        model, remark = _of_config(inner)
        return model, f"Only the language model is counted.{remark and ' '}{remark}"
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    remark = ""
    if family is None:
        if not any(x.endswith("ForCausalLM") for x in config.get("architectures") or ()):
            raise ValueError(
                f"not a decoder that can be read: model_type is {kind!r}, and no name in"
                f" architectures ends in ForCausalLM; known are {', '.join(FAMILIES)}"
            )
        family = LLAMA
        remark = f"The model_type {kind!r} is not known. The model is read as a LLaMA."
    return _model(config, family), remark


def _model(config: Mapping[str, Any], family: Family) -> Model:
    for name, value in NOT_KNOWN.items():
        if config.get(name, value) not in (value, None):
            raise ValueError(
                f"{name} is {json.dumps(config[name])}, but only models with"
                f" {json.dumps(value)} can be read"
            )
    given = {**family.left_out, **{k: v for k, v in config.items() if v is not None}}

    def size(name: str, default: int | None = None) -> int:
        name = family.names.get(name, name)
        value = given.get(name, default)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        return value

    width, heads = size("hidden_size"), size("num_attention_heads")
    if given.get("word_embed_proj_dim", width) != width:
        raise ValueError("word_embed_proj_dim must be hidden_size")
    experts = max((given.get(name, 0) for name in EXPERTS), default=0)
    if experts and not family.may_have_experts:
        known = [name for name, family in FAMILIES.items() if family.may_have_experts]
        raise ValueError(
            f"the model_type of a model with experts must be one of {', '.join(known)}"
        )
    of_experts = experts and "moe_intermediate_size" in given
    hidden = "moe_intermediate_size" if of_experts else "intermediate_size"
    head_width, more = size("head_dim", width // heads), family.more_positions
    traits = dict(family.traits)
    said = [name for flag, names in BIASES.items() if given.get(flag) for name in names]
    traits["biases"] = (*traits.get("biases", ()), *said)
    return Model(
        vocab=size("vocab_size"),
        width=width,
        hidden=size(hidden, family.hidden_over_width and family.hidden_over_width * width),
        layers=size("num_hidden_layers"),
        heads=heads,
        query_width=heads * head_width,
        key_width=size("num_key_value_heads", heads) * head_width,
        tied=bool(given.get("tie_word_embeddings")),
        positions=0 if more is None else size("max_position_embeddings") + more,
        experts=experts,
        shared_hidden=given.get("shared_expert_intermediate_size", 0),
        **traits,
    )
