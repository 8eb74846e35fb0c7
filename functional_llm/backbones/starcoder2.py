"""StarCoder 2: a Llama with LayerNorm, a plain GELU MLP, and biases on every Dense; a tied head.

The published models see a window. Reference: [StarCoder 2](https://arxiv.org/abs/2402.19173).
"""

from dataclasses import dataclass

from functional_llm.backbones import llama
from functional_llm.backbones.family import (
    ROPE_BUFFERS,
    DecoderConfig,
    Family,
    complete_common_keys,
    dense_rows,
    layer_norm_rows,
    renamed_keys,
)
from functional_llm.backbones.stacks import build_alike, with_rope
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import mlp
from functional_llm.blocks.norm import layer_norm
from functional_llm.blocks.rope import rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers of a StarCoder 2, beside those of `DecoderConfig`."""

    use_bias: bool
    sliding_window: int | None


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    layer_type = with_rope(config, config.sliding_window)
    return build_alike(config, build_decoder, layer_norm, layer_type)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    epsilon, bias = config.layer_norm_epsilon, config.use_bias
    self_attention = llama.build_attention(config, rotary(), bias)
    plain = mlp(config.intermediate_dim, config.hidden_dim, config.activation, bias)
    return pre_norm(name, lambda part: layer_norm(epsilon, part), self_attention, plain)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own = {"num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5}
    own |= {"max_position_embeddings": 4096, "sliding_window": None, "use_bias": True}
    return complete_common_keys(own | {"tie_word_embeddings": True} | keys)


_LAYER = "model.layers.{}"
ATTENTION = [row for row in llama.WEIGHTS if ".self_attn." in row[0]]
# What is outside of the decoder layers, and their two norms.
AROUND = [
    ("model.embed_tokens.weight", "token_embedding/embeddings", "same"),
    *layer_norm_rows(f"{_LAYER}.input_layernorm", "decoder_{}/attention_norm"),
    *layer_norm_rows(f"{_LAYER}.post_attention_layernorm", "decoder_{}/mlp_norm"),
    *layer_norm_rows("model.norm", "final_norm"),
    ("lm_head.weight", "head/kernel", "transpose"),
]

FAMILY = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    models="StarCoder 2",
    config_class=Config,
    build=build,
    config_keys={
        **renamed_keys(rms_norm_eps="norm_epsilon"),
        "use_bias": "use_bias",
        "sliding_window": "sliding_window",
    },
    config_ignored={"rms_norm_eps": "norm_epsilon", "layer_norm_epsilon": "norm_epsilon"},
    config_constants={"mlp_type": "default", "norm_type": "layer_norm"},  # neither is read
    complete_keys=complete_keys,
    weights=[
        *AROUND,
        *ATTENTION,
        *dense_rows(f"{_LAYER}.mlp.c_fc", "decoder_{}/mlp/up"),
        *dense_rows(f"{_LAYER}.mlp.c_proj", "decoder_{}/mlp/down"),
    ],
    ignored=ROPE_BUFFERS,
    gguf_architecture="starcoder2",
    gguf_keys={"attention.layer_norm_epsilon": "norm_epsilon"},
)
