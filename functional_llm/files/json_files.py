"""JSON objects in files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the object in a file; `default` if there is no file.

    Raises:
        FileNotFoundError: If there is no file and no default.
        ValueError: If it holds no JSON object.
    """
    if not path.is_file() and default is not None:
        return default
    if not path.is_file():
        raise FileNotFoundError(f"Expected {path.name} in {path.parent}: it is not there.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, received {type(raw).__name__}.")
    return raw


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes readable JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
