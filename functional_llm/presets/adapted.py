"""Models with adapters, from handles: which base, which adapters, how much each counts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import keras

from functional_llm.peft.adapter import activate
from functional_llm.peft.adapter_files import CONFIG_NAME, load_adapter
from functional_llm.presets.sources import OWN_TOKENIZER, adapter_folder, base_handle, check_base

Handle: TypeAlias = str | Path
# One adapter, several, or several with weights.
Adapters: TypeAlias = Handle | Sequence[Handle] | Mapping[Any, float] | None


def split_handle(
    handle: Handle | None, adapter: Adapters = None
) -> tuple[Handle, dict[Path, float]]:
    """Returns the handle of a base, and the folders of adapters with their weights.

    Args:
        handle: Of a model, or of an adapter alone; `None` for the base of the first adapter.
        adapter: Handles of adapters, folders or `hf://org/name`; a dict gives each a weight.

    Raises:
        ValueError: If there is neither, an adapter is none or is given twice, or it names another
            base.
    """
    if adapter is None:
        weights: dict[Handle, float] = {}
    elif isinstance(adapter, Mapping):
        weights = dict(adapter)
    else:
        given = [adapter] if isinstance(adapter, (str, Path)) else list(adapter)
        weights = dict.fromkeys(given, 1.0)
        if len(weights) != len(given):
            raise _twice(next(x for x in weights if given.count(x) > 1))
    folders: dict[Path, float] = {}
    own = None if handle is None else adapter_folder(handle)
    if own is not None:
        handle, folders = None, {own.resolve(): 1.0}
    for name, weight in weights.items():
        folder = adapter_folder(name)
        if folder is None:
            raise ValueError(
                f"Expected the folder of an adapter, received {name}: it has no {CONFIG_NAME}."
            )
        if folder.resolve() in folders:
            raise _twice(name)
        folders[folder.resolve()] = weight
    if handle is None and not folders:
        raise ValueError("Expected a handle of a model, or an adapter; received neither.")
    base = base_handle(next(iter(folders))) if handle is None else handle
    for folder in folders:
        check_base(folder, base)
    return base, folders


def with_adapters(model: keras.Model, folders: Mapping[Path, float]) -> keras.Model:
    """Returns a model with adapters from disk, each with its weight.

    Args:
        model: The base; it stays as it is.
        folders: Of `split_handle`.

    Raises:
        ValueError: As `load_adapter`.
    """
    weights: dict[str, float] = {}
    for folder, weight in folders.items():
        name = folder.name if folder.name not in weights else str(folder)
        model = load_adapter(model, folder, adapter_name=name)
        weights[name] = weight
    if any(weight != 1 for weight in weights.values()):
        activate(model, weights)
    return model


def tokenizer_handle(base: Handle, folders: Mapping[Path, float]) -> Handle:
    """Returns what to load the tokenizer from: the first adapter that has one, else the base."""
    have = (x for x in folders if any((x / name).is_file() for name in OWN_TOKENIZER))
    return next(have, base)


def _twice(name: Handle) -> ValueError:
    return ValueError(f"The adapter {name} is given twice. Expected each once, with its weight.")
