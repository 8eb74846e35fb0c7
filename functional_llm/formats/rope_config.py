"""RoPE in a `config.json`, as Transformers 5 and older versions spell it, to our frozen values."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_type_hints

from functional_llm.backbones.family import DecoderConfig
from functional_llm.blocks.rope import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
)
from functional_llm.graph.types import JSON

_Entry = TypeVar("_Entry")
LAYER_TYPES = ("full_attention", "sliding_attention")


_LENGTH = {"original_max_position_embeddings": "original_max_sequence_length"}
SCALINGS: dict[str, tuple[type | None, dict[str, str]]] = {
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


def read_rope(config: Mapping[str, Any], has_local: bool = False) -> dict[str, Any]:
    """Returns theta and scaling, in the spelling of Transformers 5 or of the versions before.

    Args:
        config: With `rope_parameters`, or `rope_theta` and `rope_scaling`.
        has_local: Whether layers with a window turn by a theta of their own,
            `rope_local_base_freq` or the parameters of "sliding_attention".

    Returns:
        The fields `rope_max_wavelength`, `rope_scaling` and, if asked for,
        `local_rope_max_wavelength`.

    Raises:
        ValueError: At an unknown `rope_type` or parameter.
    """
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"config.json: expected a dict of RoPE parameters, got {parameters!r}.")
    parameters = dict(parameters)
    local: dict[str, Any] = {}
    if has_local and parameters.keys() & set(LAYER_TYPES):
        local = dict(parameters.pop("sliding_attention", None) or {})
        full = dict(parameters.pop("full_attention", None) or {})
        parameters |= full
    theta, scaling = _read_rope_parameters(parameters, config["rope_theta"])
    fields_ = {"rope_max_wavelength": theta, "rope_scaling": scaling}
    if not has_local:
        return fields_
    theta, scaling = _read_rope_parameters(local, config["rope_local_base_freq"])
    if scaling is not None:
        raise ValueError(
            f"config.json: RoPE of the sliding layers is stretched ({scaling}). Known: default."
        )
    return {**fields_, "local_rope_max_wavelength": theta}


def _read_rope_parameters(
    parameters: dict[str, Any], default_theta: float
) -> tuple[float, RopeScaling | None]:
    theta = parameters.pop("rope_theta", default_theta)
    check_value("rope_theta", theta, float)
    types = [parameters.pop(key) for key in ("rope_type", "type") if key in parameters]
    if len(types) == 2 and types[0] != types[1]:
        raise ValueError(f"config.json: expected one type of RoPE scaling, received {types}.")
    if types and types[0] == "longrope":
        return float(theta), _read_long_rope(parameters)
    scaling_class, names = known(SCALINGS, (types or ["default"])[0], "rope_type")
    if scaling_class is None:
        names = {}
    given = {key: value for key, value in parameters.items() if value is not None}
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"config.json: unknown RoPE parameters {unknown}. Known: {sorted(names)}.")
    if scaling_class is None:
        return float(theta), None
    hints = get_type_hints(scaling_class)
    for key, value in given.items():
        check_value(key, value, hints[names[key]])
    try:
        return float(theta), scaling_class(**{names[key]: value for key, value in given.items()})
    except TypeError as error:
        raise ValueError(f"config.json: incomplete RoPE parameters {given}: {error}.") from None


def _read_long_rope(parameters: dict[str, Any]) -> FrequencyFactors:
    """Reads longrope with equal factors for short and long texts; others need the text's length."""
    short, long = parameters.get("short_factor"), parameters.get("long_factor")
    if not short or short != long or parameters.get("attention_factor") != 1.0:
        raise ValueError(
            "config.json: expected the RoPE type longrope with the same short_factor and "
            f"long_factor, and an attention_factor of 1, received {parameters}."
        )
    return FrequencyFactors(factors=tuple(short))


def write_rope_scaling(config: DecoderConfig) -> JSON | None:
    """Returns the scaling of a config as Hugging Face's `rope_scaling`."""
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if isinstance(scaling, FrequencyFactors):
        factors = list(scaling.factors)
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": config.max_sequence_length,
        }
    for rope_type, (scaling_class, names) in SCALINGS.items():
        if scaling_class is type(scaling):
            given = {key: getattr(scaling, field) for key, field in names.items()}
            return {"rope_type": rope_type, **{k: v for k, v in given.items() if v is not None}}
    raise ValueError(f"Expected a known RoPE scaling to write, received {scaling!r}.")


def known(table: Mapping[str, _Entry], value: object, key: str) -> _Entry:
    """Returns the entry of a table for the value of a key.

    Raises:
        ValueError: If there is none.
    """
    if not isinstance(value, str) or value not in table:
        raise ValueError(f"config.json: unknown {key}={value!r}. Known: {', '.join(table)}.")
    return table[value]


def check_value(key: str, value: Any, hint: object, counts: bool = False) -> None:
    """Checks a value against the type of its field, if the type is a plain one.

    Args:
        key: Of the `config.json`.
        value: Its value, not null.
        hint: Type of the field.
        counts: Whether it must be above 0.

    Raises:
        ValueError: If it is of another type, or out of range.
    """
    kinds = set(get_args(hint)) - {type(None)} or {hint}
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if kinds == {int}:
        right, expected = is_whole and (value > 0 or not counts), "a positive integer"
    elif kinds == {float}:
        is_number = is_whole or isinstance(value, float)
        right, expected = is_number and 0 < value < math.inf, "a finite number above 0"
    else:
        right, expected = kinds != {bool} or isinstance(value, bool), "true or false"
    if not right:
        raise ValueError(f"config.json: expected {expected} for {key}, received {value!r}.")
