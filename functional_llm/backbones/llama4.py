"""Llama 4: experts whose inputs are weighted, layers that see chunks, layers without RoPE.

Where RoPE turns pairs of channels, a norm with nothing learned follows, and a token sees the chunk
of the text that it is in, up to itself. In every fourth layer nothing turns, a token sees all
before it, and queries grow with their position. Beside the experts is an MLP for all tokens.
Reference: [Llama 4](https://ai.meta.com/blog/llama-4-multimodal-intelligence/).
"""

from dataclasses import dataclass

from keras import ops

from functional_llm.backbones import family, llama, smollm3
from functional_llm.backbones.experts import GGUF_KEYS, ExpertsConfig, shared_rows
from functional_llm.backbones.family import Family
from functional_llm.backbones.routed_experts import MixedConfig, build_mixed
from functional_llm.backbones.stacks import build_around
from functional_llm.backbones.transforms import Rows
from functional_llm.backbones.wrapper import Wrapper
from functional_llm.blocks.attention import in_turn
from functional_llm.blocks.experts import Router
from functional_llm.blocks.language_model import Graph, LayerType
from functional_llm.blocks.norm import bare_rms_norm
from functional_llm.blocks.rope import Rope, no_rotary, query_scale, rotary_pairs
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class Config(MixedConfig, ExpertsConfig):
    """The numbers of a Llama 4, beside those that others have."""

    attention_bias: bool
    query_key_norm: bool
    no_rope_layers: tuple[int, ...]  # 0 for a layer without RoPE, and 1 for one with it
    layer_types: tuple[str, ...]
    chunk_size: int
    scales_queries: bool
    query_scale_length: int
    query_scale: float
    expert_layers: tuple[int, ...]


def build(config: Config) -> Graph:
    """Returns the inputs and outputs of the graph."""
    rope = Rope(config.head_dim, config.rope_max_wavelength, config.rope_scaling)
    types = {
        "full_attention": LayerType(rope),
        "chunked_attention": LayerType(rope, chunk=config.chunk_size),
    }
    layers = [(kind, build_decoder(config, i)) for i, kind in enumerate(config.layer_types)]
    return build_around(config, layers, types)


def build_decoder(config: Config, index: int) -> CompositeLayer:
    """Returns the decoder layer of this number."""
    epsilon, rotate, of_queries = config.layer_norm_epsilon, no_rotary(), []
    if config.no_rope_layers[index]:
        norms = [bare_rms_norm(epsilon)] if config.query_key_norm else []
        rotate = in_turn(rotary_pairs(), *norms)
    elif config.scales_queries:
        of_queries = [query_scale(config.query_scale_length, config.query_scale, offset=1)]
    bias, chosen = config.attention_bias, config.num_experts_per_token
    attention = llama.build_attention(config, rotate, bias, of_queries=of_queries)
    router = Router(num_experts=config.num_experts, num_chosen=chosen, weights=[ops.sigmoid])
    there = router if index in config.expert_layers else None
    return build_mixed(config, index, attention, there, config.expert_dim, weighs_inputs=True)


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
    own |= {"max_position_embeddings": 131072, "rope_theta": 500000.0, "intermediate_size": 8192}
    own |= {"intermediate_size_mlp": 16384, "num_local_experts": 16, "num_experts_per_tok": 1}
    own |= {"attention_bias": False, "use_qk_norm": True, "attention_chunk_size": 8192}
    own |= {"attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1}
    keys = family.complete_common_keys(own | keys)
    keys["scales_queries"] = bool(keys["attn_temperature_tuning"])  # published files say 4
    family.check_given(keys, ["attention_chunk_size"])
    turns = smollm3.rope_layers(keys)
    kinds = ["chunked_attention" if x else "full_attention" for x in turns]
    num_layers, step = keys["num_hidden_layers"], keys.get("interleave_moe_layer_step", 1)
    family.check_chosen(keys["num_experts_per_tok"], keys["num_local_experts"])
    layers = keys.get("moe_layers")
    if layers is None:
        layers = list(range(step - 1, num_layers, max(step, 1)))
    if step < 1 or not set(layers) <= set(range(num_layers)):
        raise ValueError(
            "config.json: expected an interleave_moe_layer_step of at least 1, and moe_layers that "
            f"are numbers of layers. Received: {step} and {layers}."
        )
    kinds = keys.get("layer_types") or kinds
    return keys | {"no_rope_layers": turns, "layer_types": kinds, "moe_layers": layers}


def written_keys(config: Config) -> JSON:
    """Returns whether queries are scaled, and how far it is from experts to experts.

    The latter if it is the same throughout: llama.cpp's converter does not read which layers.
    """
    layers, all_layers = list(config.expert_layers), range(config.num_layers)
    steps = [x for x in range(1, config.num_layers + 1) if layers == list(all_layers[x - 1 :: x])]
    step: JSON = {"interleave_moe_layer_step": steps[0]} if steps else {}
    return step | {"attn_temperature_tuning": config.scales_queries}


def gguf_defaults(keys: JSON) -> JSON:
    """Returns what a GGUF file does not say, as llama.cpp takes it."""
    own: JSON = {"use_qk_norm": keys.get("num_local_experts") != 128}  # all but Maverick
    if "sliding_window" in keys:  # zero, for no chunks
        count = keys["num_hidden_layers"]
        own |= {"layer_types": ["full_attention"] * count, "no_rope_layers": [1] * count}
    return own


_EXPERTS = family.expert_parameters(
    "feed_forward.experts", "feed_forward.router", "last_axis", "same"
)
WEIGHTS: Rows = [
    *((name.replace(".mlp.", ".feed_forward."), path, x) for name, path, x in llama.WEIGHTS),
    *_EXPERTS,
    *shared_rows("model.layers.{}.feed_forward.shared_expert"),
]

FAMILY = Family(
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    models="Llama 4 Scout, Maverick",
    config_class=Config,
    build=build,
    layer_types=("full_attention", "chunked_attention"),
    config_keys={
        **family.COMMON_KEYS,
        "intermediate_size": "expert_dim",
        "intermediate_size_mlp": "intermediate_dim",
        "attention_bias": "attention_bias",
        "use_qk_norm": "query_key_norm",
        "no_rope_layers": "no_rope_layers",
        "no_rope_layer_interval": int,
        "layer_types": "layer_types",
        "attention_chunk_size": "chunk_size",
        "attn_temperature_tuning": object,
        "floor_scale": "query_scale_length",
        "attn_scale": "query_scale",
        "moe_layers": "expert_layers",
        "interleave_moe_layer_step": int,
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
    },
    config_constants={"for_llm_compressor": False},
    config_nulls=("num_key_value_heads", "head_dim", "attention_chunk_size"),
    complete_keys=complete_keys,
    written_keys=written_keys,
    weights=WEIGHTS,
    ignored=llama.FAMILY.ignored,
    parameters=_EXPERTS,
    wrappers=[
        Wrapper(
            model_type="llama4",
            text_family="llama4_text",
            prefixes={
                "language_model.model.": "model.",
                "language_model.lm_head.": "lm_head.",
            },
            ignored=["vision_model.*", "multi_modal_projector.*"],
        )
    ],
    gguf_architecture="llama4",
    gguf_keys={
        "feed_forward_length": "intermediate_size_mlp",
        "expert_feed_forward_length": "intermediate_size",
        "expert_count": "num_local_experts",
        **GGUF_KEYS,
        "interleave_moe_layer_step": "interleave_moe_layer_step",
    },
    gguf_defaults=gguf_defaults,
    gguf_rows=lambda config: family.gguf_expert_rows(),
)
