"""Qwen 3 with experts: a Qwen 3 whose MLPs are many, of which a router chooses some a token.

The weights of those chosen are their softmax among all experts, divided by their sum where a config
says so. Layers that a config names have one MLP. Reference:
[Qwen3](https://arxiv.org/abs/2505.09388).
"""

from dataclasses import dataclass

from functional_llm.backbones import llama, qwen3, stacks
from functional_llm.backbones.family import Family
from functional_llm.backbones.transforms import Rows
from functional_llm.blocks.experts import Router, activated, expert_mlp, normalized, softmax
from functional_llm.blocks.language_model import Graph
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(qwen3.Config):
    """The numbers of a Qwen 3 with experts, beside those of a Qwen 3."""

    num_experts: int
    num_experts_per_token: int
    expert_dim: int
    normalize_weights: bool
    dense_layers: tuple[int, ...]


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    layers = [(kind, build_decoder(config, i)) for i, kind in enumerate(config.layer_types)]
    return stacks.build_around(config, layers, stacks.one_rope(config, config.sliding_window))


def build_decoder(config: Config, index: int) -> CompositeLayer:
    """Returns the decoder layer of this number."""
    if index in config.dense_layers:
        return qwen3.build_decoder(config, f"decoder_{index}")
    router = Router(
        num_experts=config.num_experts,
        num_chosen=config.num_experts_per_token,
        scores=[softmax],
        weights=[normalized()] if config.normalize_weights else [],
    )
    mlp = expert_mlp(router, config.expert_dim, config.hidden_dim, activated(config.activation))
    return qwen3.build_decoder(config, f"decoder_{index}", mlp)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if keys.get("head_dim") is None:  # Transformers divides here, unlike in a Qwen 3
        own["head_dim"] = keys["hidden_size"] // keys["num_attention_heads"]
    keys = own | {key: x for key, x in keys.items() if key != "head_dim" or x is not None}
    step, count, experts = (
        keys[name] for name in ("decoder_sparse_step", "num_experts_per_tok", "num_experts")
    )
    if step < 1 or experts is None or not 1 <= count <= experts:
        raise ValueError(
            "config.json: expected a decoder_sparse_step of at least 1, and num_experts_per_tok "
            f"from 1 to num_experts. Received: {step}, {count} and {experts}."
        )
    layers = range(keys["num_hidden_layers"])
    skipped = [i for i in layers if i in keys["mlp_only_layers"] or (i + 1) % step != 0]
    window = keys.get("sliding_window", 4096) if keys.get("use_sliding_window") else None
    kind = "full_attention" if window is None else "sliding_attention"  # of all layers
    patterns = {"mlp_only_layers": skipped, "layer_types": [kind for _ in layers]}
    return qwen3.complete_keys(keys | patterns)


_EXPERTS = "model.layers.{}.mlp.experts[.{expert}]"
EXPERTS: Rows = [
    ("model.layers.{}.mlp.gate.weight", "decoder_{}/mlp/router/kernel", "transpose"),
    *(
        (f"{_EXPERTS}.{part}_proj.weight", f"decoder_{{}}/mlp/experts_{part}/kernel", "transpose")
        for part in ("gate", "up", "down")
    ),
]

FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    models="Qwen 3 30B-A3B, 235B-A22B, Coder",
    config_class=Config,
    build=build,
    config_keys={
        **{key: x for key, x in qwen3.FAMILY.config_keys.items() if key != "layer_types"},
        "num_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "moe_intermediate_size": "expert_dim",
        "norm_topk_prob": "normalize_weights",
        "mlp_only_layers": "dense_layers",
        "decoder_sparse_step": int,
    },
    config_aliases={"num_local_experts": "num_experts"},
    config_constants=qwen3.FAMILY.config_constants,
    config_nulls=["num_experts"],  # of which Transformers makes no model
    complete_keys=complete_keys,
    written_keys=qwen3.FAMILY.written_keys,
    weights=[*llama.WEIGHTS, *qwen3.QK_NORMS, *EXPERTS],
    ignored=qwen3.FAMILY.ignored,
)
