"""Qwen 2, 2.5: a Llama with biases on queries, keys and values, and windows in some layers.

References: [Qwen2](https://arxiv.org/abs/2407.10671), [Qwen2.5](https://arxiv.org/abs/2412.15115).
"""

from dataclasses import dataclass
from typing import Any

import keras

from functional_llm.backbones import llama, mistral
from functional_llm.backbones.family import COMMON_KEYS, DecoderConfig, Family, complete_common_keys
from functional_llm.backbones.keras_hub import llamas
from functional_llm.backbones.stacks import build_with_one_rope
from functional_llm.blocks.attention import attention, heads
from functional_llm.blocks.decoder import NamedPart, pre_norm
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers of a Qwen 2, beside those of `DecoderConfig`."""

    layer_types: tuple[str, ...]
    sliding_window: int | None


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return build_with_one_rope(config, build_decoder, config.layer_types, config.sliding_window)


def build_decoder(
    config: DecoderConfig, name: str, mlp: NamedPart | None = None, bias: bool = True
) -> CompositeLayer:
    """Returns one decoder layer. Its MLP is gated, unless it is given."""
    epsilon, size = config.layer_norm_epsilon, config.head_dim
    self_attention = attention(
        query=[heads(config.num_query_heads, size, "query", bias), rotary()],
        key=[heads(config.num_key_value_heads, size, "key", bias), rotary()],
        value=[heads(config.num_key_value_heads, size, "value", bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=False, name="output"),
    )
    mlp = mlp or gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    return pre_norm(name, lambda part: rms_norm(epsilon, part), self_attention, mlp)


CONFIG_KEYS: dict[str, str | type] = {
    **COMMON_KEYS,
    "layer_types": "layer_types",
    "sliding_window": "sliding_window",
    "use_sliding_window": bool,
    "max_window_layers": int,
}


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    num_layers = keys["num_hidden_layers"]
    window = keys.get("sliding_window", 4096) if keys.get("use_sliding_window") else None
    full = num_layers if window is None else keys.get("max_window_layers", 28)
    kinds = ["full_attention" if i < full else "sliding_attention" for i in range(num_layers)]
    own = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "layer_types": kinds}
    return complete_common_keys(own | keys | {"sliding_window": window})


def written_keys(config: Any) -> JSON:
    """Returns what Transformers must be told beside the window."""
    return {"use_sliding_window": config.sliding_window is not None}


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    models="Qwen 2, 2.5, 2.5 Coder",
    config_class=Config,
    build=build,
    config_keys=CONFIG_KEYS,
    config_constants={"use_mrope": False, **mistral.NO_BIASES},  # mrope is for vision
    complete_keys=complete_keys,
    written_keys=written_keys,
    weights=llama.WEIGHTS,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="qwen2",
    keras_hub=llamas.QWEN2,
)
