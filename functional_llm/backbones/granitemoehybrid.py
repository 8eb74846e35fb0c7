"""Granite 4: Mamba-2 in most layers, attention in the others or in all, experts in some models.

An MLP that all tokens take is beside the experts, or alone. Where there are Mamba-2 layers, no RoPE
turns queries and keys. Reference:
[Granite 4.0](https://github.com/ibm-granite/granite-4.0-language-models).
"""

from dataclasses import dataclass

from functional_llm.backbones import family, granite, granitemoe, llama, state_spaces
from functional_llm.backbones.family import Family
from functional_llm.backbones.stacks import build_of_types, with_rope
from functional_llm.backbones.state_spaces import HybridConfig
from functional_llm.backbones.transforms import Rows, fused
from functional_llm.blocks.decoder import NamedPart
from functional_llm.blocks.experts import Router, activated, expert_mlp, softmax
from functional_llm.blocks.language_model import Graph, LayerType
from functional_llm.blocks.mlp import gated_mlp
from functional_llm.blocks.rope import rotary
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(granite.MultipliedConfig, HybridConfig):
    """The numbers of a Granite 4, beside those of a Granite and of Mamba-2 layers.

    Without experts, there is `shared_dim` alone, of the one MLP.
    """

    layer_types: tuple[str, ...]
    has_rope: bool
    shared_dim: int
    experts: int
    chosen_experts: int


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""

    def build_layer(index: int, kind: str) -> CompositeLayer:
        mixer, mlp = build_mixer(config, kind), build_mlp(config)
        return granite.build_decoder(config, f"decoder_{index}", mixer, mlp)

    layers = [(kind, build_layer(i, kind)) for i, kind in enumerate(config.layer_types)]
    types = state_spaces.hybrid_types(config, with_rope(config) if config.has_rope else LayerType())
    return build_of_types(config, layers, types, **granite.multiplied(config))


def build_mixer(config: Config, kind: str) -> CompositeLayer:
    """Returns what mixes tokens in layers of a type."""
    if kind == "full_attention":
        return granite.self_attention(config, *([rotary()] if config.has_rope else []))
    return state_spaces.build_states(config, config.state_bias, activation=config.activation)


def build_mlp(config: Config) -> NamedPart:
    """Returns the MLP of a layer, with experts if there are any."""
    width, activation = config.hidden_dim, config.activation
    if not config.experts:
        return gated_mlp(config.shared_dim, width, activation)
    router = Router(num_experts=config.experts, num_chosen=config.chosen_experts, weights=[softmax])
    shared = gated_mlp(config.shared_dim, width, activation, name="shared")
    return expert_mlp(router, config.intermediate_dim, width, activated(activation), shared=shared)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {
        "intermediate_size": 11008,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 1024,
        "layer_types": ["linear_attention"] * keys["num_hidden_layers"],
        **state_spaces.PREFIXED_DEFAULTS,
        "mamba_proj_bias": False,
    }
    keys = granite.complete_keys(own | keys)
    family.check_given(keys, _NO_NULLS)
    if keys["num_local_experts"]:
        family.check_chosen(keys["num_experts_per_tok"], keys["num_local_experts"])
    return {
        **state_spaces.complete_prefixed(keys, keys["mamba_expand"] * keys["hidden_size"]),
        "layer_types": [state_spaces.OLDER_WORDS.get(kind, kind) for kind in keys["layer_types"]],
        "has_rope": keys.get("position_embedding_type") == "rope",
    }


def written_keys(config: Config) -> JSON:
    """Returns what Transformers needs beside the keys of fields."""
    return {
        "position_embedding_type": "rope" if config.has_rope else "nope",
        "mamba_expand": config.state_sizes.inner_dim // config.hidden_dim,
        **state_spaces.written_prefixed(config),
    }


_NO_NULLS = (
    *("mamba_expand", "mamba_proj_bias", "shared_intermediate_size"),
    *("num_local_experts", "num_experts_per_tok"),
)


_LAYER = "model.layers.{}"
_WHOLE, _ = fused()
_SHARED = f"{_LAYER}.shared_mlp"


def _shared(config: Config) -> str:
    """Returns the path of the MLP that all tokens take."""
    return "decoder_{}/mlp/shared" if config.experts else "decoder_{}/mlp"


def weights(config: Config) -> Rows:
    """Returns the names of weights; the MLP that is beside experts or alone is one module."""
    gate_and_up = f"{_SHARED}.input_linear.weight"
    return [
        *(row for row in granitemoe.WEIGHTS if config.experts or ".block_sparse_moe" not in row[0]),
        (f"{_LAYER}.input_layernorm.weight", "decoder_{}/mamba_norm/scale", "same"),
        *state_spaces.mixer_rows(f"{_LAYER}.mamba"),
        *((gate_and_up, f"{_shared(config)}/{x}/kernel", _WHOLE) for x in ("gate", "up")),
        (f"{_SHARED}.output_linear.weight", f"{_shared(config)}/down/kernel", "transpose"),
    ]


def gguf_rows(config: Config) -> Rows:
    """Returns what llama.cpp's files hold otherwise."""
    end = "_shexp" if config.experts else ""
    names = {f"ffn_{x}{end}": x for x in ("gate", "up", "down")}
    shared = family.all_dense_rows("blk.{}", _shared(config), names)
    return [
        *state_spaces.gguf_mixer_rows(f"{_LAYER}.mamba")(config),
        *shared,
        *family.gguf_expert_rows(),
    ]


FAMILY = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    models="Granite 4.0: Micro, 350M, 1B, and H- 350M, 1B, Micro, Tiny, Small",
    config_class=Config,
    build=build,
    config_keys={
        **{key: x for key, x in granite.FAMILY.config_keys.items() if key != "mlp_bias"},
        **state_spaces.PREFIXED_KEYS,
        "mamba_proj_bias": "state_bias",
        "num_local_experts": "experts",
        "num_experts_per_tok": "chosen_experts",
        "shared_intermediate_size": "shared_dim",
        "layer_types": "layer_types",
        "position_embedding_type": str,
    },
    config_aliases={"layers_block_type": "layer_types"},
    config_constants={"mlp_bias": False, "normalization_function": "rmsnorm", "init_method": "mup"},
    config_nulls=[
        *state_spaces.PREFIXED_NULLS,
        *_NO_NULLS,
        *granite.MULTIPLIERS.values(),
    ],
    layer_types=("full_attention", "linear_attention"),
    complete_keys=complete_keys,
    written_keys=written_keys,
    weights=weights,
    parameters=granitemoe.FAMILY.parameters,
    ignored=llama.FAMILY.ignored,
    gguf_architecture="granitehybrid",
    gguf_given=state_spaces.gguf_given,
    gguf_keys={
        **granite.MULTIPLIERS,
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_shared_feed_forward_length": "shared_intermediate_size",
        **state_spaces.PREFIXED_GGUF_KEYS,
    },
    gguf_defaults=granite.FAMILY.gguf_defaults,
    gguf_permuted=llama.FAMILY.gguf_permuted,
    gguf_rows=gguf_rows,
)
