"""Mistral: a Llama in which all layers see a window, and the head size is a number of its own.

Versions from 0.2 on have no window. Reference: [Mistral 7B](https://arxiv.org/abs/2310.06825).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from functional_llm.backbones import llama
from functional_llm.backbones.family import COMMON_KEYS, DecoderConfig, Family, complete_common_keys
from functional_llm.backbones.keras_hub import llamas
from functional_llm.backbones.stacks import build_with_one_rope
from functional_llm.backbones.wrapper import llava
from functional_llm.blocks.language_model import Graph
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers of a Mistral, beside those of `DecoderConfig`."""

    sliding_window: int | None


AnyConfig = TypeVar("AnyConfig", bound=Config)


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return build_stack(config, llama.build_decoder)


def build_stack(
    config: AnyConfig, build_decoder: Callable[[AnyConfig, str], CompositeLayer]
) -> Graph:
    """Returns the graph around decoder layers that all have a window, or none."""
    window = config.sliding_window
    kind = "full_attention" if window is None else "sliding_attention"
    return build_with_one_rope(config, build_decoder, [kind] * config.num_layers, window)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
    return complete_common_keys(own | keys)


# Transformers reads neither key here: the models have no such bias.
NO_BIASES = {"attention_bias": False, "mlp_bias": False}

FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    models="Mistral 7B, Nemo (their GGUF files say `llama`, and have no window), Small 3",
    config_class=Config,
    build=build,
    config_keys={**COMMON_KEYS, "sliding_window": "sliding_window"},
    config_constants=NO_BIASES,
    complete_keys=complete_keys,
    weights=llama.WEIGHTS,
    ignored=llama.FAMILY.ignored,
    wrappers=[llava("mistral3", "mistral")],  # Mistral Small 3.1 and later
    gguf_architecture="mistral3",  # of the same; files of the others say llama
    gguf_defaults=lambda keys: {"sliding_window": None},
    gguf_permuted=llama.FAMILY.gguf_permuted,
    keras_hub=llamas.MISTRAL,
)
