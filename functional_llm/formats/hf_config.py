"""Hugging Face's `config.json` to our frozen configs and back."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, get_args, get_type_hints

from functional_llm.backbones.family import DecoderConfig, Family, ModelConfig
from functional_llm.formats.rope_config import (
    LAYER_TYPES,
    SCALINGS,
    check_value,
    known,
    read_rope,
    write_rope_scaling,
)
from functional_llm.graph.types import JSON

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_approximate",
    "gelu_pytorch_tanh": "gelu_approximate",
    "relu": "relu",
}

# Keys that change no logits: bookkeeping, training, serving.
IRRELEVANT = frozenset(
    """architectures attention_dropout attn_pdrop auto_map bad_words_ids begin_suppress_tokens
    bos_token_id cache_implementation chunk_size_feed_forward dtype embd_pdrop eos_token_id
    finetuning_task gradient_checkpointing hidden_dropout id2label initializer_range
    is_decoder is_llama_config keys_to_ignore_at_inference label2id model_type n_ctx
    output_attentions output_hidden_states output_past pad_token_id prefix pretraining_tp
    problem_type reorder_and_upcast_attn resid_pdrop return_dict rope_interleaved
    sep_token_id summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj task_specific_params tokenizer_class torch_dtype
    transformers.js_config transformers_version unk_token_id unsloth_fixed unsloth_version
    use_cache""".split()
)


def read_config(raw: Mapping[str, Any], family: Family) -> ModelConfig:
    """Returns our config for a `config.json`.

    Args:
        raw: The parsed file.
        family: The family it belongs to.

    Raises:
        ValueError: Naming every key that is missing, unknown, or has a value no part exists for.
    """
    raw = _rename_aliases(raw, family)
    nullable = _nullable_keys(family)
    given = {key: value for key, value in raw.items() if value is not None or key in nullable}
    _check_known(given, family)
    needed = {key for key, field in family.config_keys.items() if field in _NO_DEFAULT}
    missing = sorted(needed - set(given))
    if missing:
        raise ValueError(
            f"config.json lacks the keys {missing}, needed by the family {family.model_type!r}."
        )
    hints = get_type_hints(family.config_class)
    for key, field in family.config_keys.items():
        if field is not None and given.get(key) is not None:
            check_value(key, given[key], hints[field], counts=_is_count(field))
    full = family.complete_keys(given)
    values = {field: full[key] for key, field in family.config_keys.items() if field}
    names = {field.name for field in fields(family.config_class)}
    values["activation"] = known(ACTIVATIONS, values["activation"], "the activation")
    if "rope_max_wavelength" in names:
        values |= read_rope(full, "local_rope_max_wavelength" in names)
    if "layer_types" in names:
        values["layer_types"] = _layer_types(values)
    return family.config_class(**values)


# Sizes that no family has a default for.
_NO_DEFAULT = {"vocabulary_size", "num_layers", "hidden_dim", "num_heads", "num_query_heads"}
_ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"}


def _rename_aliases(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Returns the keys under their present names; some releases of a family had others."""
    renamed = {key: value for key, value in raw.items() if key not in family.config_aliases}
    for alias, key in family.config_aliases.items():
        if alias in raw and renamed.setdefault(key, raw[alias]) != raw[alias]:
            raise ValueError(
                f"config.json: expected one value of {key} and {alias}, received {renamed[key]} "
                f"and {raw[alias]}."
            )
    return renamed


def _nullable_keys(family: Family) -> set[str]:
    """Returns the keys whose null has a meaning of its own: no window, no soft cap."""
    hints = get_type_hints(family.config_class)
    nullable = {name for name, hint in hints.items() if type(None) in get_args(hint)}
    return {key for key, field in family.config_keys.items() if field in nullable}


def _check_known(given: Mapping[str, Any], family: Family) -> None:
    private = {key for key in given if key.startswith("_")}  # of Transformers itself
    known = {*family.config_keys, *family.config_constants, *private, *IRRELEVANT}
    if _has_rope(family):
        known |= _ROPE_KEYS
    unknown = [f"{key}={given[key]!r}" for key in sorted(set(given) - known)]
    unknown += [
        f"{key}={given[key]!r} (expected {value!r})"
        for key, value in family.config_constants.items()
        if key in given and given[key] != value
    ]
    if unknown:
        raise ValueError(
            f"config.json has keys or values that the family {family.model_type!r} does not "
            f"handle: {', '.join(unknown)}. Loading would ignore them and give wrong numbers; "
            "remove them only if they mean nothing."
        )


def _has_rope(family: Family) -> bool:
    return any(field.name == "rope_max_wavelength" for field in fields(family.config_class))


def _layer_types(values: Mapping[str, Any]) -> tuple[str, ...]:
    kinds = values["layer_types"]
    unknown = sorted(set(kinds) - set(LAYER_TYPES))
    if unknown or len(kinds) != values["num_layers"]:
        raise ValueError(
            f"config.json: expected layer_types of {values['num_layers']} words out of "
            f"{LAYER_TYPES}, received {len(kinds)}, unknown ones: {unknown}."
        )
    return tuple(kinds)


def _is_count(field: str) -> bool:
    """Whether a field is a size, a positive whole number."""
    return field.startswith("num_") or field.endswith(("_dim", "_size", "_length", "_window"))


def write_config(config: ModelConfig, family: Family, dtype: str) -> JSON:
    """Returns the `config.json` that `read_config` and Transformers read as this config.

    Args:
        config: A config of the family.
        family: The family.
        dtype: Of the weights.
    """
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    names["gelu_approximate"] = "gelu_pytorch_tanh"  # which all families of Transformers know
    keys: JSON = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": dtype,
    }
    for key, field in family.config_keys.items():
        if field is not None:
            value = getattr(config, field)
            keys[key] = names[value] if field == "activation" else value
    if isinstance(config, DecoderConfig):
        # The older spelling: all versions of Transformers read it, and so does KerasHub.
        keys["rope_theta"] = config.rope_max_wavelength
        keys["rope_scaling"] = write_rope_scaling(config)
    return keys | family.written_keys(config)


def decode_config(values: Mapping[str, Any], family: Family) -> ModelConfig:
    """Returns a config from its fields as JSON, as presets hold them.

    Args:
        values: Field -> value; `rope_scaling` is a dict with the fields of a scaling, and its name
            as `rope_type`.
        family: The family it belongs to.

    Raises:
        ValueError: If a field is missing or unknown.
    """
    values = dict(values)
    if values.get("rope_scaling"):
        parameters = dict(values["rope_scaling"])
        scaling_class, _ = known(SCALINGS, parameters.pop("rope_type", None), "rope_type")
        values["rope_scaling"] = scaling_class and scaling_class(**parameters)
    if "layer_types" in values:
        values["layer_types"] = tuple(values["layer_types"])
    expected = {field.name for field in fields(family.config_class)}
    if set(values) != expected:
        raise ValueError(
            f"Expected the fields of a config of the family {family.model_type!r}. Missing: "
            f"{sorted(expected - set(values))}. Unknown: {sorted(set(values) - expected)}."
        )
    return family.config_class(**values)


def encode_config(config: ModelConfig) -> JSON:
    """Returns the fields of a config as JSON: what `decode_config` reads."""
    values = asdict(config)
    if isinstance(config, DecoderConfig) and config.rope_scaling is not None:
        names = {kind: name for name, (kind, _) in SCALINGS.items()}
        values["rope_scaling"]["rope_type"] = names[type(config.rope_scaling)]
    return values
