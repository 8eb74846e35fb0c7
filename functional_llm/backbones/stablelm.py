"""StableLM 3B, 2 1.6B, 2 12B: a Llama with LayerNorm, and RoPE on a quarter of each head.

Stable LM 2 12B has attention and MLP side by side, and normalises every head's queries and keys
with a norm of its own. Reference: [Stable LM 2](https://arxiv.org/abs/2402.17834).
"""

from dataclasses import dataclass

import keras

from functional_llm.backbones import llama, starcoder2
from functional_llm.backbones.family import (
    ROPE_BUFFERS,
    Family,
    PartialRotaryConfig,
    complete_common_keys,
    layer_norm_rows,
    renamed_keys,
)
from functional_llm.backbones.stacks import build_alike, with_rope
from functional_llm.blocks.attention import Part, attention, heads
from functional_llm.blocks.decoder import parallel, pre_norm
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import LayerNormOfHeads, layer_norm
from functional_llm.blocks.rope import on_first_channels, rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(PartialRotaryConfig):
    """The numbers of a StableLM, beside those of `PartialRotaryConfig`."""

    query_key_value_bias: bool
    use_parallel_residual: bool
    use_query_key_norm: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return build_alike(config, build_decoder, layer_norm, with_rope(config))


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    queries, keys, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
    epsilon, bias = config.layer_norm_epsilon, config.query_key_value_bias

    def turned(part: str) -> list[Part]:
        norm = [LayerNormOfHeads(epsilon, name=f"{part}_norm")] if config.use_query_key_norm else []
        return [*norm, on_first_channels(rotary())]

    self_attention = attention(
        query=[heads(queries, size, "query", bias), *turned("query")],
        key=[heads(keys, size, "key", bias), *turned("key")],
        value=[heads(keys, size, "value", bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=False, name="output"),
    )
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    if config.use_parallel_residual:
        return parallel(name, [layer_norm(epsilon, "norm")], self_attention, mlp)
    return pre_norm(name, lambda part: layer_norm(epsilon, part), self_attention, mlp)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own = {"num_key_value_heads": 32, "max_position_embeddings": 4096, "layer_norm_eps": 1e-5}
    own |= {"use_qkv_bias": False, "use_parallel_residual": False, "partial_rotary_factor": 0.25}
    own |= {"qk_layernorm": False}
    size = keys["hidden_size"] // keys["num_attention_heads"]
    if keys.get("head_dim", size) != size:
        raise ValueError(
            f"config.json: expected no head_dim but hidden_size / num_attention_heads, {size}, "
            f"which is what Transformers takes. Received: {keys['head_dim']}."
        )
    return complete_common_keys(own | keys)


_NORM = "model.layers.{}.input_layernorm"
_HEADS = "model.layers.{}.self_attn"
_QUERY, _KEY = "decoder_{}/attention/query_norm", "decoder_{}/attention/key_norm"
FAMILY = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    models="StableLM 3B, Stable LM 2 1.6B, 12B",
    config_class=Config,
    build=build,
    config_keys={
        **renamed_keys(rms_norm_eps="layer_norm_eps"),
        "partial_rotary_factor": "partial_rotary_factor",
        "use_qkv_bias": "query_key_value_bias",
        "use_parallel_residual": "use_parallel_residual",
        "qk_layernorm": "use_query_key_norm",
    },
    config_ignored={"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"},
    complete_keys=complete_keys,
    weights=[
        *starcoder2.AROUND,
        *layer_norm_rows(_NORM, "decoder_{}/norm"),
        *starcoder2.ATTENTION,
        (f"{_HEADS}.q_layernorm[.norms.{{head}}].weight", f"{_QUERY}/scale", "same"),
        (f"{_HEADS}.k_layernorm[.norms.{{head}}].weight", f"{_KEY}/scale", "same"),
        *(row for row in llama.WEIGHTS if ".mlp." in row[0]),
    ],
    ignored=ROPE_BUFFERS,
    gguf_architecture="stablelm",
    gguf_keys={
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "use_parallel_residual": "use_parallel_residual",
    },
)
