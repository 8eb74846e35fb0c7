"""Mamba-2: neither attention nor MLPs; each layer reads and writes states of one size.

References: [Mamba-2](https://arxiv.org/abs/2405.21060),
[Codestral Mamba](https://mistral.ai/news/codestral-mamba).
"""

from dataclasses import dataclass

from functional_llm.backbones.family import Family
from functional_llm.backbones.state_spaces import (
    ANY_LENGTH,
    GGUF_KEYS,
    SpaceConfig,
    check_heads,
    gguf_given,
    gguf_mixer_rows,
    mixer_rows,
    read_steps,
    residual_parts,
    written_steps,
)
from functional_llm.blocks.decoder import decoder
from functional_llm.blocks.language_model import Graph, StateType, causal_lm
from functional_llm.blocks.mamba2 import gated_norm, mamba2, mamba2_shapes
from functional_llm.blocks.norm import rms_norm
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(SpaceConfig):
    """The numbers of a Mamba-2, beside those of its layers."""

    use_bias: bool
    float32_residuals: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    return causal_lm(
        vocabulary_size=config.vocabulary_size,
        hidden_dim=config.hidden_dim,
        layer_types={"linear_attention": StateType()},
        layers=[("linear_attention", build_decoder(config, i)) for i in range(config.num_layers)],
        keeps=mamba2_shapes(config.state_sizes),
        final_norm=rms_norm(config.layer_norm_epsilon, "final_norm"),
        tie_word_embeddings=config.tie_word_embeddings,
        embedding_parts=residual_parts(config.float32_residuals),
    )


def build_decoder(config: Config, index: int) -> CompositeLayer:
    """Returns the decoder layer of this number."""
    mixer = mamba2(
        config.state_sizes,
        config.hidden_dim,
        gated_norm(config.layer_norm_epsilon, config.num_state_groups),
        activation=config.activation,
        steps=config.steps,
        input_bias=config.use_bias,
        convolution_bias=config.convolution_bias,
        output_bias=config.use_bias,
    )
    norm = rms_norm(config.layer_norm_epsilon, "mamba_norm")
    return decoder(f"decoder_{index}", [[norm, mixer, *residual_parts(config.float32_residuals)]])


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {
        "num_heads": 128,
        "head_dim": 64,
        "state_size": 128,
        "layer_norm_epsilon": 1e-5,
        "expand": 2,
        "conv_kernel": 4,
        "n_groups": 8,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "residual_in_fp32": True,
        "tie_word_embeddings": False,
    }
    keys = own | keys
    inner = int(keys["expand"] * keys["hidden_size"])
    check_heads(keys, "num_heads", "n_groups", inner, keys["head_dim"])
    lengths = {"intermediate_dim": inner, "max_sequence_length": ANY_LENGTH}
    return {**keys, **lengths, **read_steps(keys)}


_LAYER = "backbone.layers.{}"
FAMILY = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    models="Codestral Mamba 7B",
    config_class=Config,
    build=build,
    config_keys={
        "vocab_size": "vocabulary_size",
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_dim",
        "layer_norm_epsilon": "layer_norm_epsilon",
        "hidden_act": "activation",
        "tie_word_embeddings": "tie_word_embeddings",
        "num_heads": "num_state_heads",
        "head_dim": "state_head_dim",
        "n_groups": "num_state_groups",
        "state_size": "state_dim",
        "conv_kernel": "convolution_width",
        "use_conv_bias": "convolution_bias",
        "use_bias": "use_bias",
        "residual_in_fp32": "float32_residuals",
        "expand": int,
        "time_step_limit": object,
        # How they are trained, and in which portions others compute.
        **dict.fromkeys(("time_step_min", "time_step_max", "time_step_floor"), float),
        **dict.fromkeys(("time_step_rank", "chunk_size", "rescale_prenorm_residual"), object),
    },
    config_nulls=["time_step_limit"],
    complete_keys=complete_keys,
    written_keys=lambda config: {
        "expand": config.intermediate_dim // config.hidden_dim,
        **written_steps(config),
    },
    weights=[
        ("backbone.embeddings.weight", "token_embedding/embeddings", "same"),
        (f"{_LAYER}.norm.weight", "decoder_{}/mamba_norm/scale", "same"),
        *mixer_rows(f"{_LAYER}.mixer"),
        ("backbone.norm_f.weight", "final_norm/scale", "same"),
        ("lm_head.weight", "head/kernel", "transpose"),
    ],
    base_prefix="backbone.",
    gguf_architecture="mamba2",
    gguf_keys={**GGUF_KEYS, "attention.layer_norm_rms_epsilon": "layer_norm_epsilon"},
    gguf_ignored=["context_length", "feed_forward_length", "attention.head_count"],
    gguf_given=gguf_given,
    gguf_rows=gguf_mixer_rows(f"{_LAYER}.mixer"),
)
