"""The keys of a Falcon-H1's `config.json`."""

from functional_llm.backbones.family import COMMON_KEYS, check_given, complete_common_keys
from functional_llm.backbones.state_spaces import (
    PREFIXED_DEFAULTS,
    PREFIXED_KEYS,
    complete_prefixed,
)
from functional_llm.graph.types import JSON

SINGLE = (
    *("embedding_multiplier", "lm_head_multiplier", "key_multiplier"),
    *("attention_in_multiplier", "attention_out_multiplier"),
    *("ssm_in_multiplier", "ssm_out_multiplier"),
)
CONFIG_KEYS: dict[str, str | type] = {
    **COMMON_KEYS,
    **PREFIXED_KEYS,
    **dict.fromkeys(("num_logits_to_keep", "mlp_expansion_factor"), object),
    **{key: key for key in (*SINGLE, "mlp_multipliers", "ssm_multipliers")},
    "mamba_d_ssm": int,
    "mamba_proj_bias": "state_bias",
    "projectors_bias": "output_bias",
    "mamba_rms_norm": "has_norm",
    "mamba_norm_before_gate": "norm_first",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        **PREFIXED_DEFAULTS,
        "mamba_d_ssm": 1024,
        "mamba_proj_bias": False,
        "projectors_bias": False,
        "mamba_rms_norm": False,
        "mamba_norm_before_gate": True,
        "attention_bias": False,
        "mlp_bias": False,
        **dict.fromkeys(SINGLE, 1.0),
    }
    keys = own | keys
    check_given(keys, SINGLE)
    keys["mamba_norm_before_gate"] = bool(keys["mamba_norm_before_gate"])  # null is false
    for key, count in (("mlp_multipliers", 2), ("ssm_multipliers", 5)):
        keys[key] = [1.0] * count if keys.get(key) is None else keys[key]
        if len(keys[key]) != count:
            raise ValueError(
                f"config.json: expected {count} numbers in {key}, received {keys[key]}."
            )
    keys = complete_common_keys(keys)
    inner = keys["mamba_d_ssm"]
    inner = keys["mamba_expand"] * keys["hidden_size"] if inner is None else inner
    return complete_prefixed(keys, inner)
