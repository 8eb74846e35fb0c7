"""ERNIE 4.5 with experts: an ERNIE 4.5 of whose MLPs a corrected softmax chooses some a token.

The weights of those chosen are divided by their sum, which is not taken for less than a minimum.
Which layers have experts, an interval says between a first and a last one. Reference:
[ERNIE 4.5](https://ernie.baidu.com/blog/publication/ERNIE_Technical_Report.pdf).
"""

from dataclasses import dataclass

from functional_llm.backbones import ernie4_5, family, llama
from functional_llm.backbones.experts import ExpertsConfig
from functional_llm.backbones.family import Family
from functional_llm.backbones.routed_experts import CORRECTION, ROWS, MixedConfig, build_mixed
from functional_llm.backbones.stacks import build_around, one_rope
from functional_llm.backbones.transforms import axis_removed
from functional_llm.blocks.experts import Router, ScoreCorrection, normalized, softmax
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.rope import rotary_pairs
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(MixedConfig, ExpertsConfig, ernie4_5.Config):
    """The numbers of an ERNIE 4.5 with experts, beside those of an ERNIE 4.5."""

    shared_experts: int
    least_sum: float
    expert_layer_interval: int
    first_expert_layer: int
    last_expert_layer: int


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    layers = [("full_attention", build_decoder(config, i)) for i in range(config.num_layers)]
    return build_around(config, layers, one_rope(config), head_bias=config.use_bias)


def build_decoder(config: Config, index: int) -> CompositeLayer:
    """Returns the decoder layer of this number."""
    bias, router = config.use_bias, None
    is_between = config.first_expert_layer <= index <= config.last_expert_layer
    if is_between and (index + 1) % config.expert_layer_interval == 0:
        router = Router(
            num_experts=config.num_experts,
            num_chosen=config.num_experts_per_token,
            scores=[softmax],
            choice=[ScoreCorrection()],
            weights=[normalized(minimum=config.least_sum)],
        )
    attention = llama.build_attention(config, rotary_pairs(), bias)
    shared_dim = config.shared_experts * config.expert_dim
    return build_mixed(config, index, attention, router, shared_dim, use_bias=bias)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {"num_key_value_heads": 4, "moe_intermediate_size": 1536, "moe_norm_min": 1e-12}
    own |= {"moe_num_experts": 64, "moe_k": 6, "moe_num_shared_experts": 2}
    own |= {"moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_layer_end_index": -1}
    keys = own | family.with_divided_heads(keys)  # unlike one without experts
    family.check_given(keys, _NO_NULLS)
    if keys["moe_layer_end_index"] == -1:
        keys["moe_layer_end_index"] = keys["num_hidden_layers"] - 1
    family.check_chosen(keys["moe_k"], keys["moe_num_experts"], "moe_num_experts", "moe_k")
    shared, interval = keys["moe_num_shared_experts"], keys["moe_layer_interval"]
    if shared < 0 or interval < 1:
        raise ValueError(
            "config.json: expected moe_num_shared_experts of at least 0, and a moe_layer_interval "
            f"of at least 1. Received: {shared} and {interval}."
        )
    keys = ernie4_5.complete_keys(keys)
    family.check_head_bias(keys, "use_bias")
    return keys


_MOE_KEYS: dict[str, str | type] = {
    "moe_num_experts": "num_experts",
    "moe_k": "num_experts_per_token",
    "moe_num_shared_experts": "shared_experts",
    "moe_intermediate_size": "expert_dim",
    "moe_norm_min": "least_sum",
    "moe_layer_interval": "expert_layer_interval",
    "moe_layer_start_index": "first_expert_layer",
    "moe_layer_end_index": "last_expert_layer",
}
_NO_NULLS = ("num_key_value_heads", *_MOE_KEYS)  # of which Transformers makes no model
_MLP = "model.layers.{}.mlp"

FAMILY = Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    models="ERNIE 4.5 21B-A3B, 300B-A47B",
    config_class=Config,
    build=build,
    config_keys={
        **ernie4_5.FAMILY.config_keys,
        **_MOE_KEYS,
        "moe_capacity": object,  # of training
        "num_nextn_predict_layers": int,  # whose tensors are not read
    },
    config_aliases={"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
    config_constants={"moe_gate": "topk", "moe_use_aux_free": True, "use_rmsnorm": True},
    config_nulls=("head_dim", *_NO_NULLS),
    complete_keys=complete_keys,
    weights=[
        *llama.WEIGHTS,
        *ROWS,
        ("lm_head.bias", "head/bias", "same"),
        (f"{_MLP}.moe_statics.e_score_correction_bias", CORRECTION, axis_removed(0)),
    ],
    ignored=[*family.ROPE_BUFFERS, "model.mtp_*"],
    gguf_architecture="ernie4_5-moe",
    gguf_keys={
        "expert_count": "moe_num_experts",
        "expert_used_count": "moe_k",
        "expert_shared_count": "moe_num_shared_experts",
        "expert_feed_forward_length": "moe_intermediate_size",
        "interleave_moe_layer_step": "moe_layer_interval",
        "leading_dense_block_count": "moe_layer_start_index",
    },
    gguf_ignored=["expert_shared_feed_forward_length"],
    gguf_rows=lambda config: [
        (f"{_MLP}.moe_statics.e_score_correction.bias", CORRECTION, axis_removed(0))
    ],
)
