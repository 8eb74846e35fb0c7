"""The keys of a Gemma 3n's `config.json`, and of its GGUF files."""

from statistics import NormalDist

from functional_llm.backbones import sharing
from functional_llm.backbones.family import complete_common_keys
from functional_llm.graph.types import JSON

CONFIG_KEYS: dict[str, str | type] = {
    **sharing.CONFIG_KEYS,
    "intermediate_size": object,
    "rope_local_base_freq": "local_rope_max_wavelength",
    "activation_sparsity_pattern": "sparse_shares",
    "altup_num_inputs": "streams",
    "altup_active_idx": "active_stream",
    "altup_correct_scale": "scales_stream",
    "laurel_rank": "laurel_rank",
    # Of training: bounds, of 120, on numbers far below one.
    **dict.fromkeys(("altup_coef_clip", "altup_lr_multiplier"), object),
    "query_pre_attn_scalar": object,  # which Transformers does not read
}
GGUF_KEYS = {
    **sharing.GGUF_KEYS,
    "activation_sparsity_pattern": "activation_sparsity_pattern",
    "altup.active_idx": "altup_active_idx",
    "altup.num_inputs": "altup_num_inputs",
}


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    count = keys["num_hidden_layers"]
    first = 10 if count > 10 else 0
    own: JSON = {
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "layer_types": [
            "sliding_attention" if (i + 1) % 5 else "full_attention" for i in range(count)
        ],
        "final_logit_softcapping": 30.0,
        "num_kv_shared_layers": 15,
        "activation_sparsity_pattern": [0.95] * first + [0.0] * (count - first),
        "altup_num_inputs": 4,
        "altup_active_idx": 0,
        "altup_correct_scale": True,
        "laurel_rank": 64,
        "intermediate_size": 16_384,
        "rope_theta": 1_000_000.0,
    }
    keys = complete_common_keys(sharing.DEFAULTS | own | keys)
    widths = keys["intermediate_size"]
    keys["mlp_widths"] = widths if isinstance(widths, list) else [widths] * count
    keys["intermediate_dim"] = keys["mlp_widths"][0] if keys["mlp_widths"] else 0
    check_numbers(keys)
    return keys


def check_numbers(keys: JSON) -> None:
    """Checks that there is one of each layer's own, one that lends to each, and the stream.

    Raises:
        ValueError: If not.
    """
    _check_layers(keys, keys["num_hidden_layers"])
    sharing.check_sharing(keys)
    streams, active = keys["altup_num_inputs"], keys["altup_active_idx"]
    sizes = {key: keys[key] for key in ("laurel_rank", "hidden_size_per_layer_input")}
    if not 0 <= active < streams or min(sizes.values()) < 1:
        raise ValueError(
            "config.json: expected an altup_active_idx from 0 to altup_num_inputs - 1, and "
            f"{' and '.join(sizes)} above 0. Received: {active} of {streams}, {sizes}."
        )


def _check_layers(keys: JSON, count: int) -> None:
    """Checks what there is one of for each layer."""
    widths, shares = keys["mlp_widths"], keys["activation_sparsity_pattern"]
    fits = len(widths) == len(shares) == count
    whole = all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in widths)
    if not fits or not whole or not all(0 <= x < 1 for x in shares):
        raise ValueError(
            f"config.json: expected, for each of {count} layers, a width above 0 in "
            "intermediate_size and a share from 0 to below 1 in activation_sparsity_pattern. "
            f"Received: {widths} and {shares}."
        )


def gguf_given(keys: JSON) -> JSON:
    """Returns a file's keys with shares of zeros in the place of standard deviations."""
    keys = dict(keys)
    bounds = keys.pop("activation_sparsity_scale", None)
    if bounds is not None:
        # llama.cpp writes those of float32.
        keys["activation_sparsity_pattern"] = [round(NormalDist().cdf(x), 6) for x in bounds]
    return keys


def gguf_defaults(keys: JSON) -> JSON:
    """Returns what a file does not say."""
    return {"vocab_size_per_layer_input": keys["vocab_size"]}
