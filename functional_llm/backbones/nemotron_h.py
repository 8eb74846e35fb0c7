"""Nemotron-H: a layer is a Mamba-2, attention without RoPE, an MLP or experts, one of them alone.

Activations are squared ReLUs, without gates. Experts may work on a narrower projection of their
input. Steps of states are bounded by `time_step_limit` alone, as in training; Transformers up to
5.23 raises those of a prompt to `time_step_min`. Checkpoints may hold layers that predict further
tokens: they are not read. References: [Nemotron-H](https://arxiv.org/abs/2504.03624),
[Nemotron Nano 2](https://arxiv.org/abs/2508.14444),
[the steps](https://github.com/huggingface/transformers/pull/48989).
"""

from collections.abc import Callable
from dataclasses import dataclass

import keras

from functional_llm.backbones import family, llama, nemotron_h_keys, routed_experts, state_spaces
from functional_llm.backbones.family import Family
from functional_llm.backbones.nemotron_h_keys import LETTERS
from functional_llm.backbones.routed_experts import GGUF_KEYS, MixedConfig, SigmoidConfig
from functional_llm.backbones.stacks import build_of_types
from functional_llm.backbones.state_spaces import (
    HybridConfig,
    build_states,
    hybrid_types,
    residual_parts,
)
from functional_llm.backbones.transforms import Rows
from functional_llm.blocks.attention import BesideX, attention, heads
from functional_llm.blocks.decoder import NamedPart, decoder
from functional_llm.blocks.experts import expert_mlp
from functional_llm.blocks.language_model import Graph, Kinds, LayerType
from functional_llm.blocks.mlp import ACTIVATIONS, mlp
from functional_llm.blocks.norm import rms_norm
from functional_llm.graph.composite import CompositeLayer


@dataclass(frozen=True, kw_only=True)
class Config(HybridConfig, MixedConfig, SigmoidConfig):
    """The numbers of a Nemotron-H, beside those of Mamba-2 layers and of experts."""

    layer_types: tuple[str, ...]
    num_query_heads: int
    mlp_bias: bool
    shared_dim: int
    latent_dim: int | None
    float32_residuals: bool


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    types, residual = hybrid_types(config, LayerType()), residual_parts(config.float32_residuals)
    layers: list[tuple[Kinds, CompositeLayer]] = [
        (kind if kind in types else (), build_decoder(config, i))
        for i, kind in enumerate(config.layer_types)
    ]
    return build_of_types(config, layers, types, embedding_parts=residual)


def build_decoder(config: Config, index: int) -> CompositeLayer:
    """Returns the decoder layer of this number."""
    builders: dict[str, Callable[[Config], NamedPart]] = {
        "linear_attention": lambda config: build_states(config, config.state_bias),
        "full_attention": build_attention,
        "mlp": lambda config: build_mlp(config, config.intermediate_dim),
        "moe": build_experts,
    }
    mixer = builders[config.layer_types[index]](config)
    norm = rms_norm(config.layer_norm_epsilon, f"{mixer.name}_norm")
    return decoder(f"decoder_{index}", [[norm, mixer, *residual_parts(config.float32_residuals)]])


def build_attention(config: Config) -> CompositeLayer:
    """Returns self-attention."""
    return attention(
        query=[heads(config.num_query_heads, config.head_dim, "query")],
        key=[heads(config.num_key_value_heads, config.head_dim, "key")],
        value=[heads(config.num_key_value_heads, config.head_dim, "value")],
        output=keras.layers.Dense(config.hidden_dim, use_bias=False, name="output"),
    )


def build_mlp(config: Config, width: int, name: str = "mlp") -> CompositeLayer:
    """Returns an MLP of a width."""
    return mlp(width, config.hidden_dim, config.activation, config.mlp_bias, name)


def build_experts(config: Config) -> BesideX:
    """Returns experts beside an MLP that all tokens take."""

    def latent(width: int, name: str) -> list[keras.layers.Layer]:
        dense = keras.layers.Dense(width, use_bias=config.mlp_bias, name=name)
        return [] if config.latent_dim is None else [dense]

    inner = config.latent_dim or config.hidden_dim
    return expert_mlp(
        routed_experts.sigmoid_router(config),
        config.expert_dim,
        inner,
        ACTIVATIONS[config.activation],
        inner=("up",),
        shared=build_mlp(config, config.shared_dim, "shared"),
        before=latent(inner, "into_latents"),
        behind=latent(config.hidden_dim, "from_latents"),
    )


_LAYER = "model.layers.{}"
_MIXER = f"{_LAYER}.mixer"
_EXPERT = f"{_MIXER}.experts[.{{expert}}]"
_MLP = "decoder_{}/mlp"
_PARTS = ("mamba", "attention", "mlp")
_ROUTER = (f"{_MIXER}.gate.weight", f"{_MLP}/router/kernel", "transpose")
WEIGHTS: Rows = [
    ("model.embeddings.weight", "token_embedding/embeddings", "same"),
    *((f"{_LAYER}.norm.weight", f"decoder_{{}}/{part}_norm/scale", "same") for part in _PARTS),
    *state_spaces.mixer_rows(_MIXER),
    *family.attention_rows(_MIXER),
    *family.all_dense_rows(_MIXER, _MLP, family.PLAIN_MLP),
    _ROUTER,
    (f"{_MIXER}.gate.e_score_correction_bias", routed_experts.CORRECTION, "same"),
    (f"{_EXPERT}.up_proj.weight", f"{_MLP}/experts_up/kernel", "transpose"),
    (f"{_EXPERT}.down_proj.weight", f"{_MLP}/experts_down/kernel", "transpose"),
    *family.all_dense_rows(f"{_MIXER}.shared_experts", f"{_MLP}/shared", family.PLAIN_MLP),
    *family.dense_rows(f"{_MIXER}.fc1_latent_proj", f"{_MLP}/into_latents"),
    *family.dense_rows(f"{_MIXER}.fc2_latent_proj", f"{_MLP}/from_latents"),
    ("model.norm_f.weight", "final_norm/scale", "same"),
    ("lm_head.weight", "head/kernel", "transpose"),
]


def gguf_rows(config: Config) -> Rows:
    """Returns what llama.cpp's files hold otherwise."""
    correction = (f"{_MIXER}.gate.e_score_correction.bias", routed_experts.CORRECTION, "same")
    return [*state_spaces.gguf_mixer_rows(_MIXER)(config), *family.gguf_expert_rows(), correction]


FAMILY = Family(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    models="Nemotron-H 4B–56B, Nemotron Nano 2 9B, 12B, Nemotron 3 Nano, Super",
    config_class=Config,
    build=build,
    config_keys=nemotron_h_keys.CONFIG_KEYS,
    config_aliases=nemotron_h_keys.ALIASES,
    config_given=nemotron_h_keys.config_given,
    config_ignored=nemotron_h_keys.IGNORED,
    config_constants=nemotron_h_keys.CONSTANTS,
    config_nulls=["num_key_value_heads", "time_step_limit", *routed_experts.ROUTING],
    layer_types=tuple(LETTERS),
    complete_keys=nemotron_h_keys.complete_keys,
    # Which other programs read, and Transformers before 5.
    written_keys=lambda config: {
        "hybrid_override_pattern": "".join(LETTERS[kind] for kind in config.layer_types),
        **state_spaces.written_steps(config),
    },
    weights=WEIGHTS,
    parameters=[
        _ROUTER,
        (f"{_MIXER}.experts.up_proj", f"{_MLP}/experts_up/kernel", "transpose"),
        (f"{_MIXER}.experts.down_proj", f"{_MLP}/experts_down/kernel", "transpose"),
    ],
    ignored=lambda config: ["mtp.*", f"blk.{config.num_layers}.*"],
    stored_prefixes={"backbone.": "model."},
    gguf_architecture="nemotron_h",
    other_gguf_architectures=["nemotron_h_moe"],
    gguf_given=nemotron_h_keys.gguf_given,
    gguf_keys={
        "layers": "layers_block_type",
        "ssm.conv_kernel": "conv_kernel",
        "ssm.state_size": "ssm_state_size",
        "ssm.time_step_rank": "mamba_num_heads",
        "ssm.group_count": "n_groups",
        "ssm.head_size": "mamba_head_dim",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",  # of the converter, too
        **{key: x for key, x in GGUF_KEYS.items() if key != "leading_dense_block_count"},
        "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
        "moe_latent_size": "moe_latent_size",
    },
    gguf_ignored=["rope.dimension_count", "rope.freq_base", "expert_gating_func"],
    gguf_permuted=llama.FAMILY.gguf_permuted,  # which has no effect without RoPE, but on adapters
    gguf_rows=gguf_rows,
)
