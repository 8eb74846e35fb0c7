"""The keys of a Nemotron-H's `config.json`, of which releases have had different ones."""

from functional_llm.backbones.family import check_given, renamed_keys
from functional_llm.backbones.routed_experts import CONFIG_KEYS as EXPERT_KEYS
from functional_llm.backbones.routed_experts import ROUTING, check_groups
from functional_llm.backbones.state_spaces import OLDER_WORDS, check_heads, read_steps
from functional_llm.graph.types import JSON

_COMMON = renamed_keys(hidden_act="mlp_hidden_act", rms_norm_eps="layer_norm_epsilon")
_NOT_CHOSEN = "tie_word_embeddings"
CONFIG_KEYS: dict[str, str | type] = {
    **{key: x for key, x in _COMMON.items() if key != _NOT_CHOSEN},
    "layers_block_type": "layer_types",
    "hybrid_override_pattern": str,
    "mamba_num_heads": "num_state_heads",
    "mamba_head_dim": "state_head_dim",
    "n_groups": "num_state_groups",
    "ssm_state_size": "state_dim",
    "conv_kernel": "convolution_width",
    "use_conv_bias": "convolution_bias",
    "use_bias": "state_bias",
    "mlp_bias": "mlp_bias",
    "residual_in_fp32": "float32_residuals",
    **{key: x for key, x in EXPERT_KEYS.items() if x != "first_expert_layer"},
    "moe_shared_expert_intermediate_size": "shared_dim",
    "moe_latent_size": "latent_dim",
    "norm_topk_prob": "normalize_weights",
    "time_step_limit": object,
    # How they are trained, served, and predict further tokens. The inner width is that of the
    # heads, whatever `expand` says, and there is one shared MLP, whatever `n_shared_experts` says;
    # no RoPE, though some files have its base; `use_bias` is of both projections of a Mamba-2.
    **dict.fromkeys(("time_step_min", "time_step_max", "time_step_floor"), float),
    **dict.fromkeys(("time_step_rank", "chunk_size", "rescale_prenorm_residual"), object),
    **dict.fromkeys(("expand", "n_shared_experts", "moe_shared_expert_overlap"), object),
    **dict.fromkeys(("num_logits_to_keep", "use_mamba_kernels", "mamba_ssm_cache_dtype"), object),
    **dict.fromkeys(("num_nextn_predict_layers", "mtp_layers_block_type"), object),
    **dict.fromkeys(("mtp_hybrid_override_pattern", "rope_theta", "mamba_proj_bias"), object),
}
ALIASES = {
    "layer_types": "layers_block_type",
    "num_local_experts": "n_routed_experts",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
}
IGNORED = {
    "attention_head_dim": "head_dim",
    "norm_eps": "layer_norm_epsilon",
    "rms_norm_eps": "layer_norm_epsilon",
}
CONSTANTS = {
    "attention_bias": False,
    "mamba_hidden_act": "silu",
    "sliding_window": None,
    _NOT_CHOSEN: False,
}
LETTERS = {"full_attention": "*", "linear_attention": "M", "mlp": "-", "moe": "E"}


def config_given(keys: JSON) -> JSON:
    """Returns the keys with a list of layers in the place of a pattern, and their number.

    Raises:
        ValueError: If the pattern has other letters than there are, or says something else than
            the list.
    """
    pattern, kinds = keys.get("hybrid_override_pattern"), keys.get("layers_block_type")
    if isinstance(kinds, list | tuple):
        kinds = [OLDER_WORDS.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    if isinstance(pattern, str):
        words = {letter: word for word, letter in LETTERS.items()}
        if unknown := sorted(set(pattern) - set(words)):
            raise ValueError(
                f"config.json: expected a hybrid_override_pattern of the letters {''.join(words)}, "
                f"received {unknown}."
            )
        meant = [words[letter] for letter in pattern]
        if kinds is not None and kinds != meant:
            raise ValueError(
                "config.json: expected hybrid_override_pattern and layers_block_type to say the "
                f"same, received {pattern!r} and {keys['layers_block_type']!r:.200}."
            )
        kinds = meant
    if not isinstance(kinds, list):
        return keys
    count = keys.get("num_hidden_layers")
    own = {"num_hidden_layers": len(kinds) if count is None else count}
    return {**keys, **own, "layers_block_type": kinds}


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {
        "intermediate_size": 21504,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "layer_norm_epsilon": 1e-5,
        "mlp_hidden_act": "relu2",
        _NOT_CHOSEN: False,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "use_bias": False,
        "mlp_bias": False,
        "residual_in_fp32": False,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
        "moe_latent_size": None,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
    }
    keys = own | keys
    if keys["num_key_value_heads"] is None:
        keys = {**keys, "num_key_value_heads": keys["num_attention_heads"]}
    heads, size = keys["mamba_num_heads"], keys["mamba_head_dim"]
    check_heads(keys, "mamba_num_heads", "n_groups", heads * size, size)
    check_given(keys, ROUTING)
    if "moe" in keys.get("layers_block_type", ()):
        check_groups(keys, least=2)
    return {**keys, **read_steps(keys)}


def gguf_given(given: JSON) -> JSON:
    """Returns a GGUF file's keys with the types of layers, and the size of a Mamba-2's head.

    It says of each layer how many heads have keys, and how wide the MLP is: of a Mamba-2, zero. The
    last ones may be layers that predict further tokens.
    """
    count = given["block_count"] - given.get("nextn_predict_layers", 0)
    heads, widths = (
        given[key][:count] for key in ("attention.head_count_kv", "feed_forward_length")
    )
    wide = "moe" if "expert_feed_forward_length" in given else "mlp"
    kinds = [
        "full_attention" if keys else wide if width else "linear_attention"
        for keys, width in zip(heads, widths, strict=True)
    ]
    inner = given["ssm.inner_size"]
    own = {
        "layers": kinds,
        "attention.head_count_kv": max(heads) or given["attention.head_count"],
        "feed_forward_length": max(widths) or None,
        "ssm.head_size": inner // given["ssm.time_step_rank"],
    }
    return {key: x for key, x in given.items() if key != "ssm.inner_size"} | own
