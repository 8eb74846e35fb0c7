"""Falcon: attention and MLP side by side, behind one LayerNorm (7B, 11B) or two (40B, 180B).

Few key heads; RW has all, serial branches, biases, ALiBi. GGUF files lack RoPE's base: 10000 then.
Reference: [Falcon](https://arxiv.org/abs/2311.16867).
"""

from dataclasses import dataclass

import keras

from functional_llm.backbones import bloom, gpt_neox
from functional_llm.backbones.family import DecoderConfig, Family, Rows, layer_norm_rows
from functional_llm.backbones.keras_hub import gpts
from functional_llm.backbones.stacks import build_alike, with_rope
from functional_llm.blocks.alibi import alibi_key, alibi_query
from functional_llm.blocks.attention import attention, heads
from functional_llm.blocks.decoder import parallel, pre_norm
from functional_llm.blocks.language_model import Graph, LayerType
from functional_llm.blocks.mlp import mlp
from functional_llm.blocks.norm import layer_norm
from functional_llm.blocks.rope import rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON
from functional_llm.layers.attention import AttentionDotProduct


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers of a Falcon, beside those of `DecoderConfig`; no parallel norm: serial."""

    num_parallel_norms: int
    use_alibi: bool
    use_bias: bool


_NORMS = {  # by their number, if parallel: in checkpoints, and in a layer
    0: {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
    1: {"input_layernorm": "norm"},
    2: {"ln_attn": "attention_norm", "ln_mlp": "mlp_norm"},
}


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    keys, size, alibi = config.num_key_value_heads, config.head_dim, config.use_alibi
    layer_type = LayerType() if alibi else with_rope(config)
    keeps = {"attention": {"key": (keys, size + alibi), "value": (keys, size)}}
    return build_alike(config, build_decoder, layer_norm, layer_type, keeps=keeps)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    queries, keys, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
    epsilon, bias, alibi = config.layer_norm_epsilon, config.use_bias, config.use_alibi
    self_attention = attention(
        query=[heads(queries, size, "query", bias), alibi_query() if alibi else rotary()],
        key=[heads(keys, size, "key", bias), alibi_key(keys) if alibi else rotary()],
        value=[heads(keys, size, "value", bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=bias, name="output"),
        product=AttentionDotProduct(size**-0.5, name="dot_product"),
    )
    plain = mlp(config.intermediate_dim, config.hidden_dim, config.activation, bias)
    if config.num_parallel_norms == 0:
        return pre_norm(name, lambda part: layer_norm(epsilon, part), self_attention, plain)
    norms = [layer_norm(epsilon, part) for part in _NORMS[config.num_parallel_norms].values()]
    return parallel(name, norms, self_attention, plain)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults, and what the keys of the designs mean; `ValueError`: nothing."""
    number, width = keys["num_attention_heads"], keys["hidden_size"]
    own = {"layer_norm_epsilon": 1e-5, "max_position_embeddings": 2048, "activation": "gelu"}
    own |= {"tie_word_embeddings": True, "rope_theta": 10000.0, "ffn_hidden_size": 4 * width}
    new, shared = keys.get("new_decoder_architecture"), keys.get("multi_query", True)
    norms = (keys.get("num_ln_in_parallel_attn") or 1 + bool(new)) * keys.get("parallel_attn", True)
    key_heads = 1 if shared and not new else keys.get("num_kv_heads") or number
    alibi, is_known = bool(keys.get("alibi")), norms in ((1, 2) if new else (0, 1))
    if not is_known or key_heads != number and (alibi or not new and not shared):
        received = {key: keys.get(key) for key in (*_DESIGN, "num_kv_heads", "alibi")}
        raise ValueError(f"config.json: expected keys of one design. Received: {received}.")
    fields = {"num_parallel_norms": int(norms), "num_kv_heads": key_heads, "alibi": alibi}
    return own | keys | fields | {"head_dim": width // number, "bias": bool(keys.get("bias"))}


def written_keys(config: Config) -> JSON:
    """Returns the keys of the design that Transformers knows for these numbers."""
    one, norms = config.num_key_value_heads == 1, config.num_parallel_norms
    return dict(zip(_DESIGN, (norms > one, one, norms > 0, norms or None), strict=True))


_DESIGN: dict[str, str | type] = {"new_decoder_architecture": bool, "multi_query": bool}
_DESIGN |= {"parallel_attn": bool, "num_ln_in_parallel_attn": int}
_OWN = {"ffn_hidden_size": "intermediate_dim", "num_kv_heads": "num_key_value_heads"}
_OWN |= {"alibi": "use_alibi", "bias": "use_bias"}
_OWN |= {x: x for x in ("activation", "layer_norm_epsilon")}
_COMMON = {key: x for key, x in gpt_neox.CONFIG_KEYS.items() if x not in _OWN.values()}
_OLD = {"n_embed": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}


def weights(config: Config) -> Rows:
    """Returns the table: norms and groups depend on the design."""
    layer, keys = "transformer.h.{}", config.num_key_value_heads
    names = _NORMS[config.num_parallel_norms].items()
    norms = [row for x, y in names for row in layer_norm_rows(f"{layer}.{x}", f"decoder_{{}}/{y}")]
    return [*bloom.AROUND, *norms, *gpt_neox.layer_rows(layer, "self_attention", keys)]


_GGUF = {"feed_forward_length": "ffn_hidden_size", "attention.head_count_kv": "num_kv_heads"}
FAMILY = Family(
    model_type="falcon",
    models="Falcon 7B, 11B, 40B, 180B, RW",
    architecture="FalconForCausalLM",
    config_class=Config,
    build=build,
    config_keys={**_COMMON, **_OWN, **_DESIGN},
    config_aliases=_OLD | {"n_head_kv": "num_kv_heads"},
    config_nulls="new_decoder_architecture multi_query alibi bias layer_norm_epsilon".split(),
    config_constants={"apply_residual_connection_post_layernorm": False},
    complete_keys=complete_keys,
    written_keys=written_keys,
    weights=weights,
    ignored=["*rotary*.inv_freq"],
    base_prefix="transformer.",
    gguf_architecture="falcon",
    gguf_keys=_GGUF | {"attention.layer_norm_epsilon": "layer_norm_epsilon"},
    gguf_ignored=["tensor_data_layout"],
    gguf_defaults=lambda x: {"new_decoder_architecture": x.get("num_kv_heads", 1) > 1},
    keras_hub=gpts.FALCON,
)
