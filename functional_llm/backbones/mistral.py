"""Mistral: a Llama whose every layer sees a window, and whose head size may be of its own.

Versions from 0.2 on have no window. Reference: [Mistral 7B](https://arxiv.org/abs/2310.06825).
"""

from dataclasses import dataclass, fields
from typing import Any

from functional_llm.backbones import llama
from functional_llm.backbones.family import COMMON_KEYS, Family, complete_common_keys
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.rope import RopeScaling


@dataclass(frozen=True, kw_only=True)
class Config:
    """The numbers of a Mistral."""

    vocabulary_size: int
    num_layers: int
    hidden_dim: int
    intermediate_dim: int
    num_query_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_max_wavelength: float
    rope_scaling: RopeScaling | None
    layer_norm_epsilon: float
    max_sequence_length: int
    activation: str
    sliding_window: int | None
    tie_word_embeddings: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    shared = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "sliding_window"}
    plain = llama.Config(**shared, attention_bias=False, mlp_bias=False)
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    names = [f"decoder_{i}" for i in range(config.num_layers)]
    layers = [(kind, llama.build_decoder(plain, name)) for name in names]
    return llama.build_stack(plain, layers, config.sliding_window)


def complete_keys(keys: dict[str, Any]) -> dict[str, Any]:
    """Adds what Transformers takes where a `config.json` is silent."""
    own = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
    return complete_common_keys(own | keys)


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    config_class=Config,
    build=build,
    config_keys={**COMMON_KEYS, "sliding_window": "sliding_window"},
    complete_keys=complete_keys,
    weights=llama.WEIGHTS,
    ignored=llama.FAMILY.ignored,
)
