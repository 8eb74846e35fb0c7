"""Gemma 2: a Gemma with norms on both sides of each branch, soft caps, and windows in turn.

The scale of scores is a number of its own. Reference: [Gemma 2](https://arxiv.org/abs/2408.00118).
"""

from dataclasses import dataclass

import keras

from functional_llm.backbones import gemma, llama
from functional_llm.backbones.family import COMMON_KEYS, DecoderConfig, Family
from functional_llm.backbones.keras_hub import gemmas
from functional_llm.backbones.stacks import one_rope
from functional_llm.blocks.attention import attention, heads
from functional_llm.blocks.decoder import sandwich
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import offset_rms_norm
from functional_llm.blocks.rope import rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON
from functional_llm.layers.attention import AttentionDotProduct


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers of a Gemma 2, beside those of `DecoderConfig`."""

    query_pre_attention_scalar: float
    attention_logit_soft_cap: float | None
    final_logit_soft_cap: float | None
    layer_types: tuple[str, ...]
    sliding_window: int | None


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    types, cap = one_rope(config, config.sliding_window), config.final_logit_soft_cap
    return gemma.build_stack(config, build_decoder, config.layer_types, types, cap)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    epsilon, size = config.layer_norm_epsilon, config.head_dim
    factor, cap = config.query_pre_attention_scalar**-0.5, config.attention_logit_soft_cap
    self_attention = attention(
        query=[heads(config.num_query_heads, size, "query"), rotary()],
        key=[heads(config.num_key_value_heads, size, "key"), rotary()],
        value=[heads(config.num_key_value_heads, size, "value")],
        output=keras.layers.Dense(config.hidden_dim, use_bias=False, name="output"),
        product=AttentionDotProduct(factor, cap, name="dot_product"),
    )
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    return sandwich(name, lambda part: offset_rms_norm(epsilon, part), self_attention, mlp)


CONFIG_KEYS: dict[str, str | type] = {
    **{key: field for key, field in COMMON_KEYS.items() if key != "hidden_act"},
    "hidden_activation": "activation",
    "query_pre_attn_scalar": "query_pre_attention_scalar",
    "attn_logit_softcapping": "attention_logit_soft_cap",
    "final_logit_softcapping": "final_logit_soft_cap",
    "layer_types": "layer_types",
    "sliding_window": "sliding_window",
}


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(keys[_LAYERS])]
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    own: JSON = {"num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096}
    own |= {"hidden_activation": "gelu_pytorch_tanh", "layer_types": kinds}
    return gemma.complete_keys(own | caps | keys)


def gguf_defaults(keys: JSON) -> JSON:
    """Returns llama.cpp's defaults: only the 27B models do not scale by the head size."""
    share = keys["hidden_size"] // keys["num_attention_heads"]
    return {"query_pre_attn_scalar": share if keys[_LAYERS] in (46, 62) else keys["head_dim"]}


_LAYERS, _NORM = "num_hidden_layers", "model.layers.{}.%s_layernorm.weight"
WEIGHTS = [
    *(row for row in llama.WEIGHTS if "post_attention_layernorm" not in row[0]),
    (_NORM % "post_attention", "decoder_{}/attention_post_norm/scale", "same"),
    (_NORM % "pre_feedforward", "decoder_{}/mlp_norm/scale", "same"),
    (_NORM % "post_feedforward", "decoder_{}/mlp_post_norm/scale", "same"),
]

FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    models="Gemma 2",
    config_class=Config,
    build=build,
    config_keys=CONFIG_KEYS,
    config_constants=gemma.CONSTANTS,
    config_ignored={"hidden_act": "hidden_activation", "sliding_window_size": "sliding_window"},
    complete_keys=complete_keys,
    weights=WEIGHTS,
    ignored=gemma.FAMILY.ignored,
    gguf_architecture="gemma2",
    gguf_defaults=gguf_defaults,
    gguf_offset=gemma.FAMILY.gguf_offset,
    keras_hub=gemmas.GEMMA2,
)
