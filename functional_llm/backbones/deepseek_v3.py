"""DeepSeek V3: a DeepSeek V2 whose experts are scored one by one, and balanced by a correction.

A score is a sigmoid; the correction counts in the choice, not in the weights. Tensors of layers
beyond the last, which predict more tokens, are left out. Reference:
[DeepSeek-V3](https://arxiv.org/abs/2412.19437).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from functional_llm.backbones import latent, latent_experts, llama, routed_experts
from functional_llm.backbones.family import Family
from functional_llm.backbones.latent_experts import ExpertConfig
from functional_llm.backbones.routed_experts import CORRECTION, CorrectedConfig, sigmoid_router
from functional_llm.backbones.transforms import Rows
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.rope import rotary, rotary_pairs
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(CorrectedConfig, ExpertConfig):
    """The numbers of a DeepSeek V3."""

    rotates_pairs: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    rotate = rotary_pairs() if config.rotates_pairs else rotary()
    layers = []
    for i in range(config.num_layers):
        attention = latent.build_attention(config, [rotate], config.rope_scaling)
        layers.append(routed_experts.build_decoder(config, i, attention, sigmoid_router(config)))
    return latent.build_around(config, layers)


_NULL_IS_FALSE = ("norm_topk_prob", "rope_interleave")


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {"first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1}
    own |= {"routed_scaling_factor": 2.5, "moe_intermediate_size": 2048, "norm_topk_prob": True}
    own |= {"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "rope_interleave": True}
    own |= {"max_position_embeddings": 4096, "intermediate_size": 18432}
    keys = own | keys
    keys |= {key: bool(keys[key]) for key in _NULL_IS_FALSE}
    return latent.complete_keys(routed_experts.check_routing(keys, least=2))


def weights(config: Config) -> Rows:
    """Returns the rows of all tensors."""
    gate = "model.layers.{}.mlp.gate"
    return [*latent_experts.rows(config), (f"{gate}.e_score_correction_bias", CORRECTION, "same")]


def gguf_rows(config: Config) -> Rows:
    """Returns the rows of what GGUF files hold in other tensors."""
    return [*latent.gguf_rows(config), ("blk.{}.exp_probs_b.bias", CORRECTION, "same")]


def ignored(config: Config) -> Sequence[str]:
    """Returns the patterns of tensors that checkpoints have beside those of the layers."""
    return [*llama.ROPE_BUFFERS, f"model.layers.{config.num_layers}.*"]


FAMILY = Family(
    model_type="deepseek_v3",
    other_model_types=["kimi_k2"],
    architecture="DeepseekV3ForCausalLM",
    models="DeepSeek V3, R1, V3.1, Kimi K2, Moonlight",
    config_class=Config,
    build=build,
    config_keys={
        **latent_experts.CONFIG_KEYS,
        "norm_topk_prob": "normalize_weights",
        "rope_interleave": "rotates_pairs",
        "num_nextn_predict_layers": int,
    },
    config_constants={"scoring_func": "sigmoid", "moe_layer_freq": 1, "topk_method": "noaux_tc"},
    config_ignored=latent.CONFIG_IGNORED,
    config_nulls=["q_lora_rank", *_NULL_IS_FALSE, *latent.NO_NULLS, *routed_experts.NO_NULLS],
    complete_keys=complete_keys,
    written_keys=latent.written_keys,
    weights=weights,
    ignored=ignored,
    gguf_architecture="deepseek2",
    gguf_told_by=("expert_gating_func", 2),  # sigmoid
    gguf_given=latent.gguf_given,
    gguf_keys=latent_experts.GGUF_KEYS,
    gguf_ignored=["expert_gating_func"],
    gguf_defaults=lambda keys: {**latent_experts.gguf_defaults(keys), "norm_topk_prob": False},
    gguf_rows=gguf_rows,
)
