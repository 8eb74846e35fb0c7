"""What families with latent attention and experts share: numbers, keys, tensors."""

from dataclasses import dataclass

from functional_llm.backbones import latent, llama, routed_experts
from functional_llm.backbones.latent import LatentConfig
from functional_llm.backbones.routed_experts import RoutedConfig
from functional_llm.backbones.transforms import Rows
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class ExpertConfig(RoutedConfig, LatentConfig):
    """The numbers of a model with latent attention and experts, of which groups are open."""


def rows(config: ExpertConfig) -> Rows:
    """Returns the rows of all tensors, without a correction's."""
    others = [row for row in llama.WEIGHTS if "/attention/" not in row[1]]
    return [*others, *latent.attention_rows(config), *routed_experts.ROWS]


CONFIG_KEYS: dict[str, str | type] = {**latent.CONFIG_KEYS, **routed_experts.CONFIG_KEYS}
GGUF_KEYS = {**latent.GGUF_KEYS, **routed_experts.GGUF_KEYS}


def gguf_defaults(keys: JSON) -> JSON:
    """Returns what a GGUF file does not say, as llama.cpp takes it."""
    return {
        "qk_nope_head_dim": keys["qk_head_dim"] - keys["qk_rope_head_dim"],
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
    }
