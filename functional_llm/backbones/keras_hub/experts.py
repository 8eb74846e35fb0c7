"""KerasHub's columns of models with experts, kin of Llama."""

from collections.abc import Sequence
from typing import Any

from functional_llm.backbones.keras_hub.column import (
    OURS,
    REQUIRED,
    KerasHub,
    dense,
    has_window,
    window_fields,
)
from functional_llm.backbones.keras_hub.llamas import (
    ROPE_ARGUMENTS,
    common_fields,
    decoder_weights,
    factor_argument,
    gated_mlp,
    window_wrong,
)
from functional_llm.backbones.transforms import Rows
from functional_llm.graph.types import JSON

_MLP = f"{OURS}/mlp"
_QWEN: dict[str, Any] = {
    **ROPE_ARGUMENTS,
    **dict.fromkeys(("moe_intermediate_dim", "num_experts"), REQUIRED),
    "top_k": 4,
    "norm_top_k_prob": False,
    "decoder_sparse_step": 1,
    "tie_word_embeddings": False,
    "sliding_window_size": 32768,
    "router_aux_loss_coefficient": 0.001,
}


_RENAMED = {
    "top_k": "num_experts_per_token",
    "moe_intermediate_dim": "expert_dim",
    "norm_top_k_prob": "normalize_weights",
}


def _experts(block: str) -> Rows:
    bank, shared = f"{block}/mlp/expert_bank/vars", f"{block}/mlp/shared_expert"
    return [
        *gated_mlp(f"{block}/mlp", _MLP),  # of layers without experts
        *dense(f"{block}/mlp/_sparse_feedforward_gate_dense", f"{_MLP}/router"),
        (f"{bank}/0", f"{_MLP}/experts_gate/kernel", "last_axis"),
        (f"{bank}/0", f"{_MLP}/experts_up/kernel", "last_axis"),
        (f"{bank}/1", f"{_MLP}/experts_down/kernel", "same"),
        *gated_mlp(f"{shared}_dense", f"{_MLP}/shared"),
        *dense(f"{shared}_gate_dense", f"{_MLP}/shared_gate"),
    ]


def _mixtral_experts(block: str) -> Rows:
    place = f"{block}/_sparse_moe_block"
    bank = enumerate(("gate", "up", "down"))
    return [
        *dense(f"{place}/_sparse_feedforward_gate_dense", f"{_MLP}/router"),
        *((f"{place}/expert_bank/vars/{i}", f"{_MLP}/experts_{x}/kernel", "same") for i, x in bank),
    ]


MIXTRAL = KerasHub(
    classes=("MixtralBackbone",),
    arguments={
        **ROPE_ARGUMENTS,
        "num_experts": REQUIRED,
        "top_k": 2,
        "router_jitter_noise": 0.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": 512,
        "output_router_logits": False,
    },
    renamed={"top_k": "num_experts_per_token"},
    fields=lambda x: common_fields(x, tie_word_embeddings=False),
    written=factor_argument,
    ignored=("router_jitter_noise", "router_aux_loss_coef"),  # of training
    weights=decoder_weights(
        "mixtral_transformer_decoder",
        "mixtral_layer_normalization",
        "%s_dense",
        _mixtral_experts,
    ),
)


def _dense_layers(x: JSON) -> tuple[int, ...]:
    step, named = x["decoder_sparse_step"], x["mlp_only_layers"] or ()
    return tuple(i for i in range(x["num_layers"]) if i in named or (i + 1) % step)


def _fields(x: JSON, slides: bool, **fields: Any) -> JSON:
    return common_fields(x, **window_fields(x, [slides] * x["num_layers"]), **fields)


def _written(config: Any) -> JSON:
    return {**factor_argument(config), "mlp_only_layers": list(config.dense_layers)}


def _qwen2_wrong(config: Any) -> Sequence[str]:
    # There JAX has an attention of its own.
    return ["it has no window on GPUs and TPUs"] if has_window(config) else []


def _qwen2_weights(config: Any) -> Rows:
    rows = decoder_weights("qwen_moe_transformer_decoder", "qwen_layer_norm", "%s_dense", _experts)(
        config
    )
    return [(x.replace("/output_dense", "/_output_dense"), path, y) for x, path, y in rows]


# What `_fields` reads, of all of which one spelling is written; and what is of training.
_IGNORED = ("decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coefficient")
_TYPES = {"mlp_only_layers": tuple[int, ...], "decoder_sparse_step": int}

QWEN2_MOE = KerasHub(
    classes=("QwenMoeBackbone",),
    arguments={
        **_QWEN,
        "shared_expert_intermediate_dim": REQUIRED,
        "use_sliding_window_attention": False,
        "output_router_logits": False,
        "mlp_only_layers": [],
    },
    renamed={**_RENAMED, "shared_expert_intermediate_dim": "shared_expert_dim"},
    types=_TYPES,
    # Each layer takes itself for the first.
    fields=lambda x: _fields(
        x,
        slides=x["use_sliding_window_attention"],
        dense_layers=tuple(range(x["num_layers"])) if 0 in _dense_layers(x) else (),
        attention_bias=True,
    ),
    written=lambda config: {
        **_written(config),
        "use_sliding_window_attention": has_window(config),
        "sliding_window_size": config.sliding_window or 32768,
    },
    ignored=_IGNORED,
    weights=_qwen2_weights,
    wrong=_qwen2_wrong,
)


def _qwen3_wrong(config: Any) -> Sequence[str]:
    kept = config.layer_norm_epsilon != 1e-6
    norms = ["the norms of its queries and keys have an epsilon of 1e-6"] if kept else []
    return [*window_wrong(config), *norms]


QWEN3_MOE = KerasHub(
    classes=("Qwen3MoeBackbone",),
    arguments={**_QWEN, "head_dim": None, "mlp_only_layers": None},
    renamed=_RENAMED,
    types=_TYPES,
    fields=lambda x: _fields(
        x,
        slides=bool(x["sliding_window_size"]),
        dense_layers=_dense_layers(x),
        attention_bias=False,
    ),
    written=lambda config: {
        **_written(config),
        "sliding_window_size": config.sliding_window if has_window(config) else None,
    },
    ignored=_IGNORED,
    weights=decoder_weights("qwen3_moe_transformer_decoder", "qwen3_moe_layer_norm", mlp=_experts),
    wrong=_qwen3_wrong,
)
