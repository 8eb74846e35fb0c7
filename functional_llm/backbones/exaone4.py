"""EXAONE 4: norms behind the branches, as in OLMo 2, and one on each head's queries and keys.

In models with windows, three of four layers have one, and only those turn queries and keys.
Reference: [EXAONE 4.0](https://arxiv.org/abs/2507.11407).
"""

from dataclasses import dataclass
from typing import Any

import keras

from functional_llm.backbones import llama, mistral, olmo2
from functional_llm.backbones.family import (
    COMMON_KEYS,
    DecoderConfig,
    Family,
    check_windows,
    complete_common_keys,
)
from functional_llm.backbones.stacks import build_around, one_rope
from functional_llm.blocks.attention import PartFunction, attention, heads
from functional_llm.blocks.decoder import norm_behind_branches
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import no_rotary, rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers of an EXAONE 4, beside those of `DecoderConfig`."""

    layer_types: tuple[str, ...]
    sliding_window: int | None


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    window, layers = config.sliding_window, []
    for i, kind in enumerate(config.layer_types):
        turns = window is None or kind == "sliding_attention"
        rotate = rotary() if turns else no_rotary()
        layers.append((kind, build_decoder(config, f"decoder_{i}", rotate)))
    return build_around(config, layers, one_rope(config, window))


def build_decoder(config: Config, name: str, rotate: PartFunction) -> CompositeLayer:
    """Returns one decoder layer."""
    epsilon, size = config.layer_norm_epsilon, config.head_dim
    queries, keys = config.num_query_heads, config.num_key_value_heads
    self_attention = attention(
        query=[heads(queries, size, "query"), rms_norm(epsilon, "query_norm"), rotate],
        key=[heads(keys, size, "key"), rms_norm(epsilon, "key_norm"), rotate],
        value=[heads(keys, size, "value")],
        output=keras.layers.Dense(config.hidden_dim, use_bias=False, name="output"),
    )
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    return norm_behind_branches(name, lambda part: rms_norm(epsilon, part), self_attention, mlp)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    num_layers = keys["num_hidden_layers"]
    own: JSON = {"rms_norm_eps": 1e-5, "num_key_value_heads": 32, "sliding_window": 4096}
    keys = own | keys
    pattern: Any = keys.get("sliding_window_pattern", 4)
    pattern = 1 if keys["sliding_window"] is None else pattern
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        slides = [pattern[i % len(pattern)] == "L" for i in range(num_layers - 1)] + [False]
    elif type(pattern) is int and pattern > 0:
        slides = [(i + 1) % pattern != 0 for i in range(num_layers)]
    else:
        raise ValueError(
            "config.json: expected a positive integer for sliding_window_pattern, or letters L and "
            f"G, received {repr(pattern)[:80]}."
        )
    kinds = ["sliding_attention" if x else "full_attention" for x in slides]
    keys = {"layer_types": kinds, **keys}
    check_windows(keys["layer_types"], keys["sliding_window"])
    return complete_common_keys(keys)


FAMILY = Family(
    model_type="exaone4",
    architecture="Exaone4ForCausalLM",
    models="EXAONE 4.0",
    config_class=Config,
    build=build,
    config_keys={
        **COMMON_KEYS,
        "layer_types": "layer_types",
        "sliding_window": "sliding_window",
        "sliding_window_pattern": object,
    },
    config_constants=mistral.NO_BIASES,
    complete_keys=complete_keys,
    weights=olmo2.WEIGHTS,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="exaone4",
)
