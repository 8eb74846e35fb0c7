"""Granite 3 with experts: a Granite whose MLPs are many, of which a router chooses some a token.

The weights are the softmax of the largest logits alone. Checkpoints hold the experts of a layer in
two tensors, gate before up. Reference:
[Granite 3.0](https://github.com/ibm-granite/granite-3.0-language-models).
"""

from dataclasses import dataclass

from functional_llm.backbones import granite, llama
from functional_llm.backbones.family import Family, check_chosen, gguf_expert_rows
from functional_llm.backbones.transforms import Rows, fused
from functional_llm.blocks.experts import Router, activated, expert_mlp, softmax
from functional_llm.blocks.language_model import Graph
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(granite.MultipliedConfig):
    """The numbers of a Granite with experts, beside those that it shares with a Granite."""

    num_experts: int
    num_experts_per_token: int


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    router = Router(
        num_experts=config.num_experts,
        num_chosen=config.num_experts_per_token,
        weights=[softmax],
    )
    gate = activated(config.activation)
    return granite.build_stack(
        config, lambda: expert_mlp(router, config.intermediate_dim, config.hidden_dim, gate)
    )


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    keys = {"num_local_experts": 8, "num_experts_per_tok": 2} | keys
    check_chosen(keys["num_experts_per_tok"], keys["num_local_experts"])
    return granite.complete_keys(keys)


_MOE = "model.layers.{}.block_sparse_moe"
_OF_EXPERTS = "decoder_{}/mlp/experts_"
_WHOLE, _ = fused()
WEIGHTS: Rows = [
    *(row for row in llama.WEIGHTS if ".mlp." not in row[0]),
    (f"{_MOE}.router.layer.weight", "decoder_{}/mlp/router/kernel", "transpose"),
    *((f"{_MOE}.input_linear.weight", f"{_OF_EXPERTS}{x}/kernel", _WHOLE) for x in ("gate", "up")),
    (f"{_MOE}.output_linear.weight", f"{_OF_EXPERTS}down/kernel", "transpose"),
]

FAMILY = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    models="Granite 3.0 and 3.1 with experts, PowerMoE",
    config_class=Config,
    build=build,
    config_keys={
        **{key: x for key, x in granite.FAMILY.config_keys.items() if key != "mlp_bias"},
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
    },
    config_constants={"mlp_bias": False},
    config_nulls=[  # of which, but for the first, Transformers makes no model
        "num_key_value_heads",
        "num_local_experts",
        "num_experts_per_tok",
        *granite.MULTIPLIERS.values(),
    ],
    complete_keys=complete_keys,
    weights=WEIGHTS,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="granitemoe",
    gguf_keys={
        **granite.MULTIPLIERS,
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
    },
    gguf_defaults=granite.FAMILY.gguf_defaults,
    gguf_permuted=llama.FAMILY.gguf_permuted,
    gguf_rows=lambda config: gguf_expert_rows(),
)
