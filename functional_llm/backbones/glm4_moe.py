"""GLM-4.5 and later: experts chosen by corrected sigmoids, RoPE on half of each head's channels.

The first layers have one MLP; in all others each token also takes a shared one. Checkpoints hold
one more layer, which predicts the token after the next: it is not read. Reference:
[GLM-4.5](https://arxiv.org/abs/2508.06471).
"""

from dataclasses import dataclass

import keras

from functional_llm.backbones import llama, qwen3
from functional_llm.backbones.family import (
    COMMON_KEYS,
    ROPE_BUFFERS,
    Family,
    PartialRotaryConfig,
    complete_common_keys,
)
from functional_llm.backbones.routed_experts import (
    CONFIG_KEYS,
    CORRECTED_ROWS,
    CORRECTION,
    GGUF_KEYS,
    CorrectedConfig,
    build_decoder,
    check_routing,
    sigmoid_router,
)
from functional_llm.backbones.stacks import build_around, with_rope
from functional_llm.blocks.attention import Part, attention, heads
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import on_first_channels, rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(CorrectedConfig, PartialRotaryConfig):
    """The numbers of a GLM-4.5."""

    attention_bias: bool
    query_key_norm: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    layers = [
        build_decoder(config, i, build_attention(config), sigmoid_router(config))
        for i in range(config.num_layers)
    ]
    of_one_type = [("full_attention", layer) for layer in layers]
    return build_around(config, of_one_type, {"full_attention": with_rope(config)})


def build_attention(config: Config) -> CompositeLayer:
    """Returns the attention of a decoder layer."""

    def part(num_heads: int, name: str) -> list[Part]:
        project = heads(num_heads, config.head_dim, name, config.attention_bias)
        norms = [rms_norm(config.layer_norm_epsilon, f"{name}_norm")]
        return [project, *(norms if config.query_key_norm else []), on_first_channels(rotary())]

    return attention(
        query=part(config.num_query_heads, "query"),
        key=part(config.num_key_value_heads, "key"),
        value=[heads(config.num_key_value_heads, config.head_dim, "value", config.attention_bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=False, name="output"),
    )


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    own |= {"attention_bias": False, "use_qk_norm": False, "partial_rotary_factor": 0.5}
    own |= {"n_routed_experts": 128, "num_experts_per_tok": 8, "n_shared_experts": 1}
    own |= {"moe_intermediate_size": 1408, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}
    own |= {"routed_scaling_factor": 1.0, "first_k_dense_replace": 1}
    return complete_common_keys(check_routing(own | keys, least=2))


def ignored(config: Config) -> list[str]:
    """Returns the patterns of the tensors of the layer behind the last, here and in GGUF files."""
    return [*ROPE_BUFFERS, *(f"{x}.{config.num_layers}.*" for x in ("model.layers", "blk"))]


FAMILY = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    models="GLM-4.5, 4.5-Air, 4.6, 4.7",
    config_class=Config,
    build=build,
    config_keys={
        **COMMON_KEYS,
        "attention_bias": "attention_bias",
        "partial_rotary_factor": "partial_rotary_factor",
        "use_qk_norm": "query_key_norm",
        **CONFIG_KEYS,
        "norm_topk_prob": "normalize_weights",
        "num_nextn_predict_layers": int,
    },
    config_aliases={
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    },
    complete_keys=complete_keys,
    written_keys=lambda config: {"num_nextn_predict_layers": 0},
    weights=[*llama.WEIGHTS, *qwen3.QK_NORMS, *CORRECTED_ROWS],
    ignored=ignored,
    gguf_architecture="glm4moe",
    gguf_keys=GGUF_KEYS,
    gguf_ignored=["expert_gating_func"],
    gguf_rows=lambda config: [
        ("model.layers.{}.mlp.gate.e_score_correction.bias", CORRECTION, "same")
    ],
)
