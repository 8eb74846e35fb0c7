"""KerasHub's columns of Llama and its kin: RMSNorm, RoPE, grouped queries, a gated SiLU."""

from collections.abc import Callable, Sequence
from typing import Any

from functional_llm.backbones.keras_hub.column import (
    EMBEDDING,
    HEAD,
    OURS,
    REQUIRED,
    SIZES,
    KerasHub,
    attention,
    dense,
    divided,
    factor,
    has_window,
    one,
    window_fields,
)
from functional_llm.backbones.transforms import Rows, split_axis
from functional_llm.blocks.rope import Rope
from functional_llm.blocks.rope_scaling import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
)
from functional_llm.graph.types import JSON

# Of most of them, and of those with RoPE's positions divided by a factor.
_HEADS = ["num_query_heads", "num_key_value_heads"]
ARGUMENTS = dict.fromkeys([*SIZES, *_HEADS], REQUIRED) | {"layer_norm_epsilon": 1e-6}
ROPE_ARGUMENTS = ARGUMENTS | {"rope_max_wavelength": 10000, "rope_scaling_factor": 1.0}
# Name of an argument -> field of `Llama3Scaling`.
_STRETCH = {
    "rope_frequency_adjustment_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_pretraining_sequence_length": "original_max_sequence_length",
}


def common_fields(arguments: JSON, **fields: Any) -> JSON:
    """Returns the fields that KerasHub does not have, and those given.

    The longest text is that of a published model: KerasHub states none.
    """
    stretch: JSON = {field: arguments.get(name) for name, field in _STRETCH.items()}
    known: JSON = {
        "rope_scaling_factor": arguments.get("rope_position_scaling_factor", 1),
        **arguments,
    }
    return {
        "head_dim": arguments.get("head_dim")
        or arguments["hidden_dim"] // arguments["num_query_heads"],
        "rope_scaling": divided(known["rope_scaling_factor"])
        if None in stretch.values()
        else Llama3Scaling(**stretch),
        "max_sequence_length": 131072,
        "activation": "silu",
        **fields,
    }


def _stretch_arguments(config: Any) -> JSON:
    scaling = config.rope_scaling
    known = isinstance(scaling, Llama3Scaling)
    stretch = {name: getattr(scaling, x) if known else None for name, x in _STRETCH.items()}
    return stretch | {"rope_position_scaling_factor": factor(scaling)}


def _stretch_wrong(config: Any) -> Sequence[str]:
    ignored = isinstance(config.rope_scaling, LinearScaling)
    return ["it ignores rope_position_scaling_factor"] if ignored else []


def window_wrong(config: Any) -> Sequence[str]:
    """Returns that KerasHub has no window, where JAX has an attention of its own."""
    return ["it has no window on JAX"] if has_window(config) else []


def factor_argument(config: Any) -> JSON:
    """Returns the factor on positions as most classes call it."""
    return {"rope_scaling_factor": factor(config.rope_scaling)}


def gated_mlp(place: str, path: str) -> Rows:
    """Returns the rows of an MLP, from its place and the path of ours."""
    return [
        *dense(f"{place}/_feedforward_gate_dense", f"{path}/gate"),
        *dense(f"{place}/_feedforward_intermediate_dense", f"{path}/up"),
        *dense(f"{place}/_feedforward_output_dense", f"{path}/down"),
    ]


def decoder_weights(
    layer: str,
    norm: str,
    projections: str = "_%s_dense",
    mlp: Callable[[str], Rows] = lambda block: gated_mlp(block, f"{OURS}/mlp"),
) -> Callable[[Any], Rows]:
    """Returns the weights.

    Args:
        layer: The kind of the decoder layers.
        norm: The kind of the last norm.
        projections: Names of the attention's layers, with `%s` as in `attention`.
        mlp: Place of a decoder layer -> the rows of its MLP.
    """
    block = f"layers/{layer}_{{}}"
    attend = f"{block}/_self_attention_layer"

    def rows(config: Any) -> Rows:
        numbers = config.num_query_heads, config.num_key_value_heads, config.head_dim
        return [
            EMBEDDING,
            (HEAD, "head/kernel", "same"),
            one(f"{block}/_self_attention_layernorm", f"{OURS}/attention_norm/scale"),
            *attention(f"{attend}/{projections}", *numbers),
            one(f"{attend}/_query_dense_layer_norm", f"{OURS}/attention/query_norm/scale"),
            one(f"{attend}/_key_dense_layer_norm", f"{OURS}/attention/key_norm/scale"),
            one(f"{block}/_feedforward_layernorm", f"{OURS}/mlp_norm/scale"),
            *mlp(block),
            one(f"layers/{norm}", "final_norm/scale"),
        ]

    return rows


LLAMA = KerasHub(
    classes=("Llama3Backbone", "LlamaBackbone"),
    arguments={
        **ARGUMENTS,
        **dict.fromkeys(_STRETCH),
        "rope_max_wavelength": 10000,
        "rope_position_scaling_factor": 1.0,
        "tie_word_embeddings": False,
    },
    fields=lambda x: common_fields(x, attention_bias=False, mlp_bias=False),
    written=_stretch_arguments,
    wrong=_stretch_wrong,
    weights=decoder_weights("llama_transformer_decoder", "llama_layer_norm"),
)

MISTRAL = KerasHub(
    classes=("MistralBackbone",),
    arguments={**ROPE_ARGUMENTS, "sliding_window": 512, "head_dim": None},
    fields=lambda x: common_fields(x, tie_word_embeddings=False),
    written=factor_argument,
    weights=decoder_weights("mistral_transformer_decoder", "mistral_layer_normalization"),
)

QWEN2 = KerasHub(
    classes=("QwenBackbone",),
    arguments={
        **ROPE_ARGUMENTS,
        "tie_word_embeddings": True,
        "use_sliding_window_attention": False,
        "sliding_window_size": 32768,
    },
    fields=lambda x: common_fields(
        x, **window_fields(x, [x["use_sliding_window_attention"]] * x["num_layers"])
    ),
    written=lambda config: {
        **factor_argument(config),
        "use_sliding_window_attention": has_window(config),
        "sliding_window_size": config.sliding_window or 32768,
    },
    weights=decoder_weights("qwen_transformer_decoder", "qwen_layer_norm"),
    wrong=window_wrong,
)

QWEN3 = KerasHub(
    classes=("Qwen3Backbone",),
    arguments={
        **ROPE_ARGUMENTS,
        "head_dim": REQUIRED,
        "tie_word_embeddings": True,
        "sliding_window_size": 32768,
    },
    fields=lambda x: common_fields(
        x,
        attention_bias=False,
        **window_fields(x, [bool(x["sliding_window_size"])] * x["num_layers"]),
    ),
    written=lambda config: {
        **factor_argument(config),
        "sliding_window_size": config.sliding_window if has_window(config) else None,
    },
    weights=decoder_weights("qwen3_transformer_decoder", "qwen3_layer_norm"),
    wrong=window_wrong,
)


_FACTORS = ("rope_scaling_short_factor", "rope_scaling_long_factor")
_TRAINED = "pretraining_sequence_length"


def _phi3_scaling(x: JSON) -> RopeScaling | None:
    known = {"rope_scaling_type": "su"}.items() <= x.items()
    if not known or None in (x[_TRAINED], *(x[name] for name in _FACTORS)):
        return None
    short, long = (tuple(float(factor) for factor in x[name]) for name in _FACTORS)
    return LongRopeScaling(
        short_factors=short,
        long_factors=long,
        original_max_sequence_length=x[_TRAINED],
        factor=x["max_sequence_length"] / x[_TRAINED],
    )


def _phi3_arguments(config: Any) -> JSON:
    scaling = config.rope_scaling
    if not isinstance(scaling, LongRopeScaling):
        return {_TRAINED: 4096}
    factors = (list(scaling.short_factors), list(scaling.long_factors))
    return {
        "rope_scaling_type": "su",
        _TRAINED: scaling.original_max_sequence_length,
        **dict(zip(_FACTORS, factors, strict=True)),
    }


def _phi3_weights(config: Any) -> Rows:
    block = "layers/phi3_decoder_{}"
    numbers = config.num_query_heads, config.num_key_value_heads, config.head_dim
    return [
        EMBEDDING,
        (HEAD, "head/kernel", "same"),
        one(f"{block}/pre_attention_layernorm", f"{OURS}/attention_norm/scale"),
        *attention(f"{block}/attention/%s_dense", *numbers),
        one(f"{block}/post_attention_layernorm", f"{OURS}/mlp_norm/scale"),
        *dense(f"{block}/feedforward_gate_dense", f"{OURS}/mlp/gate"),
        *dense(f"{block}/feedforward_intermediate_dense", f"{OURS}/mlp/up"),
        *dense(f"{block}/feedforward_output_dense", f"{OURS}/mlp/down"),
        one("layers/phi3_layer_norm", "final_norm/scale"),
    ]


PHI3 = KerasHub(
    classes=("Phi3Backbone",),
    arguments={
        **ARGUMENTS,
        "max_sequence_length": 4096,
        _TRAINED: 4096,
        "rope_max_wavelength": 10000,
        **dict.fromkeys(["rope_scaling_type", *_FACTORS]),
    },
    types={
        _TRAINED: int,
        "rope_scaling_type": str,
        **dict.fromkeys(_FACTORS, tuple[float, ...]),
    },
    fields=lambda x: common_fields(
        x,
        max_sequence_length=x["max_sequence_length"],
        rope_scaling=_phi3_scaling(x),
        partial_rotary_factor=1.0,
        sliding_window=None,
        tie_word_embeddings=False,
    ),
    written=_phi3_arguments,
    wrong_text=lambda config: (
        ["it turns a prompt as a long text where there is room for one"]
        if isinstance(config.rope_scaling, LongRopeScaling)
        else []
    ),
    ignored=(_TRAINED, *_FACTORS),  # without meaning, or read
    weights=_phi3_weights,
)


def _smollm3_fields(x: JSON) -> JSON:
    turns = [int(turn) for turn in x["rope_layer_enabled_list"]] + [1] * x["num_layers"]
    return common_fields(
        {**x, "num_query_heads": x["num_attention_heads"]},
        max_sequence_length=x["max_position_embeddings"],
        attention_bias=False,  # with it, KerasHub's output has none
        no_rope_layers=tuple(turns[: x["num_layers"]]),
        layer_types=("full_attention",) * x["num_layers"],
        sliding_window=None,
        tie_word_embeddings=True,
    )


_SMOLLM3 = "layers/smol_lm3_decoder_layer_{}"
_FREQUENCIES = f"{_SMOLLM3}/self_attn/rotary_embedding/vars/0"


def _smollm3_weights(config: Any) -> Rows:
    attend, theirs = f"{OURS}/attention", f"{_SMOLLM3}/self_attn"
    output = split_axis(0, (config.num_query_heads, config.head_dim))
    return [
        EMBEDDING,
        one(f"{_SMOLLM3}/input_layernorm", f"{OURS}/attention_norm/scale"),
        *dense(f"{theirs}/q_proj", f"{attend}/query"),
        *dense(f"{theirs}/k_proj", f"{attend}/key"),
        *dense(f"{theirs}/v_proj", f"{attend}/value"),
        *dense(f"{theirs}/o_proj", f"{attend}/output", output),
        one(f"{_SMOLLM3}/post_attention_layernorm", f"{OURS}/mlp_norm/scale"),
        *dense(f"{_SMOLLM3}/mlp/gate_proj", f"{OURS}/mlp/gate"),
        *dense(f"{_SMOLLM3}/mlp/up_proj", f"{OURS}/mlp/up"),
        *dense(f"{_SMOLLM3}/mlp/down_proj", f"{OURS}/mlp/down"),
        one("layers/rms_normalization", "final_norm/scale"),
    ]


SMOLLM3 = KerasHub(
    classes=("SmolLM3Backbone",),
    arguments=dict.fromkeys(
        [
            *SIZES,
            *("num_attention_heads", "num_key_value_heads", "attention_bias", "mlp_bias"),
            *("attention_dropout", "rope_layer_enabled_list", "layer_types", "layer_norm_epsilon"),
            *("max_position_embeddings", "rope_theta", "partial_rotary_factor"),
        ],
        REQUIRED,
    ),
    types={
        "num_attention_heads": int,
        "max_position_embeddings": int,
        "rope_theta": float,
        "rope_layer_enabled_list": tuple[int, ...],
    },
    renamed={
        "num_attention_heads": "num_query_heads",
        "rope_theta": "rope_max_wavelength",
    },
    fields=_smollm3_fields,
    written=lambda x: {
        "attention_dropout": 0.0,
        "rope_layer_enabled_list": [bool(turn) for turn in x.no_rope_layers],
        "layer_types": list(x.layer_types),
        "max_position_embeddings": x.max_sequence_length,
        "partial_rotary_factor": 1.0,
    },
    ignored=("attention_dropout",),
    weights=_smollm3_weights,
    computed=lambda x: {_FREQUENCIES: Rope(x.head_dim, x.rope_max_wavelength).frequencies},
)
