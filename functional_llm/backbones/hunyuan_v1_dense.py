"""Hunyuan 0.5B to 7B: a Llama that normalises each head's queries and keys after RoPE.

A fixed number stretches RoPE's base (`NtkAlphaScaling`). Reference:
[Hunyuan 7B](https://github.com/Tencent-Hunyuan/Hunyuan-7B).
"""

from dataclasses import dataclass

import keras

from functional_llm.backbones import llama
from functional_llm.backbones.family import COMMON_KEYS, DecoderConfig, Family, complete_common_keys
from functional_llm.backbones.stacks import build_with_one_rope
from functional_llm.blocks.attention import attention, heads
from functional_llm.blocks.decoder import pre_norm
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import rotary
from functional_llm.blocks.rope_scaling import NtkAlphaScaling
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """The numbers of a Hunyuan, beside those of `DecoderConfig`."""

    attention_bias: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return build_with_one_rope(config, build_decoder, ["full_attention"] * config.num_layers)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    queries, keys, size = config.num_query_heads, config.num_key_value_heads, config.head_dim
    epsilon, bias = config.layer_norm_epsilon, config.attention_bias
    self_attention = attention(
        query=[heads(queries, size, "query", bias), rotary(), rms_norm(epsilon, "query_norm")],
        key=[heads(keys, size, "key", bias), rotary(), rms_norm(epsilon, "key_norm")],
        value=[heads(keys, size, "value", bias)],
        output=keras.layers.Dense(config.hidden_dim, use_bias=bias, name="output"),
    )
    mlp = gated_mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    return pre_norm(name, lambda part: rms_norm(epsilon, part), self_attention, mlp)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    return complete_common_keys({"rms_norm_eps": 1e-5, "attention_bias": False} | keys)


def written_keys(config: Config) -> JSON:
    """Returns RoPE's scaling as Transformers wants it, with a factor that it does not use."""
    scaling = config.rope_scaling
    if not isinstance(scaling, NtkAlphaScaling):
        return {}
    return {"rope_scaling": {"rope_type": "dynamic", "alpha": scaling.alpha, "factor": 1.0}}


_NORM = "model.layers.{}.self_attn.%s_layernorm.weight"
WEIGHTS = [
    *llama.WEIGHTS,
    (_NORM % "query", "decoder_{}/attention/query_norm/scale", "same"),
    (_NORM % "key", "decoder_{}/attention/key_norm/scale", "same"),
]
# What the published files say beside: of their images, of names that nobody reads.
_NOT_READ = """add_classification_head attention_head_dim cla_share_factor class_num dense_list
    eod_token_id im_end_id im_newline_id im_start_id mask_init_id org_vocab_size pad_id
    pool_type text_end_id text_start_id""".split()

FAMILY = Family(
    model_type="hunyuan_v1_dense",
    architecture="HunYuanDenseV1ForCausalLM",
    models="Hunyuan 0.5B–7B, Hy-MT2",
    config_class=Config,
    build=build,
    config_keys={
        **COMMON_KEYS,
        "attention_bias": "attention_bias",
        **dict.fromkeys(_NOT_READ, object),
    },
    config_constants={
        "mlp_bias": False,
        "norm_type": "rms",
        "use_cla": False,
        "use_qk_norm": True,
        "use_rotary_pos_emb": True,
    },
    complete_keys=complete_keys,
    written_keys=written_keys,
    rope_types={"default": "default", "dynamic": "ntk_alpha"},
    weights=WEIGHTS,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="hunyuan-dense",  # whose files hold the base as stretched
)
