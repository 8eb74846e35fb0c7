"""RoPE in a `config.json`, as Transformers 5 and older versions spell it, to our frozen values."""

import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args, get_type_hints

from functional_llm.backbones.family import RotaryConfig
from functional_llm.blocks.rope_scaling import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkAlphaScaling,
    ProportionalScaling,
    QueryScaledYarn,
    RopeScaling,
    TwoMagnitudesLongRope,
    YarnScaling,
)
from functional_llm.graph.types import JSON

_Entry = TypeVar("_Entry")
_LARGEST_SIZE = 2**27  # which no size of a model reaches
_LARGEST_INT, _LARGEST_FLOAT = 2**31 - 1, 3e38  # what int32 and float32 hold
LAYER_TYPES = ("full_attention", "sliding_attention")
_YARN = {
    name: name
    for name in "factor beta_fast beta_slow truncate attention_factor mscale mscale_all_dim".split()
}
_LENGTH = {"original_max_position_embeddings": "original_max_sequence_length"}
_LONG = {"short_factor": "short_factors", "long_factor": "long_factors"} | _LENGTH
# What types mean in the files of some families: see `Family.rope_types`.
OF_FAMILIES: dict[str, tuple[type, dict[str, str]]] = {
    "longrope_two_magnitudes": (
        TwoMagnitudesLongRope,
        _LONG | {"short_mscale": "short_mscale", "long_mscale": "long_mscale"},
    ),
    "ntk_alpha": (NtkAlphaScaling, {"alpha": "alpha"}),
    "yarn_query_scale": (
        QueryScaledYarn,
        _YARN | _LENGTH | {"llama_4_scaling_beta": "query_beta"},
    ),
}
SCALINGS: dict[str, tuple[type | None, dict[str, str]]] = {
    "default": (None, {}),
    "linear": (LinearScaling, {"factor": "factor"}),
    "frequency_factors": (FrequencyFactors, {"factors": "factors"}),  # only out of GGUF files
    "llama3": (
        Llama3Scaling,
        {k: k for k in ("factor", "low_freq_factor", "high_freq_factor")} | _LENGTH,
    ),
    "longrope": (
        LongRopeScaling,
        _LONG | {"factor": "factor", "attention_factor": "attention_factor"},
    ),
    "proportional": (ProportionalScaling, {k: k for k in ("partial_rotary_factor", "factor")}),
    "yarn": (YarnScaling, _YARN | _LENGTH),
    **OF_FAMILIES,
}
# Numbers of YaRN for which Transformers takes 0 as "not given".
_ZERO_IS_NOTHING = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "llama_4_scaling_beta"}
# Parameters beside which are in files and which nobody reads.
_NOT_READ = {
    "longrope_two_magnitudes": {"factor", "attention_factor"},
    "ntk_alpha": {"factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"},
    "yarn_query_scale": {"max_position_embeddings"},
}


def with_types(given: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    """Returns the keys of a file with RoPE's types as they are called here.

    Args:
        given: The keys in the file.
        types: A family's `rope_types`.

    Raises:
        ValueError: At a type that files of the family do not have.
    """
    allowed = types or {name: name for name in SCALINGS if name not in OF_FAMILIES}

    def translated(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        value = {key: translated(x) for key, x in value.items()}  # one for each type of layers
        kinds = {key: value[key] for key in ("rope_type", "type") if key in value}
        if types or any(kind in list(OF_FAMILIES) for kind in kinds.values()):
            kinds = {key: known(allowed, kind, "rope_type") for key, kind in kinds.items()}
        return {**{key: translated(x) for key, x in value.items()}, **kinds}

    places = ("rope_parameters", "rope_scaling")
    return {key: translated(x) if key in places else x for key, x in given.items()}


def read_rope(
    given: Mapping[str, Any], defaults: Mapping[str, Any], has_local: bool = False
) -> dict[str, Any]:
    """Returns theta, scaling and context, in the spelling of Transformers 5 or of those before.

    Both spellings in one file are read as Transformers reads them: `rope_scaling` counts, and
    `rope_parameters` may not say otherwise.

    Args:
        given: The keys in the file: `rope_parameters`, or `rope_theta` and `rope_scaling`.
        defaults: The same, completed: `rope_theta`, `max_position_embeddings` and, if `has_local`,
            `rope_local_base_freq` are there; `partial_rotary_factor` and
            `original_max_position_embeddings`, if the model has them there.
        has_local: Whether layers with a window turn by a theta of their own,
            `rope_local_base_freq` or the parameters of "sliding_attention".

    Returns:
        The fields `rope_max_wavelength`, `rope_scaling`, `max_sequence_length` and, if there is
        such a thing, `local_rope_max_wavelength` or `partial_rotary_factor`.

    Raises:
        ValueError: At an unknown `rope_type` or parameter, or two places that disagree.
    """
    named = {key: _parameters(given.get(key), key) for key in ("rope_parameters", "rope_scaling")}
    if has_local:
        return _read_two(named, given, defaults)
    parameters, partial = named["rope_scaling"] or named["rope_parameters"], {}
    if _PARTIAL in defaults:
        partial = {_PARTIAL: _read_partial(parameters, named, given, defaults)}
    if (original := defaults.get(_ORIGINAL)) is not None and _rope_type(
        dict(parameters)
    ) != "default":
        parameters[_ORIGINAL] = original  # which counts for Transformers, wherever else it stands
    theta, scaling = _read_parameters(
        parameters, "rope_theta", defaults, {**named, **_theta(given, "rope_theta")}
    )
    length = defaults["max_position_embeddings"]
    context = length if scaling is None else scaling.context(length)
    return {**_fields(theta, scaling, context), **partial}


_PARTIAL, _ORIGINAL = "partial_rotary_factor", "original_max_position_embeddings"


def _read_partial(
    parameters: Mapping[str, Any],
    named: Mapping[str, dict[str, Any]],
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> float:
    """Takes the part of a head that turns out of RoPE's parameters, or reads the key beside them.

    Args:
        parameters: Those that count, one of `named`.
        named: Key of a dict of parameters -> the dict.
        given: The keys in the file.
        defaults: The same, completed.
    """
    factor = parameters.get(_PARTIAL, defaults[_PARTIAL])
    said = {key: other.pop(_PARTIAL, factor) for key, other in named.items()}
    if _PARTIAL in given:
        said[f"the key {_PARTIAL}"] = given[_PARTIAL]
    check_value(_PARTIAL, factor, float)
    if factor > 1 or any(x != factor for x in said.values()):
        raise ValueError(
            f"config.json: expected one {_PARTIAL} of at most 1, received {shown(said)}."
        )
    return float(factor)


def _read_two(
    named: Mapping[str, dict[str, Any]], given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Reads the parameters of a model whose layers with a window have a RoPE of their own."""
    flat, scaling = named["rope_parameters"], named["rope_scaling"]
    own = {kind: _parameters(flat.pop(kind, None), kind) for kind in LAYER_TYPES}
    if scaling.get("type", "default") != "default" and "rope_type" not in scaling:
        raise ValueError(  # Transformers keeps the rope_type "default" beside it
            "config.json: expected the key rope_type in rope_scaling, received type="
            f"{shown(scaling['type'])}, which Transformers does not read for such a model."
        )
    theta, stretched = _read_parameters(
        own["full_attention"] | scaling,
        "rope_theta",
        defaults,
        {**named, "full_attention": own["full_attention"], **_theta(given, "rope_theta")},
    )
    key = "rope_local_base_freq"
    local, nothing = _read_parameters(own["sliding_attention"], key, defaults, _theta(given, key))
    if nothing is not None:
        raise ValueError(
            "config.json: expected the rope_type default for sliding_attention, received "
            f"{shown(own['sliding_attention'])}."
        )
    if isinstance(stretched, YarnScaling) and not stretched.truncate:
        raise ValueError(
            "config.json: expected truncate to be true for a model with two kinds of RoPE, for "
            "which Transformers does not read it. Received: false."
        )
    # Such models state the length that linear scaling leads to.
    context = defaults["max_position_embeddings"]
    if stretched is not None and not isinstance(stretched, LinearScaling):
        context = stretched.context(context)
    return {**_fields(theta, stretched, context), "local_rope_max_wavelength": local}


def _fields(theta: float, scaling: RopeScaling | None, context: int) -> dict[str, Any]:
    return {
        "rope_max_wavelength": theta,
        "rope_scaling": scaling,
        "max_sequence_length": context,
    }


def _theta(given: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """Returns what the file says of theta outside of RoPE's own dicts, by its place."""
    return {} if given.get(key) is None else {f"the key {key}": {"rope_theta": given[key]}}


def _parameters(value: Any, key: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(
            f"config.json: expected a dict of RoPE parameters for {key}, received {shown(value)}."
        )
    # A null factor has a meaning: see `_scaling`.
    return {k: x for k, x in (value or {}).items() if x is not None or k == "factor"}


def _read_parameters(
    parameters: dict[str, Any],
    theta_key: str,
    defaults: Mapping[str, Any],
    places: Mapping[str, Mapping[str, Any]],
) -> tuple[float, RopeScaling | None]:
    """Reads the parameters that count, and checks that no other place says otherwise.

    Args:
        parameters: Those that count.
        theta_key: The key of theta outside of them.
        defaults: That theta, and the length that the file states.
        places: Name of a place in the file -> what it says.
    """
    counting = dict(parameters)
    kind = _rope_type(counting)
    theta = counting.setdefault("rope_theta", defaults[theta_key])
    check_value("rope_theta", theta, float)
    for place, said in places.items():
        other = dict(said)
        other_kind = _rope_type(other)
        differing = {k: x for k, x in other.items() if counting.get(k) != x}
        if other_kind not in ("default", kind):
            differing = {"rope_type": other_kind}
        for key, value in differing.items():
            in_file = {**places.get(f"the key {theta_key}", {}), **parameters}
            in_file.setdefault("rope_type", in_file.get("type"))
            taken = "no" if in_file.get(key) is None else f"{shown(in_file[key])} as"
            raise ValueError(
                f"config.json says two things about RoPE: {key}={shown(value)} in {place}, and "
                f"{taken} {key} where Transformers reads it. Remove one of them."
            )
    del counting["rope_theta"]
    return float(theta), _scaling(kind, counting, defaults["max_position_embeddings"])


def _rope_type(parameters: dict[str, Any]) -> Any:
    """Takes the type out of RoPE's parameters, under its present or its old key."""
    types = [parameters.pop(key) for key in ("rope_type", "type") if key in parameters]
    if len(types) == 2 and types[0] != types[1]:
        raise ValueError(f"config.json: expected one type of RoPE scaling, received {types}.")
    return types[0] if types else "default"


def _scaling(kind: Any, parameters: dict[str, Any], length: int) -> RopeScaling | None:
    if (
        "short_factor" in parameters and kind not in OF_FAMILIES
    ):  # Phi-3's first files call it "su" or "yarn"
        kind = "longrope"
        if parameters["short_factor"] == parameters.get("long_factor") and (
            parameters.get("attention_factor") == 1
        ):
            return _read_factors(parameters["short_factor"])
    if kind == "dynamic":
        raise ValueError(
            "config.json: rope_type='dynamic' turns by frequencies that depend on how long a text "
            f"is, which no part here does. Known: {', '.join(SCALINGS)}."
        )
    scaling_class, names = known(SCALINGS, kind, "rope_type")
    if _PARTIAL not in names and parameters.pop(_PARTIAL, 1.0) != 1.0:
        raise ValueError("config.json: expected partial_rotary_factor to be 1 if it is there.")
    if scaling_class is None:
        names = {}
    is_yarn = set(_YARN) <= set(names)
    parameters = {k: x for k, x in parameters.items() if k not in _NOT_READ.get(kind, ())}
    if "original_max_position_embeddings" in names:
        original = parameters.setdefault("original_max_position_embeddings", length)
        is_implied = is_yarn and parameters.get("factor", 1) is None
        if is_implied or (kind == "longrope" and parameters.get("factor") is None):
            check_value("original_max_position_embeddings", original, int, counts=True)
            parameters["factor"] = length / original
    if is_yarn:
        parameters = {k: x for k, x in parameters.items() if x != 0 or k not in _ZERO_IS_NOTHING}
    unknown = sorted(set(parameters) - set(names))
    if unknown:
        raise ValueError(f"config.json: unknown RoPE parameters {unknown}. Known: {sorted(names)}.")
    if scaling_class is None:
        return None
    hints = get_type_hints(scaling_class)
    for key, value in parameters.items():
        check_value(key, value, hints[names[key]], counts=hints[names[key]] is int)
    needed = {f.name for f in fields(scaling_class) if f.default is MISSING}
    if lacking := [
        key for key, field in names.items() if field in needed and key not in parameters
    ]:
        raise ValueError(
            f"config.json: the RoPE parameters {shown(parameters)} of the type {kind!r} lack "
            f"{', '.join(lacking)}."
        )
    values = {names[key]: tuple(x) if isinstance(x, list) else x for key, x in parameters.items()}
    scaling: RopeScaling = scaling_class(**values)
    return scaling


def _read_factors(factors: Any) -> FrequencyFactors:
    """Reads a longrope that turns texts of all lengths alike."""
    check_value("short_factor", factors, tuple[float, ...])
    return FrequencyFactors(factors=tuple(factors))


def write_rope_scaling(config: RotaryConfig, types: Mapping[str, str]) -> JSON | None:
    """Returns the scaling of a config as Hugging Face's `rope_scaling`.

    Args:
        config: The config.
        types: The family's `rope_types`.
    """
    theirs = {ours: name for name, ours in types.items()}
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
            given = {key: list(x) if isinstance(x, tuple) else x for key, x in given.items()}
            given = {"rope_type": theirs.get(rope_type, rope_type), **given}
            return {key: x for key, x in given.items() if x is not None}
    raise ValueError(f"Expected a known RoPE scaling to write, received {scaling!r}.")


def shown(value: object) -> str:
    """Returns a value for a message, however long or deep it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    return short.repr(value)


def known(table: Mapping[str, _Entry], value: object, key: str) -> _Entry:
    """Returns the entry of a table for the value of a key.

    Raises:
        ValueError: If there is none.
    """
    if not isinstance(value, str) or value not in table:
        raise ValueError(f"config.json: unknown {key}={shown(value)}. Known: {', '.join(table)}.")
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
        low, high = (1, _LARGEST_SIZE) if counts else (-_LARGEST_INT, _LARGEST_INT)
        right = is_whole and low <= value <= high
        expected = "a positive integer" if counts else "a whole number"
        expected += f" up to {high}" if is_whole and value > high else ""
    elif kinds == {float}:
        is_number = is_whole or isinstance(value, float)
        right, expected = is_number and 0 < value < _LARGEST_FLOAT, "a finite number above 0"
    elif kinds == {bool}:
        right, expected = isinstance(value, bool), "true or false"
    elif kinds == {str}:
        right, expected = isinstance(value, str), "a word"
    else:
        kind = str if str in kinds else (int, float)
        is_list = isinstance(value, (list, tuple))
        right = is_list and all(isinstance(x, kind) for x in value)
        expected = f"a list of {'words' if kind is str else 'numbers'}"
    if not right:
        raise ValueError(f"config.json: expected {expected} for {key}, received {shown(value)}.")
