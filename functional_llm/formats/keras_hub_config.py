"""The arguments of KerasHub's backbone classes to our frozen configs and back.

Both ways are checked by going back: what does not come back as it was is an error that names it.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, get_type_hints

from functional_llm.backbones.family import Family, ModelConfig
from functional_llm.backbones.keras_hub.column import REQUIRED, KerasHub
from functional_llm.formats.rope_config import check_value, shown
from functional_llm.graph.types import JSON

# Arguments that change no logits.
IRRELEVANT = frozenset({"name", "trainable", "dtype", "dropout"})
_TIED = "tie_word_embeddings"
# What means nothing in a model without layers with a window.
_OF_WINDOW = ("sliding_window", "local_rope_max_wavelength")


def read_arguments(
    class_name: object,
    given: JSON,
    has_head: bool,
    families: Mapping[str, Family],
    where: str,
) -> tuple[Family, ModelConfig]:
    """Returns the family and our config of a KerasHub backbone.

    Args:
        class_name: The name of its class, without the package.
        given: The arguments that its config states.
        has_head: Whether it has a head of its own: `LlamaBackbone` does not say so.
        families: The families there are, by name.
        where: The place of the config, for messages.

    A warning names what KerasHub computes otherwise than the model's authors.

    Raises:
        ValueError: If no family has such a class, or an argument is missing, unknown, or has a
            value that no part exists for.
    """
    columns = {
        family.model_type: family.keras_hub
        for family in families.values()
        if family.keras_hub is not None
    }
    fitting = [name for name, column in columns.items() if class_name in column.classes]
    if not fitting:
        classes = sorted({name for column in columns.values() for name in column.classes})
        raise ValueError(
            f"{where}: expected a text model of one of the KerasHub classes {', '.join(classes)}. "
            f"Received: {class_name!r}."
        )
    problems: dict[str, list[str]] = {}
    for name in fitting:
        stated = dict(given)
        if _TIED in columns[name].arguments:
            stated.setdefault(_TIED, not has_head)
        config, problems[name] = _read(stated, families[name], columns[name])
        if config is not None:
            _warn(class_name, columns[name].differences(config), where)
            return families[name], config
    fewest = min(problems.values(), key=len)
    raise ValueError(
        f"{where}: {class_name} has arguments that this library does not handle: "
        f"{', '.join(fewest)}. Loading would ignore them and give wrong numbers."
    )


def _warn(class_name: object, wrong: Sequence[str], where: str) -> None:
    if wrong:
        warnings.warn(
            f"{where}: KerasHub's {class_name} computes otherwise than the model's authors: "
            f"{'; '.join(wrong)}. Here the model computes as theirs, so its numbers are not "
            "KerasHub's.",
            stacklevel=4,
        )


def _read(given: JSON, family: Family, column: KerasHub) -> tuple[Any, list[str]]:
    """Returns our config, or what is wrong with the arguments for this family."""
    known = {*column.arguments, *IRRELEVANT}
    problems = [f"{name}={shown(given[name])} (unknown)" for name in sorted(set(given) - known)]
    problems += [
        f"{name} (missing)"
        for name, default in column.arguments.items()
        if default is REQUIRED and given.get(name) is None
    ]
    if problems:
        return None, problems
    problems = [
        f"{name}={shown(given[name])} (expected the config of an encoder, or nothing)"
        for name in column.encoders
        if not isinstance(given.get(name), dict | None)
    ]
    given = {**given, **dict.fromkeys(column.encoders)}
    values = {name: given.get(name, default) for name, default in column.arguments.items()}
    ours = get_type_hints(family.config_class)
    hints = {**ours, **column.types}
    for name, value in values.items():
        if value is None:
            continue
        if name in hints:
            check_value(name, value, hints[name], counts=hints[name] is int)
        elif not isinstance(value, (int, float)) and name not in column.ignored:
            problems.append(f"{name}={shown(value)} (expected a number, true or false)")
    if problems:
        return None, problems
    same = {name: value for name, value in values.items() if name in ours}
    config = family.config_class(**(same | column.given_fields(values)))
    back = column.made_arguments(config)
    problems = [
        f"{name}={shown(value)} (expected {shown(back[name])})"
        for name, value in values.items()
        if name not in column.ignored and not _comes_back(value, column.arguments[name], back[name])
    ]
    return (None, problems) if problems else (_meaning(config), [])


def _comes_back(value: Any, default: Any, back: Any) -> bool:
    # None stands for a size that follows from the others.
    return value == back or (value is None and default is None)


def _meaning(config: Any) -> Any:
    """Returns a config without numbers that have no meaning for it."""
    names = {field.name for field in fields(config)}
    if not {"layer_types", "sliding_window"} <= names or "sliding_attention" in config.layer_types:
        return config
    return replace(config, sliding_window=None)


def make_arguments(config: ModelConfig, family: Family) -> JSON:
    """Returns the arguments of KerasHub's class for such a model.

    Raises:
        ValueError: If KerasHub has no such model, cannot say one of its numbers, or computes
            something else than it says.
    """
    column = family.keras_hub
    if column is None:
        raise ValueError(
            f"Expected a model of a family that KerasHub has. Received: {family.model_type!r}."
        )
    arguments = column.made_arguments(config)
    same = {name: x for name, x in arguments.items() if hasattr(config, name)}
    back = asdict(_meaning(family.config_class(**(same | column.given_fields(arguments)))))
    expected = asdict(_meaning(config))
    skipped = {"max_sequence_length"} - set(column.arguments)  # KerasHub does not say it
    if "layer_types" in expected and "sliding_attention" not in expected["layer_types"]:
        skipped |= set(_OF_WINDOW)
    problems = [
        f"it cannot say {name}={shown(value)} (it has {shown(back[name])})"
        for name, value in expected.items()
        if name not in skipped and value != back[name]
    ]
    problems += column.differences(config)
    if problems:
        raise ValueError(
            f"KerasHub's {column.classes[0]} is not such a model: {'; '.join(problems)}. Save the "
            "model with `save_preset` or `save` instead."
        )
    return arguments
