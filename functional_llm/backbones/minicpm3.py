"""MiniCPM 3: latent attention in a dense model; embeddings, branches and logits are scaled.

Branches are scaled by the depth of the model, logits by its width, so that numbers found for a
small one serve a large one. Reference: [MiniCPM](https://arxiv.org/abs/2404.06395).
"""

import math
from dataclasses import dataclass

from functional_llm.backbones import latent, llama
from functional_llm.backbones.family import Family
from functional_llm.backbones.latent import LatentConfig
from functional_llm.backbones.transforms import Rows
from functional_llm.blocks.decoder import decoder
from functional_llm.blocks.language_model import Graph, scale
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.blocks.rope import rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(LatentConfig):
    """The numbers of a MiniCPM 3, beside those of latent attention."""

    mlp_bias: bool
    embedding_multiplier: float
    depth_multiplier: float  # of branches, before it is divided by the root of the number of layers
    base_dim: int  # the width of the model for which logits are not scaled


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return latent.build_around(
        config,
        [build_decoder(config, f"decoder_{i}") for i in range(config.num_layers)],
        embedding_parts=[scale(config.embedding_multiplier)],
        logit_parts=[scale(config.base_dim / config.hidden_dim)],
    )


def build_decoder(config: Config, name: str) -> CompositeLayer:
    """Returns one decoder layer."""
    epsilon, width = config.layer_norm_epsilon, config.hidden_dim
    mlp = gated_mlp(config.intermediate_dim, width, config.activation, config.mlp_bias)
    scaled = scale(config.depth_multiplier / math.sqrt(config.num_layers))
    return decoder(
        name,
        [
            [
                rms_norm(epsilon, "attention_norm"),
                latent.build_attention(config, [rotary()], config.rope_scaling),
                scaled,
            ],
            [rms_norm(epsilon, "mlp_norm"), mlp, scaled],
        ],
    )


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out, or says null for."""
    own: JSON = {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "mlp_bias": False}
    own |= {"max_position_embeddings": 32768, "intermediate_size": 6400, "scale_emb": 12}
    own |= {"q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32}
    own |= {"scale_depth": 1.4, "dim_model_base": 256, "v_head_dim": None}
    keys = own | keys
    size = keys["hidden_size"]
    meant = {
        "scale_depth": math.sqrt(keys["num_hidden_layers"]),
        "dim_model_base": size,
        "v_head_dim": size // keys["num_attention_heads"],
    }
    keys |= {key: x for key, x in meant.items() if keys[key] is None}
    return latent.complete_keys(keys)


def weights(config: Config) -> Rows:
    """Returns the rows of all tensors."""
    others = [row for row in llama.WEIGHTS if "/attention/" not in row[1]]
    return [*others, *latent.attention_rows(config)]


def gguf_defaults(keys: JSON) -> JSON:
    """Returns what a GGUF file does not say, as llama.cpp takes it."""
    return {
        "qk_nope_head_dim": keys["qk_head_dim"] - keys["qk_rope_head_dim"],
        "q_lora_rank": None,
    }


FAMILY = Family(
    model_type="minicpm3",
    architecture="MiniCPM3ForCausalLM",
    models="MiniCPM 3 4B",
    config_class=Config,
    build=build,
    config_keys={
        **latent.CONFIG_KEYS,
        "mlp_bias": "mlp_bias",
        "scale_emb": "embedding_multiplier",
        "scale_depth": "depth_multiplier",
        "dim_model_base": "base_dim",
    },
    config_ignored=latent.CONFIG_IGNORED,
    config_nulls=["q_lora_rank", "scale_depth", "dim_model_base", "v_head_dim"],
    complete_keys=complete_keys,
    written_keys=latent.written_keys,
    weights=weights,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="minicpm3",
    gguf_given=latent.gguf_given,
    gguf_keys=latent.GGUF_KEYS,
    gguf_defaults=gguf_defaults,
    gguf_rows=latent.gguf_rows,
)
