"""Plain data: what a chat template, a foreign program, may see."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


def as_plain_data(value: Any) -> Any:
    """Returns a value rebuilt of strings, numbers, lists and dicts.

    Methods of other objects could lead out of the sandbox of a template. Objects that are records
    of plain data become dicts: dataclasses, and models of pydantic such as messages of API clients.

    Raises:
        ValueError: If there is something else in it.
    """
    try:
        return json.loads(json.dumps(value, default=_record))
    except (TypeError, ValueError) as error:
        raise ValueError(
            "A chat template reads plain data only. Expected: strings, numbers, lists and dicts. "
            f"Received: a value of another type ({error}). Pass tools as functions or JSON "
            "schemas, and images as URLs."
        ) from error


def is_record(value: object) -> bool:
    """Whether a value is a dict, or becomes one as plain data."""
    return (
        isinstance(value, Mapping)
        or (dataclasses.is_dataclass(value) and not isinstance(value, type))
        or callable(getattr(value, "model_dump", None))
    )


def _record(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return value.model_dump()
    if hasattr(value, "tolist"):  # NumPy's numbers and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not plain data")
