"""KerasHub's column of gpt-oss."""

from collections.abc import Sequence
from typing import Any

from functional_llm.backbones.keras_hub.column import (
    EMBEDDING,
    HEAD,
    OURS,
    REQUIRED,
    KerasHub,
    attention,
    dense,
    has_window,
    one,
    window_fields,
)
from functional_llm.backbones.keras_hub.llamas import ARGUMENTS
from functional_llm.backbones.transforms import Rows, by_turns
from functional_llm.blocks.rope_scaling import YarnScaling
from functional_llm.graph.types import JSON

_TRAINED = 4096  # tokens of a text, at first


def _fields(x: JSON) -> JSON:
    factor, slides = x["rope_scaling_factor"], bool(x["sliding_window"])
    scaling = YarnScaling(factor=factor, original_max_sequence_length=_TRAINED, truncate=False)
    return {
        **window_fields(
            {"sliding_window_size": x["sliding_window"]},
            [slides and i % 2 == 0 for i in range(x["num_layers"])],
        ),
        "head_dim": x["head_dim"] or x["hidden_dim"] // x["num_query_heads"],
        "rope_scaling": None if factor == 1 else scaling,
        "max_sequence_length": 131072,
        "activation": "silu",
        "tie_word_embeddings": False,
        "attention_bias": True,
        "gate_alpha": 1.702,
        "gate_limit": 7.0,
    }


def _written(config: Any) -> JSON:
    scaling = config.rope_scaling
    return {
        "rope_scaling_factor": scaling.factor if isinstance(scaling, YarnScaling) else 1.0,
        "sliding_window": config.sliding_window if has_window(config) else None,
    }


def _wrong(config: Any) -> Sequence[str]:
    what = "its windows are in the layers that have none, and a token longer"
    return [what] if has_window(config) else []


def _weights(config: Any) -> Rows:
    block = "layers/gpt_oss_transformer_decoder_{}"
    attend, sparse = f"{block}/self_attention_layer", f"{block}/sparse_moe_block"
    numbers = config.num_query_heads, config.num_key_value_heads, config.head_dim
    experts, turns = f"{OURS}/mlp/experts_", by_turns(config.intermediate_dim)
    return [
        EMBEDDING,
        (HEAD, "head/kernel", "same"),
        one(f"{block}/input_layernorm", f"{OURS}/attention_norm/scale"),
        *attention(f"{attend}/%s_dense", *numbers),
        one(attend, f"{OURS}/attention/sinks/score"),
        one(f"{block}/post_attention_layernorm", f"{OURS}/mlp_norm/scale"),
        *dense(f"{sparse}/router/router_dense", f"{OURS}/mlp/router"),
        *(
            row
            for part in ("gate", "up")
            for row in dense(f"{sparse}/experts", f"{experts}{part}", turns, turns)
        ),
        (f"{sparse}/experts/vars/2", f"{experts}down/kernel", "same"),
        (f"{sparse}/experts/vars/3", f"{experts}down/bias", "same"),
        one("layers/gpt_oss_layer_normalization", "final_norm/scale"),
    ]


GPT_OSS = KerasHub(
    classes=("GptOssBackbone",),
    arguments={
        **ARGUMENTS,
        "num_experts": REQUIRED,
        "top_k": 2,
        "rope_max_wavelength": 10000,
        "rope_scaling_factor": 1.0,
        "sliding_window": 4096,
        "head_dim": None,
        "output_router_logits": False,
    },
    renamed={"top_k": "num_experts_per_token"},
    fields=_fields,
    written=_written,
    wrong=_wrong,
    ignored=("output_router_logits",),
    weights=_weights,
)
