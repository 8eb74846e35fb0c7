"""DeepSeek V2: latent attention, and experts of which some groups are open to a token.

A cache keeps one short vector of a token instead of keys and values. All tokens take a shared MLP
beside their experts. Reference: [DeepSeek-V2](https://arxiv.org/abs/2405.04434).
"""

from dataclasses import dataclass

from functional_llm.backbones import latent, latent_experts, llama, routed_experts
from functional_llm.backbones.family import Family
from functional_llm.backbones.latent_experts import ExpertConfig
from functional_llm.blocks.experts import Router, Scores, scaled, softmax, within_groups
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.rope import rotary_pairs
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(ExpertConfig):
    """The numbers of a DeepSeek V2."""


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    scores: list[Scores] = [softmax]
    if config.num_groups > 1:
        scores.append(within_groups(config.num_groups, config.num_open_groups, 1, otherwise=0.0))
    layers = []
    for i in range(config.num_layers):
        router = Router(
            num_experts=config.num_experts,
            num_chosen=config.num_experts_per_token,
            scores=scores,
            weights=[scaled(config.routed_scale)],
        )
        attention = latent.build_attention(config, [rotary_pairs()], config.rope_scaling)
        layers.append(routed_experts.build_decoder(config, i, attention, router))
    return latent.build_around(config, layers)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {"first_k_dense_replace": 0, "n_routed_experts": 64, "n_shared_experts": 2}
    own |= {"routed_scaling_factor": 1.0, "moe_intermediate_size": 1407, "intermediate_size": 11008}
    own |= {"max_position_embeddings": 2048, "topk_method": "greedy"}
    keys = own | keys
    if keys["topk_method"] == "greedy":
        keys |= {"n_group": 1, "topk_group": 1}
    elif keys["topk_method"] != "group_limited_greedy":
        raise ValueError(
            "config.json: expected the topk_method greedy or group_limited_greedy, received "
            f"{keys['topk_method']!r}."
        )
    return latent.complete_keys(routed_experts.check_routing(keys))


def written_keys(config: Config) -> JSON:
    """Returns what Transformers needs in a `config.json` beside `config_keys`."""
    method = "greedy" if config.num_groups == 1 else "group_limited_greedy"
    return {**latent.written_keys(config), "topk_method": method}


def _gguf_defaults(keys: JSON) -> JSON:
    is_open = keys.get("n_group", 1) == 1
    return {
        **latent_experts.gguf_defaults(keys),
        "topk_method": "greedy" if is_open else "group_limited_greedy",
    }


FAMILY = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    models="DeepSeek V2, V2-Lite, V2.5",
    config_class=Config,
    build=build,
    config_keys={**latent_experts.CONFIG_KEYS, "topk_method": str},
    config_constants={
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "mlp_bias": False,
    },
    config_ignored=latent.CONFIG_IGNORED,
    config_nulls=["q_lora_rank", *latent.NO_NULLS, *routed_experts.NO_NULLS],
    complete_keys=complete_keys,
    written_keys=written_keys,
    weights=latent_experts.rows,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="deepseek2",
    gguf_given=latent.gguf_given,
    gguf_keys=latent_experts.GGUF_KEYS,
    gguf_ignored=["expert_gating_func"],
    gguf_defaults=_gguf_defaults,
    gguf_rows=latent.gguf_rows,
)
