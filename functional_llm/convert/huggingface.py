"""Hugging Face configs <-> our frozen ones. No family is named here."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from functional_llm.blocks.rope import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
)

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_approximate",
    "gelu_pytorch_tanh": "gelu_approximate",
    "relu": "relu",
}

# Keys that say nothing about the numbers of inference: bookkeeping, training, serving.
IRRELEVANT = frozenset(
    """architectures attention_dropout auto_map
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward dtype
    embd_pdrop eos_token_id finetuning_task hidden_dropout id2label initializer_range is_decoder
    is_llama_config keys_to_ignore_at_inference label2id model_type output_attentions
    output_hidden_states pad_token_id prefix pretraining_tp problem_type resid_pdrop
    return_dict rope_interleaved sep_token_id task_specific_params tokenizer_class torch_dtype
    transformers.js_config transformers_version unk_token_id use_cache""".split()
)

_LENGTH = {"original_max_position_embeddings": "original_max_sequence_length"}
_SCALINGS: dict[str, tuple[type | None, dict[str, str]]] = {
    "default": (None, {}),
    "linear": (LinearScaling, {"factor": "factor"}),
    "frequency_factors": (FrequencyFactors, {"factors": "factors"}),  # only out of GGUF files
    "llama3": (
        Llama3Scaling,
        {k: k for k in ("factor", "low_freq_factor", "high_freq_factor")} | _LENGTH,
    ),
    "yarn": (
        YarnScaling,
        {
            name: name
            for name in (
                "factor beta_fast beta_slow truncate attention_factor mscale mscale_all_dim".split()
            )
        }
        | _LENGTH,
    ),
}


def read_config(
    raw: Mapping[str, Any],
    config_class: type,
    keys: Mapping[str, str],
    defaults: Callable[[dict[str, Any]], dict[str, Any]],
) -> Any:
    """Returns our config for a `config.json`.

    Args:
        raw: The parsed file.
        config_class: A frozen dataclass.
        keys: Hugging Face's key -> our field.
        defaults: Given keys -> what absent or null keys mean.

    Raises:
        ValueError: Naming every key that is missing, unknown, or has a value no part exists for.
    """
    given = {key: value for key, value in raw.items() if value is not None}
    special = {"hidden_act", "rope_theta", "rope_scaling", "rope_parameters"}
    private = {key for key in given if key.startswith("_")}  # of Transformers itself
    unknown = sorted(set(given) - set(keys) - special - private - IRRELEVANT)
    if unknown:
        shown = ", ".join(f"{key}={given[key]!r}" for key in unknown)
        raise ValueError(
            f"config.json has keys that {config_class.__name__} does not handle: {shown}. Loading "
            "would ignore them and give wrong numbers; remove them only if they mean nothing."
        )
    types = {field.name: field.type for field in fields(config_class)}
    for key, field in keys.items():
        if key in given:
            _check_value(key, given[key], types[field], counts=_is_count(field))
    required = [key for key in ("hidden_size", "num_attention_heads") if key not in given]
    full = given if required else {**defaults(given), **given}
    missing = sorted(set(keys) - set(full)) or required
    if missing:
        raise ValueError(
            f"config.json lacks the keys {missing}, needed by {config_class.__name__}."
        )
    values = {field: full[key] for key, field in keys.items()}
    if "activation" in types:
        values["activation"] = _known(ACTIVATIONS, full["hidden_act"], "hidden_act")
    if "rope_max_wavelength" in types:
        values["rope_max_wavelength"], values["rope_scaling"] = read_rope(full)
    return config_class(**values)


def _is_count(field: str) -> bool:
    """Sizes are positive whole numbers, whatever their names."""
    return field.startswith("num_") or field.endswith(("_dim", "_size", "_length"))


def _check_value(key: str, value: Any, kind: Any, counts: bool = False) -> None:
    """Compares a value with the type of its field, where that is plain."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if counts or kind is int:
        right, expected = is_whole and value > 0, "a positive integer"
    elif kind is float:
        is_number = is_whole or isinstance(value, float)
        right, expected = is_number and 0 < value < math.inf, "a finite number above 0"
    else:
        right, expected = kind is not bool or isinstance(value, bool), "true or false"
    if not right:
        raise ValueError(f"config.json: expected {expected} for {key}, received {value!r}.")


def _known(table: Mapping[str, Any], value: Any, key: str) -> Any:
    if not isinstance(value, str) or value not in table:
        raise ValueError(f"config.json: unknown {key}={value!r}. Known: {', '.join(table)}.")
    return table[value]


def read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Returns theta and scaling, in the spelling of Transformers 5 or of the versions before.

    Args:
        config: With `rope_parameters`, or `rope_theta` and `rope_scaling`.

    Raises:
        ValueError: At an unknown `rope_type` or parameter.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"config.json: expected a dict of RoPE parameters, got {parameters!r}.")
    parameters = dict(parameters)
    theta = parameters.pop("rope_theta", config["rope_theta"])
    _check_value("rope_theta", theta, float)
    types = [parameters.pop(key) for key in ("rope_type", "type") if key in parameters]
    if len(types) == 2 and types[0] != types[1]:
        raise ValueError(f"config.json: expected one type of RoPE scaling, received {types}.")
    scaling_class, names = _known(_SCALINGS, (types or ["default"])[0], "rope_type")
    if scaling_class is None:
        names = {}
    given = {key: value for key, value in parameters.items() if value is not None}
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"config.json: unknown RoPE parameters {unknown}. Known: {sorted(names)}.")
    if scaling_class is None:
        return float(theta), None
    kinds = {field.name: field.type for field in fields(scaling_class)}
    for key, value in given.items():
        _check_value(key, value, kinds[names[key]])
    try:
        return float(theta), scaling_class(**{names[key]: value for key, value in given.items()})
    except TypeError as error:
        raise ValueError(f"config.json: incomplete RoPE parameters {given}: {error}.") from None
