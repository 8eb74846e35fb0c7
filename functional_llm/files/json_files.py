"""JSON objects, in files and elsewhere."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def parse_json_object(
    text: str | bytes, where: str, unique_keys: bool = False, advice: str = ""
) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
        text: The object, as a string or as UTF-8.
        where: The place that it comes from, for messages: a file, or a member of one.
        unique_keys: Whether a key that is given twice is an error; else the last one counts.
        advice: What to do if it is malformed, for messages.

    Raises:
        ValueError: If the text is no JSON object.
    """
    hook = _unique_keys if unique_keys else None
    try:
        value = json.loads(
            text if isinstance(text, str) else text.decode("utf-8"), object_pairs_hook=hook
        )
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{where} is no valid JSON: {str(error)[:200]}.{_after(advice)}") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ValueError(f"{where}: expected a JSON object, received {kind}.{_after(advice)}")
    return value


def read_json(
    path: Path, default: dict[str, Any] | None = None, advice: str = ""
) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
        path: The file.
        default: What to return if there is no file.
        advice: As for `parse_json_object`.

    Raises:
        FileNotFoundError: If there is no file and no default.
        ValueError: If the file holds no JSON object.
    """
    if not path.is_file():
        if default is None:
            raise FileNotFoundError(f"Expected {path.name} in {path.parent}: it is not there.")
        return default
    return parse_json_object(path.read_bytes(), str(path), advice=advice)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object for people to read: indented, in UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"the keys {twice[:5]} are given twice")
    return values


def _after(advice: str) -> str:
    return f" {advice}" if advice else ""
