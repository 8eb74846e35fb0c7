"""The numbers of a Kimi Linear, and its `config.json`: as published, and as Transformers writes it.

Published files have sizes and places of the delta nets in a dict, and count layers from 1.
"""

from dataclasses import dataclass
from typing import Any

from functional_llm.backbones import latent, routed_experts
from functional_llm.backbones.latent import LatentSizes
from functional_llm.backbones.routed_experts import CorrectedConfig
from functional_llm.blocks.delta_net import DeltaNet
from functional_llm.graph.types import JSON


@dataclass(frozen=True, kw_only=True)
class KimiConfig(CorrectedConfig, LatentSizes):
    """The numbers of a Kimi Linear."""

    layer_types: tuple[str, ...]
    convolution_width: int
    num_delta_heads: int
    delta_dim: int

    @property
    def delta_net(self) -> DeltaNet:
        """The sizes of the delta nets."""
        heads, size = self.num_delta_heads, self.delta_dim
        return DeltaNet(
            key_heads=heads,
            value_heads=heads,
            key_dim=size,
            value_dim=size,
            width=self.convolution_width,
        )


# Key of a DeepSeek V3 -> what it is called here.
_OTHER_NAMES = {
    "max_position_embeddings": "model_max_length",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
    "n_group": "num_expert_group",
    "norm_topk_prob": "moe_renormalize",
}


def _renamed(keys: dict[str, Any]) -> dict[str, Any]:
    return {_OTHER_NAMES.get(key, key): x for key, x in keys.items()}


_SIZES = {  # in the dict -> in Transformers' files
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
_LISTS = {"full_attn_layers": "full_attention", "kda_layers": "linear_attention"}
CONFIG_KEYS: dict[str, str | type] = {
    **_renamed({**latent.CONFIG_KEYS, **routed_experts.CONFIG_KEYS}),
    "moe_renormalize": "normalize_weights",
    "layer_types": "layer_types",
    "linear_head_dim": "delta_dim",
    "linear_num_heads": "num_delta_heads",
    "linear_conv_kernel_dim": "convolution_width",
    "linear_attn_config": object,
    "mlp_layer_types": object,
    # Of layers that predict more tokens, and of RoPE, which there is none of.
    **dict.fromkeys(("num_nextn_predict_layers", "use_grouped_topk", "head_dim"), object),
    **dict.fromkeys(("rope_theta", "rope_scaling", "rope_parameters"), object),
}
ALIASES = {
    "num_local_experts": "num_experts",
    **{key: x for key, x in _OTHER_NAMES.items() if key != "n_routed_experts"},
}
CONSTANTS: JSON = {
    "mla_use_nope": True,
    "moe_router_activation_func": "sigmoid",
    "moe_layer_freq": 1,
}
_NULL_IS_FALSE = ("moe_renormalize",)
NULLS = [
    *("q_lora_rank", *_NULL_IS_FALSE, *latent.NO_NULLS),
    *_renamed(dict.fromkeys(routed_experts.NO_NULLS)),
]


def complete_keys(keys: JSON) -> JSON:
    """Adds Transformers' defaults for keys that a `config.json` leaves out."""
    own: JSON = {"intermediate_size": 9216, "moe_intermediate_size": 1024, "num_experts": 256}
    own |= {"num_experts_per_token": 8, "num_shared_experts": 1, "routed_scaling_factor": 2.446}
    own |= {"num_expert_group": 1, "topk_group": 1, "moe_renormalize": True, "q_lora_rank": None}
    own |= {"rms_norm_eps": 1e-5, "model_max_length": 1048576, "first_k_dense_replace": 1}
    own |= {"linear_head_dim": 128, "linear_num_heads": 32, "linear_conv_kernel_dim": 4}
    layers = range(keys["num_hidden_layers"])
    own["layer_types"] = [_KINDS[i % 4 == 0 and i > 0] for i in layers]
    keys = own | _said_by(keys, _of_nets(keys, len(layers))) | _said_by(keys, _of_mlps(keys))
    keys |= {key: bool(keys[key]) for key in _NULL_IS_FALSE}
    if keys.get("tie_word_embeddings"):
        raise ValueError(
            "config.json: expected tie_word_embeddings to be false, for Transformers ties no Kimi "
            "Linear. Received: true."
        )
    routed_experts.check_routing(keys | {x: keys[y] for x, y in _OTHER_NAMES.items()}, least=2)
    return latent.complete_keys(keys)


_KINDS = ("linear_attention", "full_attention")


def _said_by(keys: JSON, said: JSON) -> JSON:
    """Returns keys with what other keys say of them; they may not say different things."""
    for key, x in said.items():
        own = keys.get(key, x)
        if (list(own) if isinstance(own, tuple) else own) != x:
            raise ValueError(
                f"config.json: expected {key} to say what linear_attn_config and mlp_layer_types "
                f"do, received {key}={keys[key]!r:.200}, and {x!r:.200}."
            )
    return keys | said


def _of_nets(keys: JSON, count: int) -> JSON:
    """Returns what the dict of the delta nets says."""
    nets = keys.get("linear_attn_config", {})
    lists: list[Any] = [nets.get(x) for x in _LISTS] if isinstance(nets, dict) else []
    sizes = {key: nets[x] for x, key in _SIZES.items() if x in nets} if lists else {}
    right = bool(lists) and all(type(x) is int and 0 < x < 2**31 for x in sizes.values())
    if right and None not in lists:
        right = all(isinstance(x, list) for x in lists)
        numbers = [number for x in lists for number in x] if right else []
        right = all(type(x) is int for x in numbers) and sorted(numbers) == [*range(1, count + 1)]
    if not right:
        raise ValueError(
            "config.json: expected linear_attn_config with positive integers for "
            f"{list(_SIZES)}, and with each layer from 1 to {count} in one of the lists "
            f"{list(_LISTS)}. Received: {nets!r:.400}."
        )
    if None in lists:
        return sizes
    kinds = {number: kind for x, kind in _LISTS.items() for number in nets[x]}
    return {**sizes, "layer_types": [kinds[number] for number in sorted(kinds)]}


def _of_mlps(keys: JSON) -> JSON:
    """Returns which layer is the first with experts, if a list of words says it."""
    kinds, count = keys.get("mlp_layer_types"), keys["num_hidden_layers"]
    if kinds is None:
        return {}
    first = kinds.count("dense") if isinstance(kinds, list) else 0
    if kinds != ["dense"] * first + ["sparse"] * (count - first):
        raise ValueError(
            f"config.json: expected mlp_layer_types of {count} words, 'dense' for the first layers "
            f"and 'sparse' for all others. Received: {kinds!r:.200}."
        )
    return {"first_k_dense_replace": first}


def written_nets(config: KimiConfig) -> JSON:
    """Returns what others than Transformers read of the delta nets."""
    sizes = (config.delta_dim, config.num_delta_heads, config.convolution_width)
    places = {
        x: [i + 1 for i, own in enumerate(config.layer_types) if own == kind]
        for x, kind in _LISTS.items()
    }
    return {**dict(zip(_SIZES, sizes, strict=True)), **places}


# Key of a GGUF file -> that of a config.json.
GGUF_KEYS = {
    **{x: _OTHER_NAMES.get(key, key) for x, key in latent.GGUF_KEYS.items()},
    **{x: _OTHER_NAMES.get(key, key) for x, key in routed_experts.GGUF_KEYS.items()},
    "context_length": "model_max_length",
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "kda.head_dim": "linear_head_dim",
}


def gguf_given(keys: JSON) -> JSON:
    """Returns the keys of a file with the layers that are nets: they have no heads of keys."""
    heads = keys.get("attention.head_count_kv")
    nets = [x == 0 for x in heads] if isinstance(heads, list) else None
    given = latent.gguf_given(keys)
    return given if nets is None else given | {"attention.sliding_window_pattern": nets}


def gguf_defaults(keys: JSON) -> JSON:
    """Returns what a GGUF file does not say, as llama.cpp takes it."""
    return {
        "qk_nope_head_dim": keys["qk_head_dim"] - keys["qk_rope_head_dim"],
        "q_lora_rank": None,
        "linear_num_heads": keys["num_attention_heads"],
        "moe_renormalize": True,
        "num_expert_group": 1,
        "topk_group": 1,
    }
