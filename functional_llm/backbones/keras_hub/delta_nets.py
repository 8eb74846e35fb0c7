"""KerasHub's columns of models with gated delta nets."""

from typing import Any

import numpy as np

from functional_llm.backbones.keras_hub.column import (
    EMBEDDING,
    HEAD,
    OURS,
    REQUIRED,
    KerasHub,
    dense,
    one,
)
from functional_llm.backbones.keras_hub.llamas import (
    ROPE_ARGUMENTS,
    common_fields,
    factor_argument,
    gated_mlp,
)
from functional_llm.backbones.transforms import Rows, Transform, split_axis
from functional_llm.graph.types import JSON

# Argument -> our field.
_NETS = {
    "linear_num_key_heads": "num_delta_key_heads",
    "linear_num_value_heads": "num_delta_value_heads",
    "linear_key_head_dim": "delta_key_dim",
    "linear_value_head_dim": "delta_value_dim",
    "linear_conv_kernel_dim": "convolution_width",
}
_ARGUMENTS: dict[str, Any] = {
    **ROPE_ARGUMENTS,
    "head_dim": REQUIRED,
    "layer_types": None,
    "partial_rotary_factor": 0.25,
    "tie_word_embeddings": False,
    "sliding_window_size": 32768,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "vision_encoder": None,
    "mrope_section": None,
}


def _fields(x: JSON, **fields: Any) -> JSON:
    window = x["sliding_window_size"]
    if window is not None and window < _ARGUMENTS["sliding_window_size"]:
        raise ValueError(
            f"Expected a sliding_window_size of None, or 32768 as in KerasHub's presets: Qwen 3.5 "
            f"has no window. Received {window}."
        )
    kinds = x["layer_types"] or [
        "linear_attention" if (i + 1) % 4 else "full_attention" for i in range(x["num_layers"])
    ]
    return common_fields(x, layer_types=tuple(kinds), attention_bias=False, **fields)


def _written(config: Any) -> JSON:
    return {
        **factor_argument(config),
        "layer_types": list(config.layer_types),
        "sliding_window_size": None,
    }


def _wrong_text(config: Any) -> list[str]:
    has_nets = "linear_attention" in config.layer_types
    twice = "its states absorb what stands behind a prompt, and the prompt's last token twice"
    return [twice] if has_nets else []


def _weights(block: str, config: Any, mlp: Rows) -> Rows:
    attend, net = f"{block}/_self_attention_layer", f"{block}/_linear_attn"
    ours, our_net = f"{OURS}/attention", f"{OURS}/delta_net"
    queries, keys = config.num_query_heads, config.num_key_value_heads
    size = config.head_dim

    def of_heads(count: int) -> Transform:
        return split_axis(1, (count, size))

    # The query of each head, and its gate behind it.
    gated = Transform(
        lambda x: x.reshape(len(x), -1), lambda x: np.reshape(x, (len(x), -1, size)), axis=-1
    )
    return [
        EMBEDDING,
        (HEAD, "head/kernel", "same"),
        one(f"{block}/_input_layernorm", f"{OURS}/attention_norm/scale"),
        one(f"{block}/_input_layernorm", f"{OURS}/delta_net_norm/scale"),
        *((f"{attend}/_query_dense/vars/0", f"{ours}/{x}/kernel", gated) for x in _QUERY),
        *dense(f"{attend}/_key_dense", f"{ours}/key", of_heads(keys)),
        *dense(f"{attend}/_value_dense", f"{ours}/value", of_heads(keys)),
        *dense(f"{attend}/_output_dense", f"{ours}/output", split_axis(0, (queries, size))),
        one(f"{attend}/_query_norm", f"{ours}/query_norm/scale"),
        one(f"{attend}/_key_norm", f"{ours}/key_norm/scale"),
        *(
            (f"{net}/in_proj_qkv/vars/0", f"{our_net}/{x}/kernel", "last_axis")
            for x in ("query", "key", "value")
        ),
        *dense(f"{net}/in_proj_z", f"{our_net}/gate"),
        *dense(f"{net}/in_proj_b", f"{our_net}/rate"),
        *dense(f"{net}/in_proj_a", f"{our_net}/decay"),
        (f"{net}/vars/0", f"{our_net}/convolution/kernel", "transpose"),
        (f"{net}/vars/1", f"{our_net}/log_decay/shift", "same"),
        (f"{net}/vars/2", f"{our_net}/log_decay/log_rate", "same"),
        one(f"{net}/norm", f"{our_net}/norm/scale"),
        *dense(f"{net}/out_proj", f"{our_net}/output"),
        one(f"{block}/_post_attention_layernorm", f"{OURS}/mlp_norm/scale"),
        *mlp,
        one("layers/qwen3_5_layer_norm", "final_norm/scale"),
    ]


_QUERY = ("query", "gate")
_DENSE, _MOE = "layers/qwen3_5_transformer_decoder_{}", "layers/qwen3_5_moe_transformer_decoder_{}"
_COMMON: dict[str, Any] = {
    "renamed": _NETS,
    "written": _written,
    "wrong_text": _wrong_text,
    "encoders": {"vision_encoder": ["layers/qwen3_5_vision_encoder"]},
    "ignored": ("mrope_section", "layer_types", "sliding_window_size"),  # of images, or read
    "types": {**dict.fromkeys(_NETS, int), "layer_types": tuple[str, ...]},
}

QWEN3_5 = KerasHub(
    classes=("Qwen3_5Backbone",),
    arguments=_ARGUMENTS,
    fields=_fields,
    weights=lambda config: _weights(_DENSE, config, gated_mlp(_DENSE, f"{OURS}/mlp")),
    **_COMMON,
)


def _experts(block: str) -> Rows:
    place, path = f"{block}/mlp", f"{OURS}/mlp"
    return [
        *dense(f"{place}/_router_gate", f"{path}/router"),
        (f"{place}/expert_bank/vars/0", f"{path}/experts_gate/kernel", "last_axis"),
        (f"{place}/expert_bank/vars/0", f"{path}/experts_up/kernel", "last_axis"),
        (f"{place}/expert_bank/vars/1", f"{path}/experts_down/kernel", "same"),
        *gated_mlp(f"{place}/shared_expert", f"{path}/shared"),
        *dense(f"{place}/_shared_expert_gate", f"{path}/shared_gate"),
    ]


_EXPERTS = {
    "moe_intermediate_dim": "expert_dim",
    "shared_expert_intermediate_size": "shared_expert_dim",
    "top_k": "num_experts_per_token",
}
QWEN3_5_MOE = KerasHub(
    classes=("Qwen3_5MoeBackbone",),
    arguments={
        **{name: x for name, x in _ARGUMENTS.items() if name != "intermediate_dim"},
        **dict.fromkeys((*_EXPERTS, "num_experts"), REQUIRED),
        "router_aux_loss_coefficient": 0.001,
    },
    fields=lambda x: _fields(
        x,
        intermediate_dim=x["moe_intermediate_dim"],
        dense_layers=(),
        normalize_weights=True,
    ),
    weights=lambda config: _weights(_MOE, config, _experts(_MOE)),
    **_COMMON
    | {
        "renamed": {**_NETS, **_EXPERTS},
        "ignored": (*_COMMON["ignored"], "router_aux_loss_coefficient"),  # of training
        "types": {**_COMMON["types"], **dict.fromkeys(_EXPERTS, int)},
    },
)
