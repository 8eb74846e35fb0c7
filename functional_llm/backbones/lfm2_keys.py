"""The keys of an LFM2's `config.json`, of which releases have had different ones."""

from functional_llm.backbones.family import complete_common_keys, renamed_keys
from functional_llm.graph.types import JSON

# Those of its kin, too. Their activation is no choice.
KIN: dict[str, str | type] = {
    **{key: x for key, x in renamed_keys(rms_norm_eps="norm_eps").items() if x != "activation"},
    "layer_types": "layer_types",
    "conv_L_cache": "convolution_width",
    "conv_bias": "convolution_bias",
}
# Their defaults in Transformers, and the activation of them all.
DEFAULTS: JSON = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 128_000,
    "norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "conv_bias": False,
    "conv_L_cache": 3,
    "activation": "silu",
}
CONFIG_KEYS: dict[str, str | type] = {
    **KIN,
    "full_attn_idxs": list,
    "block_ff_dim": int,
    "block_multiple_of": int,
    "block_ffn_dim_multiplier": float,
    "block_auto_adjust_ff_dim": bool,
    # How its makers began to train it.
    **dict.fromkeys(("block_mlp_init_scale", "block_out_init_scale"), object),
    **dict.fromkeys(("block_use_xavier_init", "conv_use_xavier_init"), object),
}
# What Transformers does not read, and what it reads instead.
IGNORED = {
    "block_dim": "hidden_size",
    "conv_dim": "hidden_size",
    "conv_dim_out": "hidden_size",
    "block_norm_eps": "norm_eps",
    "num_heads": "num_attention_heads",
    "theta": "rope_theta",
}


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {
        "intermediate_size": 12288,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
    }
    keys = DEFAULTS | own | keys
    width = keys["block_ff_dim" if "block_ff_dim" in keys else "intermediate_size"]
    if keys["block_auto_adjust_ff_dim"]:
        width = int(keys["block_ffn_dim_multiplier"] * int(2 * width / 3))
        width = -(-width // keys["block_multiple_of"]) * keys["block_multiple_of"]
    layers, attends = range(keys["num_hidden_layers"]), keys.get("full_attn_idxs")
    if attends is not None and not set(attends) <= set(layers):
        raise ValueError(
            f"config.json: expected full_attn_idxs from 0 to {len(layers) - 1}, for there are "
            f"{len(layers)} layers. Received {sorted(set(attends) - set(layers), key=str)}."
        )
    chosen = layers if attends is None else attends
    kinds = ["full_attention" if i in chosen else "conv" for i in layers]
    if attends is not None and keys.get("layer_types", kinds) != kinds:
        raise ValueError(
            "config.json: expected layer_types and full_attn_idxs to say the same, received "
            f"full_attention in other layers than {sorted(attends)}."
        )
    return complete_common_keys({"layer_types": kinds, **keys, "intermediate_size": width})
