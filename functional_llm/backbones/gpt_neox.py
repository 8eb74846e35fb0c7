"""GPT-NeoX 20B, Pythia: attention and MLP side by side, each behind a LayerNorm of its own.

RoPE turns a quarter of each head; biases everywhere but on the head. Checkpoints hold a query, a
key and a value of each head in turn, in one tensor. References:
[GPT-NeoX-20B](https://arxiv.org/abs/2204.06745), [Pythia](https://arxiv.org/abs/2304.01373).
"""

from dataclasses import dataclass
from functools import partial

from functional_llm.backbones import llama
from functional_llm.backbones.family import (
    COMMON_KEYS,
    ROPE_BUFFERS,
    Family,
    PartialRotaryConfig,
    Rows,
    complete_common_keys,
    dense_rows,
    fused_rows,
    layer_norm_rows,
)
from functional_llm.backbones.keras_hub import gpts
from functional_llm.backbones.stacks import build_alike, with_rope
from functional_llm.blocks.decoder import parallel, pre_norm
from functional_llm.blocks.language_model import Graph
from functional_llm.blocks.mlp import mlp
from functional_llm.blocks.norm import layer_norm
from functional_llm.blocks.rope import on_first_channels, rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(PartialRotaryConfig):
    """The numbers of a GPT-NeoX, beside those of `PartialRotaryConfig`."""

    attention_bias: bool
    parallel_residual: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return build_alike(config, build_decoder, layer_norm, with_rope(config))


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    norm, rotate = partial(layer_norm, config.layer_norm_epsilon), on_first_channels(rotary())
    self_attention = llama.build_attention(config, rotate, config.attention_bias)
    plain = mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    if not config.parallel_residual:
        return pre_norm(name, norm, self_attention, plain)
    return parallel(name, [norm("attention_norm"), norm("mlp_norm")], self_attention, plain)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own = {"layer_norm_eps": 1e-5, "hidden_act": "gelu", "attention_bias": True}
    own |= {"use_parallel_residual": True, "rotary_emb_base": 10000.0, "rotary_pct": 0.25}
    keys = complete_common_keys(own | keys)
    # Transformers reads the old names, where RoPE's parameters do not say it.
    rope = {"rope_theta": keys["rotary_emb_base"], "partial_rotary_factor": keys["rotary_pct"]}
    return keys | rope | {"num_key_value_heads": keys["num_attention_heads"]}


def old_keys(theta: float, part: float) -> JSON:
    """Returns RoPE's numbers under the names that Transformers reads."""
    return {"rotary_emb_base": theta, "rotary_pct": part}


def layer_rows(layer: str, attention: str, groups: int) -> Rows:
    """Returns the rows of a layer in this family and its kin, without its norms."""
    return [
        *fused_rows(f"{layer}.{attention}.query_key_value", "decoder_{}/attention", groups),
        *dense_rows(f"{layer}.{attention}.dense", "decoder_{}/attention/output"),
        *dense_rows(f"{layer}.mlp.dense_h_to_4h", "decoder_{}/mlp/up"),
        *dense_rows(f"{layer}.mlp.dense_4h_to_h", "decoder_{}/mlp/down"),
    ]


# All heads have keys of their own here, and share the width.
_NOT_HERE = ("num_key_value_heads", "head_dim", "rms_norm_eps")
CONFIG_KEYS = {key: field for key, field in COMMON_KEYS.items() if key not in _NOT_HERE}
_LAYER = "gpt_neox.layers.{}"
WEIGHTS = [
    ("gpt_neox.embed_in.weight", "token_embedding/embeddings", "same"),
    *layer_norm_rows(f"{_LAYER}.input_layernorm", "decoder_{}/attention_norm"),
    *layer_norm_rows(f"{_LAYER}.post_attention_layernorm", "decoder_{}/mlp_norm"),
    *layer_norm_rows("gpt_neox.final_layer_norm", "final_norm"),
    ("lm_head.weight", "head/kernel", "transpose"),
]

FAMILY = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    models="Pythia, GPT-NeoX-20B",
    config_class=Config,
    build=build,
    config_keys={
        **CONFIG_KEYS,
        "layer_norm_eps": "layer_norm_epsilon",
        "attention_bias": "attention_bias",
        "use_parallel_residual": "parallel_residual",
        "partial_rotary_factor": "partial_rotary_factor",
        "rotary_emb_base": float,
        "rotary_pct": float,
    },
    complete_keys=complete_keys,
    written_keys=lambda x: old_keys(x.rope_max_wavelength, x.partial_rotary_factor),
    weights=lambda config: [*WEIGHTS, *layer_rows(_LAYER, "attention", config.num_query_heads)],
    ignored=["*attention.bias", "*attention.masked_bias", *ROPE_BUFFERS],
    base_prefix="gpt_neox.",
    stored_prefixes={"embed_out.": "lm_head."},
    gguf_architecture="gptneox",
    gguf_keys={
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "use_parallel_residual": "use_parallel_residual",
    },
    gguf_defaults=lambda x: old_keys(x.get("rope_theta", 10000.0), x["partial_rotary_factor"]),
    keras_hub=gpts.GPT_NEOX,
)
