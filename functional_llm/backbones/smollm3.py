"""SmolLM3: a Llama that turns queries and keys in three of four layers only.

The other layers have no positions (NoPE); windows, if there are any, are theirs. Reference:
[SmolLM3](https://huggingface.co/blog/smollm3), and [NoPE](https://arxiv.org/abs/2501.18795).
"""

from dataclasses import dataclass

from functional_llm.backbones import llama, qwen2
from functional_llm.backbones.family import Family, check_windows
from functional_llm.backbones.keras_hub import llamas
from functional_llm.backbones.stacks import build_around, one_rope
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.rope import no_rotary, rotary
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    """The numbers of a SmolLM3, beside those of a Llama."""

    no_rope_layers: tuple[int, ...]  # 0 for a layer without RoPE, and 1 for one with it
    layer_types: tuple[str, ...]
    sliding_window: int | None


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    layers = []
    for i, kind in enumerate(config.layer_types):
        rotate = rotary() if config.no_rope_layers[i] else no_rotary()
        biases = config.attention_bias, config.mlp_bias
        layers.append((kind, llama.build_decoder(config, f"decoder_{i}", rotate, *biases)))
    return build_around(config, layers, one_rope(config, config.sliding_window))


def rope_layers(keys: JSON) -> list[int]:
    """Returns 0 for each layer without RoPE, and 1 for each with it.

    Raises:
        ValueError: If the keys do not say it of each layer.
    """
    num_layers, interval = keys["num_hidden_layers"], keys.get("no_rope_layer_interval", 4)
    if interval < 1:
        raise ValueError(
            "config.json: expected a positive integer for no_rope_layer_interval, received "
            f"{interval}."
        )
    turns = keys.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(num_layers)]
    if len(turns) < num_layers or any(x not in (0, 1) for x in turns):
        raise ValueError(
            f"config.json: expected no_rope_layers of {num_layers} numbers, each 0 or 1, received "
            f"{len(turns)}, the first of them {turns[:9]}."
        )
    return [int(x) for x in turns[:num_layers]]


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    turns = rope_layers(keys)
    window = keys.get("sliding_window") if keys.get("use_sliding_window") else None
    local = "full_attention" if window is None else "sliding_attention"
    kinds = keys.get("layer_types") or ["full_attention" if x else local for x in turns]
    check_windows(kinds, window)
    own = {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
    }
    patterns = {"no_rope_layers": turns, "layer_types": kinds, "sliding_window": window}
    return llama.complete_keys(own | keys | patterns)


FAMILY = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    models="SmolLM3",
    config_class=Config,
    build=build,
    config_keys={
        **qwen2.CONFIG_KEYS,
        "attention_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "no_rope_layers": "no_rope_layers",
        "no_rope_layer_interval": int,
    },
    complete_keys=complete_keys,
    written_keys=qwen2.written_keys,
    weights=llama.WEIGHTS,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="smollm3",  # whose files do not say which layers turn: every fourth does not
    gguf_permuted=llama.FAMILY.gguf_permuted,
    keras_hub=llamas.SMOLLM3,
)
