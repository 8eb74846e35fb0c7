"""Tools: Python functions as the JSON schemas that chat templates write for models.

The rules are those of `transformers.utils.get_json_schema`: types come from annotations, what
arguments mean from a docstring in Google's style.

Reference: https://huggingface.co/docs/transformers/chat_extras
"""

import inspect
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_TYPES: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
_SCALARS = (int, float, str, bool, type(None))
_DESCRIPTION = re.compile(r"^(.*?)[\n\s]*(Args:|Returns:|Raises:|\Z)", re.DOTALL)
_ARGUMENTS = re.compile(r"\n\s*Args:\n(.*?)[\n\s]*(Returns:|Raises:|\Z)", re.DOTALL)
_RETURNS = re.compile(r"\n\s*Returns:\n\s*(.*?)[\n\s]*(Raises:|\Z)", re.DOTALL)
# A name, a colon, and all up to the next name that is not indented deeper.
_ARGUMENT = re.compile(
    r"(?:^|\n)([ \t]*)(\w+):\s*(.*?)\s*(?=\n(?!\1[ \t])[ \t]*\w+:|\Z)", re.DOTALL
)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def tool_schemas(tools: Iterable[Mapping[str, Any] | Callable[..., Any]]) -> list[dict[str, Any]]:
    """Returns tools as JSON schemas.

    Args:
        tools: JSON schemas, which stay as they are; functions or methods with annotations and a
            docstring that describes every argument.

    Raises:
        ValueError: If a tool is neither, or a function lacks what its schema needs.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
        raise ValueError(f"Expected a list of tools, received {tools!r:.100}.")
    return [_schema_of(tool) for tool in tools]


def _schema_of(tool: Any) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        return dict(tool)
    if not (inspect.isfunction(tool) or inspect.ismethod(tool)):
        raise ValueError(
            f"A tool is neither a function nor plain data. Expected: a function with annotations "
            f"and a docstring, or its JSON schema. Received: {tool!r:.100}."
        )
    name = getattr(tool, "__name__", "operation")
    text = (inspect.getdoc(tool) or "").strip()
    if not text:
        raise _unusable(name, "a docstring", "none")
    try:
        hints = get_type_hints(tool)
    except Exception as error:  # annotations as text may be anything
        raise _unusable(name, "annotations that Python can read", str(error)) from error
    described = _described_arguments(text)
    properties: dict[str, Any] = {}
    required = []
    for argument in _parameters(tool):
        if argument.name not in hints:
            raise _unusable(name, "an annotation of every argument", f"none of {argument.name!r}")
        if argument.name not in described:
            received = f"no description of {argument.name!r} under Args:"
            raise _unusable(name, "a description of every argument", received)
        schema = _parse_hint(hints[argument.name], name)
        properties[argument.name] = schema | _parse_description(described[argument.name], name)
        if argument.default is argument.empty:
            required.append(argument.name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    summary = _DESCRIPTION.search(text)
    function = {"name": name, "description": summary and summary.group(1).strip()}
    function["parameters"] = parameters
    return {"type": "function", "function": function | _parse_return(hints, text, name)}


def _parameters(tool: Callable[..., Any]) -> list[inspect.Parameter]:
    parameters = list(inspect.signature(tool).parameters.values())
    first = parameters[0] if parameters else None
    # A method of a class, not of an object: its receiver is no argument of the tool.
    receiver = (
        first is not None and first.name in ("self", "cls") and first.annotation is first.empty
    )
    return parameters[1:] if receiver else parameters


def _described_arguments(text: str) -> dict[str, str]:
    block = _ARGUMENTS.search(text)
    lines = [] if block is None else [line for line in block.group(1).split("\n") if line.strip()]
    found = _ARGUMENT.findall("\n".join(lines))
    return {name: re.sub(r"\s*\n+\s*", " ", words.strip()) for _, name, words in found}


def _parse_description(words: str, name: str) -> dict[str, Any]:
    choices = _CHOICES.search(words)
    if choices is None:
        return {"description": words}
    try:
        values = json.loads(choices.group(1))
    except ValueError as error:
        raise _unusable(name, '(choices: ["a", "b"]) in JSON', choices.group(0)) from error
    values = [value.strip() if isinstance(value, str) else value for value in values]
    return {"enum": values, "description": words[: choices.start()].strip()}


def _parse_return(hints: Mapping[str, Any], text: str, name: str) -> dict[str, Any]:
    """Returns the schema of what the function returns, if there is one: few templates write it."""
    if "return" not in hints:
        return {}
    try:
        schema = _parse_hint(hints["return"], name)
    except ValueError:
        return {}
    words = _RETURNS.search(text)
    return {"return": schema | ({"description": words.group(1).strip()} if words else {})}


def _parse_hint(hint: Any, name: str) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is None and isinstance(hint, type) and issubclass(hint, Enum):
        return _enumeration([member.value for member in hint], name)
    if origin is None and hint in _TYPES:
        return dict(_TYPES[hint])
    if origin in (Union, types.UnionType):
        return _union([_parse_hint(x, name) for x in arguments if x is not type(None)]) | (
            {"nullable": True} if type(None) in arguments else {}
        )
    if origin in (list, tuple, dict) and not arguments:
        return dict(_TYPES[origin])
    if origin is Literal:
        return _enumeration(list(arguments), name)
    if origin is list:
        return {"type": "array", "items": _parse_hint(arguments[0], name)}
    if origin is tuple and len(arguments) > 1 and ... not in arguments:
        return {"type": "array", "prefixItems": [_parse_hint(x, name) for x in arguments]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _parse_hint(arguments[1], name)}
    expected = (
        "annotations of int, float, str, bool, Any, Enum, Literal, and of lists, dicts, unions and "
        "tuples (of several types) of these"
    )
    raise _unusable(name, expected, repr(hint))


def _enumeration(values: list[Any], name: str) -> dict[str, Any]:
    if not values or any(type(value) not in _SCALARS for value in values):
        raise _unusable(name, "choices that are numbers, strings, booleans or None", repr(values))
    kinds = list(dict.fromkeys(_TYPES[type(value)]["type"] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _union(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    if len(schemas) == 1:
        return schemas[0]
    if all(x.keys() == {"type"} and isinstance(x["type"], str) for x in schemas):
        kinds = sorted({x["type"] for x in schemas})
        return {"type": kinds[0] if len(kinds) == 1 else kinds}
    return {"anyOf": schemas}


def _unusable(name: str, expected: str, received: str) -> ValueError:
    return ValueError(
        f"The function {name} cannot be written as a tool. Expected: {expected}. Received: "
        f"{received}. Complete it, or pass its JSON schema."
    )
