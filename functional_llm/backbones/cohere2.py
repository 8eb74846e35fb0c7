"""Command R7B, Command A: a Cohere in which three of four layers see a window.

Only those turn queries and keys; the others know no positions. Reference:
[Command A](https://arxiv.org/abs/2504.00698).
"""

from dataclasses import dataclass

from functional_llm.backbones import cohere
from functional_llm.backbones.family import Family
from functional_llm.backbones.stacks import build_around
from functional_llm.blocks.language_model import Graph, LayerType, scale
from functional_llm.blocks.norm import layer_norm_without_bias
from functional_llm.blocks.rope import Rope, rotary_pairs
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(cohere.SharedConfig):
    """The numbers of a Cohere 2, beside those of `SharedConfig`."""

    layer_types: tuple[str, ...]
    sliding_window: int


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    rope = Rope(config.head_dim, config.rope_max_wavelength, config.rope_scaling)
    layers = []
    for i, kind in enumerate(config.layer_types):
        turned = [rotary_pairs()] if kind == "sliding_attention" else []
        layers.append((kind, cohere.build_layer(config, f"decoder_{i}", turned, turned)))
    sliding = LayerType(rope, config.sliding_window)
    types = {"full_attention": LayerType(), "sliding_attention": sliding}
    parts = [scale(config.logit_scale)]
    return build_around(config, layers, types, layer_norm_without_bias, logit_parts=parts)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    pattern, num_layers = keys.get("sliding_window_pattern", 4), keys["num_hidden_layers"]
    if pattern < 1:
        raise ValueError(
            "config.json: expected a positive integer for sliding_window_pattern, received "
            f"{pattern}."
        )
    own = {
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "layer_types": [
            "sliding_attention" if (i + 1) % pattern else "full_attention"
            for i in range(num_layers)
        ],
    }
    return cohere.complete_keys(own | keys)


FAMILY = Family(
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    models="Command R7B, Command A, Tiny Aya",
    config_class=Config,
    build=build,
    config_keys={
        **cohere.CONFIG_KEYS,
        "layer_types": "layer_types",
        "sliding_window": "sliding_window",
        "sliding_window_pattern": int,
        "layer_switch": int,  # says what layer_types says
        "use_parallel_embedding": bool,  # how the table is spread over devices
    },
    config_constants={
        # Transformers reads none of these.
        "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0,
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_qk_norm": False,
    },
    config_nulls=("num_key_value_heads", "sliding_window"),
    complete_keys=complete_keys,
    weights=cohere.WEIGHTS,
    ignored=cohere.FAMILY.ignored,
    gguf_architecture="cohere2",
    gguf_keys=cohere.FAMILY.gguf_keys,
)
