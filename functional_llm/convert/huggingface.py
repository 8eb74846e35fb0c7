"""Hugging Face configs <-> our frozen ones. No family is named here."""

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
    required = [key for key in ("hidden_size", "num_attention_heads") if key not in given]
    full = given if required else {**defaults(given), **given}
    missing = sorted(set(keys) - set(full)) or required
    if missing:
        raise ValueError(
            f"config.json lacks the keys {missing}, needed by {config_class.__name__}."
        )
    values = {field: full[key] for key, field in keys.items()}
    names = {field.name for field in fields(config_class)}
    if "activation" in names:
        values["activation"] = _known(ACTIVATIONS, full["hidden_act"], "hidden_act")
    if "rope_max_wavelength" in names:
        values["rope_max_wavelength"], values["rope_scaling"] = read_rope(full)
    _check_types(values)
    return config_class(**values)


def _check_types(values: Mapping[str, Any]) -> None:
    """Sizes are positive whole numbers, whatever their names."""
    for name, value in values.items():
        counts = name.startswith("num_") or name.endswith(("_dim", "_size", "_length"))
        if counts and not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            raise ValueError(f"config.json: expected a positive integer for {name}, got {value!r}.")


def _known(table: Mapping[str, Any], value: Any, key: str) -> Any:
    if value not in table:
        raise ValueError(f"config.json: unknown {key}={value!r}. Known: {', '.join(table)}.")
    return table[value]


def read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Returns theta and scaling, in the spelling of Transformers 5 or of the versions before.

    Args:
        config: With `rope_parameters`, or `rope_theta` and `rope_scaling`.

    Raises:
        ValueError: At an unknown `rope_type` or parameter.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", config["rope_theta"])
    types = {parameters.pop(key) for key in ("rope_type", "type") if key in parameters}
    scaling_class, names = _known(_SCALINGS, (types or {"default"}).pop(), "rope_type")
    if scaling_class is None:
        names = {}
    given = {key: value for key, value in parameters.items() if value is not None}
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"config.json: unknown RoPE parameters {unknown}. Known: {sorted(names)}.")
    if scaling_class is None:
        return float(theta), None
    try:
        return float(theta), scaling_class(**{names[key]: value for key, value in given.items()})
    except TypeError as error:
        raise ValueError(f"config.json: incomplete RoPE parameters {given}: {error}.") from None
