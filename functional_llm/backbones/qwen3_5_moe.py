"""Qwen 3.5, 3.6 with experts in all layers: a Qwen 3.5 with the experts of a Qwen3-Next.

References: [Qwen3.5](https://qwen.ai/blog?id=qwen3.5),
[Gated Delta Networks](https://arxiv.org/abs/2412.06464).
"""

from dataclasses import dataclass, replace

from functional_llm.backbones import delta_gguf, delta_nets, qwen3_5, qwen3_next
from functional_llm.backbones.keras_hub import delta_nets as keras_hub
from functional_llm.backbones.transforms import Rows
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(qwen3_next.Config):
    """The numbers of a Qwen 3.5 with experts."""


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {"num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512}
    keys = qwen3_next.complete_keys(own | keys)
    # All layers have experts, and the weights of those chosen have the sum 1.
    fixed = {"intermediate_dim": keys["moe_intermediate_size"], "dense_layers": []}
    return keys | fixed | {"normalize_weights": True}


def weights(config: Config) -> Rows:
    """Returns the weight table of a model with these numbers."""
    return [*qwen3_5.weights(config), *qwen3_next.EXPERT_ROWS]


_FIXED: JSON = {"mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True}
_OTHERS = ("intermediate_size", *_FIXED)

FAMILY = replace(
    qwen3_next.FAMILY,
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    models="Qwen 3.5, 3.6 35B-A3B, 122B-A10B, 397B-A17B, text",
    config_class=Config,
    config_keys={x: y for x, y in qwen3_next.FAMILY.config_keys.items() if x not in _OTHERS},
    config_constants={**delta_nets.CONFIG_CONSTANTS, **_FIXED},
    complete_keys=complete_keys,
    weights=weights,
    wrappers=[qwen3_5.wrapper("qwen3_5_moe")],
    gguf_architecture="qwen35moe",
    gguf_rows=delta_gguf.rows_by_turns,
    keras_hub=keras_hub.QWEN3_5_MOE,
)
