"""The keys of an LFM3's `config.json`, which has a RoPE for each kind of layers that attend."""

from typing import Any

from functional_llm.backbones import lfm2_keys
from functional_llm.backbones.family import check_windows, complete_common_keys
from functional_llm.graph.types import JSON

CONFIG_KEYS: dict[str, str | type] = {
    **lfm2_keys.KIN,
    "sliding_window": "sliding_window",
    "attention_bias": "attention_bias",
    "use_attention_gate": "gates_heads",
    "use_sandwich_norm": "norms_behind",
}
_FULL, _SLIDING = ATTENDING = ("full_attention", "sliding_attention")
_ROPE = {
    _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    _FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
}


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    kinds = [
        _FULL if i % 4 == 2 else _SLIDING if i % 4 == 0 and i > 0 else "conv"
        for i in range(keys["num_hidden_layers"])
    ]
    own: JSON = {
        "intermediate_size": 7680,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "conv_L_cache": 7,
        "layer_types": kinds,
        "sliding_window": 256,
        "use_sandwich_norm": True,
        "use_attention_gate": True,
        "attention_bias": False,
        "rope_local_base_freq": 1e6,
        "rope_parameters": _ROPE,
    }
    keys = lfm2_keys.DEFAULTS | own | keys
    rope = keys["rope_parameters"]
    full = rope.get(_FULL) if isinstance(rope, dict) else None
    part = full.get("partial_rotary_factor", 1) if isinstance(full, dict) else 1
    if isinstance(part, (int, float)) and part > 1:
        raise ValueError(
            f"config.json: expected a partial_rotary_factor of at most 1, received {part}."
        )
    if full and part != 1 and full.get("rope_type", "default") == "default":
        # So files of the first release say, whose own code turns a part of the channels then.
        keys["rope_parameters"] = {**rope, _FULL: {**full, "rope_type": "proportional"}}
    check_windows(keys["layer_types"], keys["sliding_window"])
    return complete_common_keys(keys)


def written_keys(config: Any) -> JSON:
    """Returns RoPE as Transformers reads it, of each kind of layers."""
    full: JSON = {"rope_type": "default", "rope_theta": config.rope_max_wavelength}
    if (scaling := config.rope_scaling) is not None:
        of_scaling = {key: x for key, x in vars(scaling).items() if key != "factor" or x != 1}
        full |= {"rope_type": "proportional", **of_scaling}
    local = {"rope_type": "default", "rope_theta": config.local_rope_max_wavelength}
    both = {_FULL: full, _SLIDING: local}
    return {"rope_theta": None, "rope_scaling": None, "rope_parameters": both}
