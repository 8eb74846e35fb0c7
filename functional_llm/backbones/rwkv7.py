"""RWKV-7: no attention, but a matrix for each head, which decays, forgets and learns at each token.

Each layer's two branches also see the token before. Values of the first layer go into those of all
others. Transformers has no such model: names of keys and tensors are those of
flash-linear-attention (`fla-hub`). Reference: [RWKV-7](https://arxiv.org/abs/2503.14456).
"""

from dataclasses import dataclass
from functools import partial

from functional_llm.backbones import rwkv7_rows
from functional_llm.backbones.family import Family, ModelConfig
from functional_llm.backbones.keras_hub import rwkv as keras_hub
from functional_llm.backbones.stacks import build_of_types
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.language_model import Graph, StateType
from functional_llm.blocks.norm import layer_norm
from functional_llm.blocks.rwkv import channel_mix, rwkv_shapes, time_mix
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """The numbers of an RWKV-7, beside those of every model."""

    head_dim: int
    decay_dim: int
    rate_dim: int
    value_mix_dim: int
    gate_dim: int


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    layers = [build_decoder(config, i) for i in range(config.num_layers)]
    return build_of_types(
        config,
        [("rwkv", layer) for layer in layers],
        {"rwkv": (StateType(), rwkv_shapes(config.hidden_dim, config.head_dim))},
        layer_norm,
        embedding_parts=[layer_norm(config.layer_norm_epsilon, "embedding_norm")],
        lenders={layer.name: layers[0].name for layer in layers[1:]},
    )


def build_decoder(config: Config, index: int) -> CompositeLayer:
    """Returns the decoder layer of this number."""
    ranks = {"decay": config.decay_dim, "rate": config.rate_dim, "gate": config.gate_dim}
    ranks |= {"value": config.value_mix_dim} if index else {}
    epsilon = config.layer_norm_epsilon
    through_time = time_mix(config.hidden_dim, config.head_dim, config.head_dim * epsilon, ranks)
    mlp = channel_mix(config.intermediate_dim, config.hidden_dim, config.activation)
    return pre_norm(f"decoder_{index}", partial(layer_norm, epsilon), through_time, mlp)


def complete_keys(keys: JSON) -> JSON:
    """Adds fla's defaults for keys that a `config.json` leaves out; checks what is no choice."""
    own: JSON = {
        "head_dim": 64,
        "hidden_ratio": 4.0,
        "max_position_embeddings": 2048,
        "norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "activation": "relu2",
    }
    keys = own | keys
    width, size = keys["hidden_size"], keys["head_dim"]
    wide = int(width * keys["hidden_ratio"])
    keys = {"intermediate_size": -(-wide // 32) * 32, **keys}
    if width % size or keys.get("num_heads", width // size) != width // size:
        raise ValueError(
            "config.json: expected hidden_size to be head_dim times num_heads, received "
            f"{width}, {size} and {keys.get('num_heads')}."
        )
    values = keys.get("value_dim", [])
    if any(x != width for x in values) or len(values) not in (0, keys["num_hidden_layers"]):
        raise ValueError(
            f"config.json: expected value_dim to be hidden_size, {width}, for each of the "
            f"{keys['num_hidden_layers']} layers. Received: {values}."
        )
    return keys


_CONSTANTS: JSON = {"hidden_act": "sqrelu", "norm_first": True, "norm_bias": True, "attn": None}
# How fla computes it.
_KERNELS = "attn_mode fuse_norm fuse_cross_entropy fuse_linear_cross_entropy use_l2warp".split()
FAMILY = Family(
    model_type="rwkv7",
    architecture="RWKV7ForCausalLM",
    models="RWKV-7 (Goose)",
    config_class=Config,
    build=build,
    config_keys={
        "vocab_size": "vocabulary_size",
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_dim",
        "intermediate_size": "intermediate_dim",
        "norm_eps": "layer_norm_epsilon",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "tie_word_embeddings",
        "head_dim": "head_dim",
        "decay_low_rank_dim": "decay_dim",
        "a_low_rank_dim": "rate_dim",
        "v_low_rank_dim": "value_mix_dim",
        "gate_low_rank_dim": "gate_dim",
        "hidden_ratio": float,
        "num_heads": int,
        "value_dim": list,
        **dict.fromkeys(_KERNELS, object),
    },
    config_constants=_CONSTANTS,
    config_nulls=(),
    complete_keys=complete_keys,
    written_keys=lambda config: dict(_CONSTANTS),
    weights=rwkv7_rows.weights,
    parameters=(),
    # Of a first layer, which has no such part: copies of others, so that llama.cpp finds some.
    ignored=["blk.0.time_mix_v[012].weight", "model.layers.0.attn.v_lora.*"],
    gguf_architecture="rwkv7",
    gguf_given=lambda given: {k: x for k, x in given.items() if k != "attention.head_count"},
    gguf_keys=rwkv7_rows.GGUF_KEYS,
    gguf_rows=rwkv7_rows.gguf_rows,
    keras_hub=keras_hub.RWKV7,
)
