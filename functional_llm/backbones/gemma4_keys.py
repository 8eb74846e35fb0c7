"""The keys of a Gemma 4's `config.json`, which says in two ways how its kinds of layers differ."""

from typing import Any

from functional_llm.backbones import sharing
from functional_llm.backbones.family import check_chosen, check_given, complete_common_keys
from functional_llm.graph.types import JSON

CONFIG_KEYS: dict[str, str | type] = {
    **sharing.CONFIG_KEYS,
    "global_head_dim": "full_head_dim",
    "num_global_key_value_heads": "num_full_key_value_heads",
    "attention_k_eq_v": "values_are_keys",
    "use_double_wide_mlp": "borrowing_is_wide",
    "num_experts": "num_experts",
    "top_k_experts": "num_experts_per_token",
    "moe_intermediate_size": "expert_dim",
    "enable_moe_block": bool,
    "per_layer_config": object,
    "use_bidirectional_attention": object,
}
UNIFIED = "gemma4_unified_text"  # the 12B, which has other defaults
ROPE_TYPES = {name: name for name in ("default", "proportional")}


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    layers = range(keys["num_hidden_layers"])
    kinds = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in layers]
    own: JSON = {
        **sharing.DEFAULTS,
        "intermediate_size": 9216,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "layer_types": kinds,
        "final_logit_softcapping": None,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "rope_parameters": _ROPE,
    }
    if keys.get("model_type") == UNIFIED:
        own |= {"max_position_embeddings": 262_144, "sliding_window": 1024}
        own["hidden_size_per_layer_input"] = 0
    keys = own | {key: x for key, x in keys.items() if x is not None or key not in own}
    # Transformers takes it so, whatever the file says.
    keys["layer_types"] = [*keys["layer_types"][:-1], "full_attention"]
    if keys.get("use_bidirectional_attention") not in (None, "vision"):
        raise ValueError(
            "config.json: expected a use_bidirectional_attention that is null or vision, for a "
            f"text is read in one direction. Received: {keys['use_bidirectional_attention']!r}."
        )
    if keys["hidden_size_per_layer_input"] < 0:
        raise ValueError(
            "config.json: expected a hidden_size_per_layer_input of at least 0, received "
            f"{keys['hidden_size_per_layer_input']}."
        )
    keys |= _of_full_layers(keys) | _of_experts(keys)
    sharing.check_sharing(keys)
    return complete_common_keys({"rope_theta": 1e6, **keys})


_ROPE = {
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1_000_000.0,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}


def _of_full_layers(keys: JSON) -> JSON:
    """Returns how many heads layers without a window have, and of which size."""
    size = keys.get("global_head_dim") or 512
    heads = keys.get("num_global_key_value_heads") if keys["attention_k_eq_v"] else None
    of_layers = keys.get("per_layer_config")
    if of_layers is not None:
        each = _each_layer(of_layers, keys)
        if len({tuple(x.items()) for x in each}) > 1:
            raise ValueError(
                "config.json: expected a per_layer_config that says the same of all layers of "
                f"full_attention, and nothing of others. Received: {of_layers}."
            )
        size = each[0].get("head_dim", keys["head_dim"])
        heads = each[0].get("num_key_value_heads")
    heads = heads or keys["num_key_value_heads"]
    if keys["num_attention_heads"] % heads:
        raise ValueError(
            "config.json: expected num_attention_heads to be a multiple of the key and value heads "
            f"of all layers, received {keys['num_attention_heads']} and {heads}."
        )
    return {"global_head_dim": size, "num_global_key_value_heads": heads}


def _of_experts(keys: JSON) -> JSON:
    """Returns the numbers of experts, none if there are none."""
    names = ("num_experts", "top_k_experts", "moe_intermediate_size")
    if not keys.get("enable_moe_block"):
        return dict.fromkeys(names)
    check_given(keys, names)
    check_chosen(keys["top_k_experts"], keys["num_experts"], "num_experts")
    return {}


def _each_layer(of_layers: Any, keys: JSON) -> list[JSON]:
    """Returns what is said of each layer without a window."""
    full = [i for i, kind in enumerate(keys["layer_types"]) if kind == "full_attention"]
    known = {"head_dim", "num_key_value_heads"}
    fits = isinstance(of_layers, dict) and all(
        isinstance(x, dict) and set(x) <= known and str(i) in {str(j) for j in full}
        for i, x in of_layers.items()
    )
    if not fits:
        raise ValueError(
            "config.json: expected per_layer_config to give head_dim and num_key_value_heads of "
            f"layers of full_attention, which are {full}. Received: {of_layers}."
        )
    return [dict(sorted(of_layers.get(str(i), of_layers.get(i, {})).items())) for i in full]


def written_keys(config: Any) -> JSON:
    """Returns what differs with the kind of layers, as Transformers reads it."""
    full: JSON = {"rope_type": "default", "rope_theta": config.rope_max_wavelength}
    if (scaling := config.rope_scaling) is not None:
        full |= {
            "rope_type": "proportional",
            "partial_rotary_factor": scaling.partial_rotary_factor,
            **({"factor": scaling.factor} if scaling.factor != 1 else {}),
        }
    local = {"rope_type": "default", "rope_theta": config.local_rope_max_wavelength}
    rope = {"full_attention": full, "sliding_attention": local}
    written: JSON = {"rope_theta": None, "rope_scaling": None, "rope_parameters": rope}
    written["enable_moe_block"] = config.num_experts is not None
    if config.values_are_keys or config.num_full_key_value_heads == config.num_key_value_heads:
        return written
    own = {
        "head_dim": config.full_head_dim,
        "num_key_value_heads": config.num_full_key_value_heads,
    }
    full_layers = [i for i, x in enumerate(config.layer_types) if x == "full_attention"]
    return {**written, "per_layer_config": {str(i): own for i in full_layers}}
