"""GPT-J: attention and MLP side by side behind one LayerNorm, RoPE on pairs of the first channels.

Attention has no biases; the MLP and the head have. Reference:
[GPT-J-6B](https://github.com/kingoflolz/mesh-transformer-jax).
"""

from dataclasses import dataclass

import keras

from functional_llm.backbones import family, gpt2
from functional_llm.backbones.family import Family, MultiHeadConfig, dense_rows, layer_norm_rows
from functional_llm.backbones.stacks import build_alike
from functional_llm.blocks.attention import attention, heads
from functional_llm.blocks.decoder import parallel
from functional_llm.blocks.language_model import Graph, LayerType
from functional_llm.blocks.mlp import mlp
from functional_llm.blocks.norm import layer_norm
from functional_llm.blocks.rope import Rope, on_first_channels, rotary_pairs
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(MultiHeadConfig):
    """The numbers of a GPT-J, beside those of `MultiHeadConfig`."""

    rotary_dim: int


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    layer_type = LayerType(Rope(config.rotary_dim, 10000.0))
    return build_alike(config, build_decoder, layer_norm, layer_type, head_bias=True)


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    size, rotate = config.head_dim, on_first_channels(rotary_pairs())
    self_attention = attention(
        query=[heads(config.num_heads, size, "query"), rotate],
        key=[heads(config.num_heads, size, "key"), rotate],
        value=[heads(config.num_heads, size, "value")],
        output=keras.layers.Dense(config.hidden_dim, use_bias=False, name="output"),
    )
    plain = mlp(config.intermediate_dim, config.hidden_dim, config.activation)
    norm = layer_norm(config.layer_norm_epsilon, "norm")
    return parallel(name, [norm], self_attention, plain)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own = {"n_positions": 2048, "rotary_dim": 64, "tie_word_embeddings": False}
    keys = gpt2.complete_keys(own | keys)
    if keys["rotary_dim"] * keys["n_head"] > keys["n_embd"]:
        raise ValueError(
            "config.json: expected a rotary_dim of at most n_embd / n_head, received "
            f"{keys['rotary_dim']} beside {keys['n_embd']} / {keys['n_head']}."
        )
    return keys


_LAYER = "transformer.h.{}"
WEIGHTS = [
    ("transformer.wte.weight", "token_embedding/embeddings", "same"),
    *layer_norm_rows(f"{_LAYER}.ln_1", "decoder_{}/norm"),
    *family.attention_rows(f"{_LAYER}.attn", "out_proj"),
    *dense_rows(f"{_LAYER}.mlp.fc_in", "decoder_{}/mlp/up"),
    *dense_rows(f"{_LAYER}.mlp.fc_out", "decoder_{}/mlp/down"),
    *layer_norm_rows("transformer.ln_f", "final_norm"),
    *dense_rows("lm_head", "head"),
]

FAMILY = Family(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    models="GPT-J",
    config_class=Config,
    build=build,
    config_keys={**gpt2.FAMILY.config_keys, "rotary_dim": "rotary_dim"},
    config_aliases=gpt2.FAMILY.config_aliases,
    config_constants={
        "rotary": True,  # Transformers reads neither this nor the next
        "scale_attn_weights": True,
        "tie_word_embeddings": False,  # the bias is that of a head of its own
    },
    complete_keys=complete_keys,
    weights=WEIGHTS,
    ignored=gpt2.FAMILY.ignored,
    base_prefix="transformer.",
)
