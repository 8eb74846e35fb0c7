"""Hugging Face's `config.json` to our frozen configs and back."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, get_args, get_type_hints

from functional_llm.backbones.family import Family, ModelConfig, RotaryConfig
from functional_llm.blocks.rope_scaling import LinearScaling
from functional_llm.formats.float8 import is_float8
from functional_llm.formats.mxfp4 import is_mxfp4
from functional_llm.formats.rope_config import (
    SCALINGS,
    check_value,
    known,
    read_rope,
    shown,
    with_types,
    write_rope_scaling,
)
from functional_llm.graph.types import JSON

# What Transformers calls a function of `blocks.mlp`: all that it has but two with weights, "prelu"
# and "xielu".
_SAME_NAME = """silu gelu gelu_10 quick_gelu relu relu2 relu6 leaky_relu mish sigmoid tanh linear
    laplace""".split()
ACTIVATIONS = {name: name for name in _SAME_NAME} | {
    "hardswish": "hard_silu",
    "sqrtsoftplus": "sqrt_softplus",
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_approximate",
    "gelu_fast": "gelu_approximate",
    "gelu_new": "gelu_approximate",
    "gelu_python_tanh": "gelu_approximate",
    "gelu_pytorch_tanh": "gelu_approximate",
}

# Keys that change no logits: bookkeeping, training, serving.
IRRELEVANT = frozenset(
    """architectures attention_dropout attn_implementation attn_pdrop auto_map bos_token_id
    cache_implementation chunk_size_feed_forward decoder_start_token_id dtype embd_pdrop
    eos_token_id experts_implementation finetuning_task gradient_checkpointing hidden_dropout
    id2label initializer_range is_decoder is_llama_config keys_to_ignore_at_inference label2id
    model_type n_ctx name_or_path num_labels output_attentions output_hidden_states output_past
    pad_token_id prefix pretraining_tp problem_type reorder_and_upcast_attn resid_pdrop
    return_dict rope_interleaved sep_token_id summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj task_specific_params tokenizer_class
    torch_dtype torchscript transformers.js_config transformers_version unk_token_id
    unsloth_fixed unsloth_version use_bfloat16 use_cache""".split()
)
# Dropout and initial values under the names of some families.
IRRELEVANT |= frozenset(
    """attention_probs_dropout_prob classifier_dropout activation_dropout dropout embedding_dropout
    hidden_dropout_prob init_std layerdrop residual_dropout""".split()
)
# How routers of experts are trained.
IRRELEVANT |= frozenset(
    """aux_loss_alpha ep_size output_router_logits router_aux_loss_coef router_jitter_noise
    seq_aux""".split()
)
# Keys for generating, which versions of Transformers before 5 wrote into this file.
IRRELEVANT |= frozenset(
    """assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups
    num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p
    typical_p""".split()
)
# Keys of all families, with the only value that means nothing.
_CONSTANTS = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}


def read_config(raw: Mapping[str, Any], family: Family) -> ModelConfig:
    """Returns our config for a `config.json`.

    Args:
        raw: The parsed file.
        family: The family it belongs to.

    Raises:
        ValueError: Naming every key that is missing, unknown, or has a value no part exists for.
    """
    if is_mxfp4(raw.get(_QUANTIZATION)) or is_float8(raw.get(_QUANTIZATION)):
        # The tensors say which of them are.
        raw = {key: value for key, value in raw.items() if key != _QUANTIZATION}
    raw = family.config_given(_rename_aliases(raw, family))
    has_meaning = _nullable_keys(family)
    given = {key: value for key, value in raw.items() if value is not None or key in has_meaning}
    _check_known(given, family)
    _check_there(family, given, _NO_DEFAULT)
    _check_types(given, family)
    full = family.complete_keys(given)
    _check_there(family, full)
    _check_not_null(family, full, has_meaning)
    _check_ignored(given, full, family)
    keys = {x: key for key, x in family.config_keys.items() if isinstance(x, str)}
    places = {x.name: keys.get(x.name, x.name) for x in fields(family.config_class)}
    values = {name: full[place] for name, place in places.items() if place in full}
    if "activation" in keys:
        values["activation"] = known(ACTIVATIONS, values["activation"], keys["activation"])
    if _has(family.config_class, "rope_max_wavelength"):
        # A family may have a RoPE of its own for files that do not speak of it.
        rope = given | {key: x for key, x in full.items() if key == "rope_parameters"}
        rope = with_types(rope, family.rope_types)
        known_keys = {key: x for key, x in full.items() if key not in _CONSTANTS or key in values}
        values |= read_rope(rope, known_keys, _has(family.config_class, _LOCAL))
    if "layer_types" in values:
        _check_layer_types(values, family.layer_types)
    config = family.config_class(**_with_tuples(values))
    _check_heads(config, family)
    return config


# Sizes that are not guessed, though Transformers has a number for each: that of one model.
_NO_DEFAULT = {"vocabulary_size", "num_layers", "hidden_dim", "num_heads", "num_query_heads"}
_LOCAL = "local_rope_max_wavelength"
_QUANTIZATION = "quantization_config"
_ROPE_KEYS = {"rope_theta", "rope_scaling", "rope_parameters"}


def _rename_aliases(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Returns the keys under their present names; some releases of a family had others."""
    renamed = {key: value for key, value in raw.items() if key not in family.config_aliases}
    for alias, key in family.config_aliases.items():
        if alias in raw and renamed.setdefault(key, raw[alias]) != raw[alias]:
            raise ValueError(
                f"config.json: expected one value of {key} and {alias}, received "
                f"{shown(renamed[key])} and {shown(raw[alias])}."
            )
    return renamed


def _nullable_keys(family: Family) -> set[str]:
    """Returns the keys whose null has a meaning of its own: no window, no soft cap."""
    hints = get_type_hints(family.config_class)
    nullable = {name for name, hint in hints.items() if type(None) in get_args(hint)}
    keys = {key for key, field in family.config_keys.items() if field in nullable}
    return keys | set(family.config_nulls)


def _check_there(
    family: Family, keys: Mapping[str, Any], needed: Collection[str] | None = None
) -> None:
    """Checks that the keys of some fields are there; of all fields, if none are named."""
    read = {key: field for key, field in family.config_keys.items() if isinstance(field, str)}
    missing = sorted(
        key for key, x in read.items() if key not in keys and (needed is None or x in needed)
    )
    if missing:
        raise ValueError(
            f"config.json lacks the keys {missing}, needed by the family {family.model_type!r}."
        )


def _check_not_null(family: Family, full: JSON, nullable: Collection[str]) -> None:
    """Checks that no field without a meaning for null is left without a value."""
    hints = get_type_hints(family.config_class)
    for key, field in family.config_keys.items():
        may_be = isinstance(field, str) and type(None) in get_args(hints[field])
        if key in nullable and isinstance(field, str) and full[key] is None and not may_be:
            raise ValueError(
                f"config.json: expected a value for {key}, received null or nothing, of which "
                "Transformers makes no model."
            )


def _check_types(given: Mapping[str, Any], family: Family) -> None:
    """Checks every value that is there against the type of its field."""
    hints = get_type_hints(family.config_class)
    for key, field in family.config_keys.items():
        value = given.get(key)
        if value is not None and isinstance(field, str):
            check_value(key, value, hints[field], counts=_is_count(field))
        elif value is not None and field is not object:  # of which `complete_keys` knows more
            check_value(key, value, field)
    layers = next(key for key, field in family.config_keys.items() if field == "num_layers")
    if given[layers] > _MOST_LAYERS:
        raise ValueError(
            f"config.json: expected at most {_MOST_LAYERS} layers, received {layers}="
            f"{given[layers]}."
        )


_MOST_LAYERS = 10_000  # to build more takes minutes, and nobody has such a model


def _check_ignored(given: Mapping[str, Any], full: JSON, family: Family) -> None:
    """Checks that keys which Transformers does not read say what the keys do that it reads."""
    for key, read in family.config_ignored.items():
        said, taken = given.get(key), full[read]
        names = [ACTIVATIONS.get(x, x) if isinstance(x, str) else x for x in (said, taken)]
        if said is not None and said != given.get(read) and names[0] != names[1]:
            there = f"{read}={shown(given[read])}" if given.get(read) is not None else f"no {read}"
            means = "" if given.get(read) == taken else f", which means {shown(taken)}"
            raise ValueError(
                f"config.json: expected {key} and {read} to say the same, received {key}="
                f"{shown(said)} and {there}{means}. Transformers reads {read} only."
            )


def _check_heads(config: ModelConfig, family: Family) -> None:
    """Checks that sizes which share one another out come out even."""
    sizes, keys = vars(config), {name: name for name in vars(config)}
    keys |= {field: key for key, field in family.config_keys.items() if isinstance(field, str)}
    pairs = [("num_query_heads", "num_key_value_heads"), ("hidden_dim", "num_heads")]
    for whole, part in pairs:
        if whole in sizes and part in sizes and sizes[whole] % sizes[part]:
            raise ValueError(
                f"config.json: expected {keys[whole]} to be a multiple of {keys[part]}, received "
                f"{sizes[whole]} and {sizes[part]}."
            )
    if sizes.get("head_dim", 1) < 1:
        raise ValueError(
            f"config.json: expected a hidden_size of at least num_attention_heads, received "
            f"{sizes['hidden_dim']} and {sizes['num_query_heads']}."
        )


def _check_known(given: Mapping[str, Any], family: Family) -> None:
    private = {key for key in given if key.startswith("_")}  # of Transformers itself
    common = {key: x for key, x in _CONSTANTS.items() if key not in family.config_keys}
    constants = {**common, **family.config_constants}
    ours = {*family.config_keys, *family.config_ignored, *constants}
    known = {*ours, *private, *IRRELEVANT}
    if _has(family.config_class, "rope_max_wavelength"):
        known |= _ROPE_KEYS
    unknown = [f"{key}={shown(given[key])}" for key in sorted(set(given) - known)]
    unknown += [
        f"{key}={shown(given[key])} (expected {value!r})"
        for key, value in constants.items()
        if key in given and given[key] != value
    ]
    if unknown:
        raise ValueError(
            f"config.json has keys or values that the family {family.model_type!r} does not "
            f"handle: {', '.join(unknown)}. Loading would ignore them and give wrong numbers; "
            "remove them only if they mean nothing."
        )


def _has(config: ModelConfig | type[ModelConfig], name: str) -> bool:
    return any(field.name == name for field in fields(config))


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values with tuples in place of JSON's lists: a config is frozen."""
    return {key: tuple(x) if isinstance(x, list) else x for key, x in values.items()}


def _check_layer_types(values: Mapping[str, Any], known: Sequence[str]) -> None:
    kinds = values["layer_types"]
    unknown = sorted(set(kinds) - set(known))
    if unknown or len(kinds) != values["num_layers"]:
        raise ValueError(
            f"config.json: expected layer_types of {values['num_layers']} words out of "
            f"{known}, received {len(kinds)}, unknown ones: {shown(unknown)}."
        )


def _is_count(field: str) -> bool:
    """Whether a field is a size, a positive whole number."""
    sizes = ("_dim", "_size", "_length", "_window", "convolution_width")
    return field.startswith("num_") or field.endswith(sizes)


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
        # The tokenizer knows it. A family's default may lie outside of a smaller vocabulary.
        "pad_token_id": None,
    }
    for key, field in family.config_keys.items():
        if isinstance(field, str):
            value = getattr(config, field)
            keys[key] = names[value] if field == "activation" else value
    if isinstance(config, RotaryConfig):
        if isinstance(config.rope_scaling, LinearScaling) and not _has(config, _LOCAL):
            length = config.rope_scaling.stated(config.max_sequence_length)
            keys["max_position_embeddings"] = length
        # The older spelling: all versions of Transformers read it, and so does KerasHub.
        keys["rope_theta"] = config.rope_max_wavelength
        keys["rope_scaling"] = write_rope_scaling(config, family.rope_types)
    keys |= family.written_keys(config)
    if "rope_parameters" in keys and keys["rope_scaling"] is None:
        del keys["rope_scaling"]  # with a null, Transformers forgets the parameters
    return keys


def decode_config(values: Mapping[str, Any], family: Family) -> ModelConfig:
    """Returns a config from its fields as JSON, as presets hold them.

    Args:
        values: Field -> value; `rope_scaling` is a dict with the fields of a scaling, and its name
            as `rope_type`.
        family: The family it belongs to.

    Raises:
        ValueError: If a field is missing or unknown.
    """
    values = _with_tuples(values)
    if values.get("rope_scaling"):
        parameters = dict(values["rope_scaling"])
        scaling_class, _ = known(SCALINGS, parameters.pop("rope_type", None), "rope_type")
        parameters = {k: tuple(x) if isinstance(x, list) else x for k, x in parameters.items()}
        values["rope_scaling"] = scaling_class and scaling_class(**parameters)
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
    if isinstance(config, RotaryConfig) and config.rope_scaling is not None:
        names = {kind: name for name, (kind, _) in SCALINGS.items()}
        values["rope_scaling"]["rope_type"] = names[type(config.rope_scaling)]
    return values
