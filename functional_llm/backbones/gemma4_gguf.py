"""A Gemma 4 in a GGUF file, which says in its own way what differs with the kind of layers."""

from typing import Any

from functional_llm.backbones.gemma4_experts import ExpertsConfig
from functional_llm.backbones.sharing import GGUF_KEYS
from functional_llm.backbones.transforms import Rows, fused
from functional_llm.graph.types import JSON

KEYS = {
    **GGUF_KEYS,
    "expert_count": "num_experts",
    "expert_used_count": "top_k_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "per_layer_config": "per_layer_config",
    "use_double_wide_mlp": "use_double_wide_mlp",
}
_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")


def given(keys: JSON) -> JSON:
    """Returns a file's keys as other families' files have them: sizes are those with a window."""
    keys = dict(keys)
    slides: list[Any] = keys.get("attention.sliding_window_pattern", [])
    full, local = ({keys.pop(f"{key}{end}", None) for key in _SIZES} for end in ("", "_swa"))
    if len(full) > 1 or len(local) > 1:
        raise ValueError(
            f"Expected one size of heads for {', '.join(_SIZES)} of layers without a window, and "
            f"one of layers with one. Received: {full} and {local}."
        )
    of_full: JSON = {"head_dim": full.pop()}
    (keys["attention.key_length"],) = local
    heads = keys.get("attention.head_count_kv")
    if isinstance(heads, list):
        by_kind = {bool(x): count for x, count in zip(slides, heads, strict=True)}
        of_full["num_key_value_heads"] = by_kind.get(False, 1)
        keys["attention.head_count_kv"] = by_kind.get(True, of_full["num_key_value_heads"])
    each = {str(i): of_full for i, has_window in enumerate(slides) if not has_window}
    keys["per_layer_config"] = each
    widths = keys.get("feed_forward_length")
    if isinstance(widths, list):
        keys["feed_forward_length"] = widths[0]
        keys["use_double_wide_mlp"] = widths[-1] != widths[0]
    return keys


def defaults(keys: JSON) -> JSON:
    """Returns what a file says by its tensors, or not at all."""
    return {
        "enable_moe_block": bool(keys.get("num_experts")),
        "vocab_size_per_layer_input": keys["vocab_size"],
    }


_WHOLE, _ = fused()
_EXPERTS = "decoder_{}/mlp/experts_"


def rows(config: ExpertsConfig) -> Rows:
    """Returns the rows of tensors that have other names in such files."""
    return [
        ("blk.{}.layer_output_scale.weight", "decoder_{}/layer_scale/scale", "same"),
        ("blk.{}.ffn_gate_up_exps.weight", f"{_EXPERTS}gate/kernel", _WHOLE),
        ("blk.{}.ffn_gate_up_exps.weight", f"{_EXPERTS}up/kernel", _WHOLE),
        ("blk.{}.ffn_gate_exps.weight", f"{_EXPERTS}gate/kernel", "transpose"),
        ("blk.{}.ffn_up_exps.weight", f"{_EXPERTS}up/kernel", "transpose"),
        ("blk.{}.ffn_down_exps.weight", f"{_EXPERTS}down/kernel", "transpose"),
        ("blk.{}.ffn_gate_inp.scale", "decoder_{}/mlp/router_norm/scale", "same"),
        ("blk.{}.ffn_down_exps.scale", "decoder_{}/mlp/expert_scale/scale", "same"),
    ]
