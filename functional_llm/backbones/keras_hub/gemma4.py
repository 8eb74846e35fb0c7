"""KerasHub's column of Gemma 4."""

from typing import Any

from functional_llm.backbones.keras_hub.column import EMBEDDING, REQUIRED, KerasHub, dense, one
from functional_llm.backbones.keras_hub.gemmas import NORMS
from functional_llm.backbones.transforms import Rows, axis_added, heads_first, split_axis
from functional_llm.blocks.rope_scaling import ProportionalScaling
from functional_llm.graph.types import JSON

_SIZES = ["vocabulary_size", "num_layers", "hidden_dim"]
_SIZES += ["num_query_heads", "num_key_value_heads", "head_dim"]
_PATTERN = 6
_RENAMED = {
    "num_kv_shared_layers": "borrowing_layers",
    "use_double_wide_mlp": "borrowing_is_wide",
    "hidden_size_per_layer_input": "per_layer_width",
}
# Of a model of text alone.
_NOT_READ: JSON = {
    "image_size": None,
    "query_head_dim_normalize": True,
    "num_audio_tokens_per_clip": None,
    "use_vision_bidirectional_attention": False,
    "sliding_window_pattern": _PATTERN,
}
_ARGUMENTS: JSON = {
    **dict.fromkeys([*_SIZES, "intermediate_dim"], REQUIRED),
    **_NOT_READ,
    "attention_logit_soft_cap": None,
    "use_sliding_window_attention": True,
    "local_rope_scaling_factor": 1.0,
    "vision_encoder": None,
    "audio_encoder": None,
    "use_bidirectional_attention": False,
    "is_embedding_model": False,
    "pooling_intermediate_dim": None,
    "embedding_dim": None,
    "final_logit_soft_cap": None,
    "sliding_window_size": 512,
    "layer_types": None,
    "global_head_dim": None,
    "global_rope_scaling_factor": 1.0,
    "layer_norm_epsilon": 1e-6,
    "num_kv_shared_layers": 0,
    "num_global_key_value_heads": None,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": None,
    "global_rope_wavelength": None,
    "local_rope_wavelength": None,
    "global_rope_partial_rotary_factor": 1.0,
    "use_double_wide_mlp": False,
    "enable_moe_block": False,
    "num_experts": None,
    "expert_intermediate_dim": None,
    "num_experts_per_token": 8,
}


def _fields(x: JSON) -> JSON:
    """Returns the fields of our config that are no argument."""
    period, full = x["sliding_window_pattern"], x["num_global_key_value_heads"]
    kinds = x["layer_types"] or [
        "sliding_attention" if (i + 1) % period else "full_attention"
        for i in range(x["num_layers"])
    ]
    share, factor = x["global_rope_partial_rotary_factor"], x["global_rope_scaling_factor"]
    scaling = ProportionalScaling(partial_rotary_factor=share, factor=factor)
    has_experts = x["enable_moe_block"]
    return {
        "activation": "gelu_approximate",
        "tie_word_embeddings": True,
        "max_sequence_length": 131_072,
        "layer_types": tuple(kinds),
        "sliding_window": x["sliding_window_size"],
        "rope_max_wavelength": x["global_rope_wavelength"] or 1_000_000.0,
        "local_rope_max_wavelength": x["local_rope_wavelength"] or 10_000.0,
        "rope_scaling": None if share == factor == 1 else scaling,
        "full_head_dim": x["global_head_dim"] or x["head_dim"],
        "num_full_key_value_heads": full or x["num_key_value_heads"],
        "values_are_keys": full is not None,
        "per_layer_vocabulary": x["vocab_size_per_layer_input"] or x["vocabulary_size"],
        "num_experts": x["num_experts"] if has_experts else None,
        "num_experts_per_token": x["num_experts_per_token"] if has_experts else None,
        "expert_dim": x["expert_intermediate_dim"] if has_experts else None,
    }


def _written(config: Any) -> JSON:
    scaling = config.rope_scaling or ProportionalScaling()
    return {
        "layer_types": list(config.layer_types),
        "sliding_window_size": config.sliding_window or 512,
        "global_head_dim": config.full_head_dim,
        "global_rope_scaling_factor": scaling.factor,
        "global_rope_partial_rotary_factor": scaling.partial_rotary_factor,
        "global_rope_wavelength": config.rope_max_wavelength,
        "local_rope_wavelength": config.local_rope_max_wavelength,
        "num_global_key_value_heads": (
            config.num_full_key_value_heads if config.values_are_keys else None
        ),
        "vocab_size_per_layer_input": config.per_layer_vocabulary,
        "enable_moe_block": config.num_experts is not None,
        "expert_intermediate_dim": config.expert_dim,
        "num_experts_per_token": config.num_experts_per_token or 8,
    }


_NORMS = {**NORMS, "post_per_layer_input_norm": "per_layer_post_norm"}
_OF_EXPERTS = {
    "pre_ffw_norm": "mlp/shared_norm",
    "post_ffw_norm_dense": "mlp/shared_post_norm",
    "pre_ffw_norm_moe": "mlp/experts_norm",
    "post_ffw_norm_moe_path": "mlp/experts_post_norm",
    "moe_router": "mlp/router_norm",
}


def _weights(config: Any) -> Rows:
    has_table = config.per_layer_width > 0
    return [
        EMBEDDING,
        ("layers/embedding/vars/0", "per_layer_embedding/embeddings", "same"),
        *dense("layers/dense", "per_layer_projection"),
        *([one("layers/rms_normalization", "per_layer_norm/scale")] if has_table else []),
        one(f"layers/rms_normalization{'_1' if has_table else ''}", "final_norm/scale"),
        *(row for i in range(config.num_layers) for row in _layer_weights(config, i)),
    ]


def _layer_weights(config: Any, index: int) -> Rows:
    """Returns the rows of a layer: heads differ with its type."""
    theirs, ours = f"layers/gemma4_text_decoder_block_{index}", f"decoder_{index}"
    keys, size = config.head(config.layer_types[index])
    queries, mlp, norms = config.num_query_heads, "mlp", _NORMS
    if config.num_experts is not None:
        norms, mlp = {**_NORMS, **_OF_EXPERTS}, "mlp/shared"
    attend, bank = f"{theirs}/attention", f"{theirs}/moe_expert_bank/vars"
    return [
        *(one(f"{theirs}/{name}", f"{ours}/{norm}/scale") for name, norm in norms.items()),
        (f"{theirs}/vars/0", f"{ours}/layer_scale/scale", axis_added(0)),
        *dense(f"{attend}/query_dense", f"{ours}/attention/query", heads_first(queries, size)),
        *dense(f"{attend}/key_dense", f"{ours}/attention/key", heads_first(keys, size)),
        *dense(f"{attend}/value_dense", f"{ours}/attention/value", heads_first(keys, size)),
        *dense(
            f"{attend}/output_dense", f"{ours}/attention/output", split_axis(0, (queries, size))
        ),
        *dense(f"{theirs}/gating_ffw", f"{ours}/{mlp}/gate"),
        *dense(f"{theirs}/gating_ffw_2", f"{ours}/{mlp}/up"),
        *dense(f"{theirs}/ffw_linear", f"{ours}/{mlp}/down"),
        *dense(f"{theirs}/per_layer_input_gate", f"{ours}/per_layer/gate"),
        *dense(f"{theirs}/per_layer_up_proj", f"{ours}/per_layer/projection"),
        *dense(f"{theirs}/moe_router/proj", f"{ours}/mlp/router"),
        *(
            (f"{bank}/{i}", f"{ours}/mlp/experts_{part}/kernel", "same")
            for i, part in enumerate(("gate", "up", "down"))
        ),
        (f"{bank}/3", f"{ours}/mlp/expert_scale/scale", "same"),
    ]


GEMMA4 = KerasHub(
    classes=("Gemma4Backbone",),
    arguments=_ARGUMENTS,
    renamed=_RENAMED,
    fields=_fields,
    written=_written,
    weights=_weights,
    ignored=[*_NOT_READ],
    types={"layer_types": tuple[str, ...]},
    encoders={x: [f"layers/gemma4_{x}"] for x in ("vision_encoder", "audio_encoder")},
)
