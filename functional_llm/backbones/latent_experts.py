"""What families with latent attention and experts share: numbers, decoder layer, keys, tensors."""

from dataclasses import dataclass

from functional_llm.backbones import latent, llama
from functional_llm.backbones.experts import expert_rows
from functional_llm.backbones.family import dense_rows
from functional_llm.backbones.latent import LatentConfig
from functional_llm.backbones.transforms import Rows
from functional_llm.blocks.decoder import NamedPart, pre_norm
from functional_llm.blocks.experts import Router, activated, expert_mlp
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class ExpertConfig(LatentConfig):
    """The numbers of a model with latent attention and experts, of which groups are open.

    With one group, all experts are open to a token.
    """

    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    expert_dim: int
    first_expert_layer: int  # those before have one MLP
    routed_scale: float
    num_groups: int
    num_open_groups: int


def build_decoder(
    config: ExpertConfig, index: int, attention: CompositeLayer, router: Router
) -> CompositeLayer:
    """Returns the decoder layer of this number, for this family and its kin."""
    width, activation = config.hidden_dim, config.activation
    mlp: NamedPart = gated_mlp(config.intermediate_dim, width, activation)
    if index >= config.first_expert_layer:
        shared_dim = config.num_shared_experts * config.expert_dim
        shared = gated_mlp(shared_dim, width, activation, name="shared")
        mlp = expert_mlp(router, config.expert_dim, width, activated(activation), shared=shared)
    epsilon = config.layer_norm_epsilon
    return pre_norm(f"decoder_{index}", lambda part: rms_norm(epsilon, part), attention, mlp)


def check_routing(keys: JSON) -> JSON:
    """Checks that as many experts and groups can be chosen as shall be."""
    experts = keys["n_routed_experts"]
    # Those that are not there fit nowhere.
    chosen, groups, kept = (
        keys.get(key) or experts + 1 for key in ("num_experts_per_tok", "n_group", "topk_group")
    )
    fits = experts % groups == 0 and kept <= groups and chosen <= experts // groups * kept
    if not fits:
        raise ValueError(
            "config.json: expected n_group that divides n_routed_experts, topk_group of them, and "
            "num_experts_per_tok experts at most in those. Received: "
            f"n_routed_experts={experts}, n_group={keys.get('n_group')}, "
            f"topk_group={keys.get('topk_group')}, "
            f"num_experts_per_tok={keys.get('num_experts_per_tok')}."
        )
    if keys["first_k_dense_replace"] < 0:
        raise ValueError(
            "config.json: expected a first_k_dense_replace of at least 0, received "
            f"{keys['first_k_dense_replace']}."
        )
    return keys


def rows(config: ExpertConfig) -> Rows:
    """Returns the rows of all tensors."""
    others = [row for row in llama.WEIGHTS if "/attention/" not in row[1]]
    shared = [
        row
        for part in ("gate", "up", "down")
        for row in dense_rows(
            f"model.layers.{{}}.mlp.shared_experts.{part}_proj", f"decoder_{{}}/mlp/shared/{part}"
        )
    ]
    return [*others, *latent.attention_rows(config), *expert_rows("model.layers.{}.mlp"), *shared]


CONFIG_KEYS: dict[str, str | type] = {
    **latent.CONFIG_KEYS,
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
    "moe_intermediate_size": "expert_dim",
    "first_k_dense_replace": "first_expert_layer",
    "routed_scaling_factor": "routed_scale",
    "n_group": "num_groups",
    "topk_group": "num_open_groups",
}

GGUF_KEYS = {
    **latent.GGUF_KEYS,
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}


def gguf_defaults(keys: JSON) -> JSON:
    """Returns what a GGUF file does not say, as llama.cpp takes it."""
    return {
        "qk_nope_head_dim": keys["qk_head_dim"] - keys["qk_rope_head_dim"],
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
    }
