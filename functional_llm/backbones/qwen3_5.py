"""Qwen 3.5, 3.6: gated delta nets, but for every fourth layer, which attends through a gate.

Published files hold a model of images, too, and layers that predict more tokens: both are left out.
References: [Qwen3.5](https://qwen.ai/blog?id=qwen3.5),
[Gated Delta Networks](https://arxiv.org/abs/2412.06464).
"""

from dataclasses import dataclass

from functional_llm.backbones import delta_gguf, delta_nets
from functional_llm.backbones.delta_nets import DeltaConfig, projection_rows
from functional_llm.backbones.family import Family
from functional_llm.backbones.keras_hub import delta_nets as keras_hub
from functional_llm.backbones.transforms import Rows
from functional_llm.backbones.wrapper import Wrapper
from functional_llm.blocks.decoder import NamedPart
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(DeltaConfig):
    """The numbers of a Qwen 3.5."""


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""

    def mlp(index: int) -> NamedPart:
        return gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation)

    return delta_nets.build(config, mlp)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    return delta_nets.complete_keys({"num_key_value_heads": 4, "intermediate_size": 12288} | keys)


PROJECTIONS: Rows = [
    *projection_rows("in_proj_qkv", ("query", "key", "value")),
    *projection_rows("in_proj_z", ("gate",)),
    *projection_rows("in_proj_b", ("rate",)),
    *projection_rows("in_proj_a", ("decay",)),
]


def weights(config: DeltaConfig) -> Rows:
    """Returns the weight table of a model with these numbers."""
    return [*delta_nets.attention_rows(config), *delta_nets.NET_ROWS, *PROJECTIONS]


def wrapper(model_type: str) -> Wrapper:
    """Returns the wrapper around the text model of this family or its kin, and one of images."""
    return Wrapper(
        model_type=model_type,
        text_family=f"{model_type}_text",
        prefixes={"model.language_model.": "model."},
        ignored=("model.visual.*",),
    )


FAMILY = Family(
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    models="Qwen 3.5, 3.6 0.8B–27B, text",
    config_class=Config,
    build=build,
    config_keys=delta_nets.CONFIG_KEYS,
    config_constants={**delta_nets.CONFIG_CONSTANTS, "mlp_only_layers": []},
    layer_types=("full_attention", "linear_attention"),
    complete_keys=complete_keys,
    weights=weights,
    ignored=delta_gguf.ignored,
    wrappers=[wrapper("qwen3_5")],
    gguf_architecture="qwen35",
    gguf_given=delta_gguf.given,
    gguf_keys=delta_gguf.KEYS,
    gguf_ignored=delta_gguf.IGNORED,
    gguf_offset=delta_gguf.OFFSET,
    gguf_rows=delta_gguf.rows_by_turns,
    keras_hub=keras_hub.QWEN3_5,
)
