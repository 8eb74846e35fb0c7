"""Adapters on disk: PEFT's own format, and the same two files for methods that PEFT lacks."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from safetensors import SafetensorError
from safetensors.numpy import save_file

from functional_llm.files.json_files import read_json
from functional_llm.files.replacing import share
from functional_llm.formats.safetensors_reader import open_safetensors
from functional_llm.graph.selection import walk
from functional_llm.peft.adapter import (
    Adapter,
    adapter_names,
    attach,
    find_adapters,
    origin_of,
)
from functional_llm.peft.linear import LINEAR_LAYERS, Linear
from functional_llm.peft.peft_format import Stored, from_peft, to_peft

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(model: Any, folder: str | Path, adapter_name: str | None = None) -> None:
    """Saves an adapter: `adapter_config.json` and `adapter_model.safetensors`.

    LoRA, rsLoRA, PiSSA, DoRA and IA3 are what PEFT loads with `PeftModel.from_pretrained`. Any
    other method, yours included, is kept by the paths of the model's layers.

    Args:
        model: A model with adapters.
        folder: Where to; made if it is not there.
        adapter_name: Which one, if the model has several.

    Raises:
        ValueError: If the model has no such adapter, or several and none is named.
        OSError: If the folder cannot be written to: the disk is full, say.
    """
    names = adapter_names(model)
    if adapter_name is None and len(names) == 1:
        adapter_name = names[0]
    if adapter_name not in names:
        raise ValueError(f"Expected adapter_name to be one of {names}, received {adapter_name!r}.")
    adapters = {p: x for p, x in find_adapters(model) if x.adapter_name == adapter_name}
    classes = sorted({type(x).__name__ for x in adapters.values()})
    if len(classes) > 1:
        raise ValueError(f"Adapter '{adapter_name}' mixes {classes}. Expected one class.")
    if next(iter(adapters.values())).peft_type is None:
        config, tensors = _by_path(adapters)
    else:
        config, tensors = to_peft(adapters, _module_names(model, adapters), _linears(model))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    _write(folder / WEIGHTS_NAME, lambda path: save_file(tensors, path, {"format": "pt"}))
    _write(folder / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def _write(path: Path, write: Any) -> None:
    """A file is replaced when it is complete: a full disk leaves the old one as it was."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        share(part)
        os.replace(part, path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}.") from error
    finally:
        part.unlink(missing_ok=True)


def _module_names(model: Any, layers: Any) -> dict[str, str]:
    """Path -> name of the module; a model that belongs to no family has only paths."""
    names = dict(getattr(model, "module_names", {}))
    return {**{path: path.replace("/", ".") for path in layers if path not in names}, **names}


def _linears(model: Any) -> Callable[[str], Linear]:
    layers = dict(walk(model))

    def linear(path: str) -> Linear:
        layer = layers[path]
        return Linear(origin_of(layer))

    return linear


def _by_path(adapters: Mapping[str, Adapter]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    cls = type(next(iter(adapters.values())))
    config = {
        "peft_type": cls.__name__,
        "registered_name": keras.saving.get_registered_name(cls),
        "layers": {path: adapter.get_options() for path, adapter in adapters.items()},
    }
    tensors = {
        f"{path}/{name}": np.ascontiguousarray(ops.convert_to_numpy(ops.cast(v, "float32")))
        for path, adapter in adapters.items()
        for name, v in adapter.adapter_weights.items()
    }
    return config, tensors


def load_adapter(
    model: Any,
    folder: str | Path,
    adapter_name: str = "default",
    methods: Sequence[type[Adapter]] = (),
    dtype: str = "float32",
) -> Any:
    """Returns a model with an adapter from disk; nothing else trains in it.

    Args:
        model: The model that the adapter is for. It stays as it is, and its weights are shared.
        folder: From `save_adapter`, or from PEFT's `save_pretrained` (LoRA, DoRA, IA3).
        adapter_name: Another name for each adapter in one model.
        methods: Your own subclasses of `Adapter`, unless they are registered with
            `keras.saving.register_keras_serializable`.
        dtype: Of the adapter's weights.

    Raises:
        FileNotFoundError: If one of the two files is missing.
        ValueError: If the adapter does not fit the model. All differences are named.
    """
    folder = Path(folder)
    config = _read_config(folder)
    source = open_safetensors(folder / WEIGHTS_NAME)
    tensors = {name: source.read(name, "float32") for name in source.shapes}
    layers = [path for path, x in walk(model) if isinstance(x, (*LINEAR_LAYERS, Adapter))]
    if "registered_name" in config:
        stored, problems = _from_paths(config, tensors, methods)
    elif config.get("peft_type") in ("LORA", "IA3"):
        stored, problems = from_peft(config, tensors, _module_names(model, layers), _linears(model))
    else:
        raise ValueError(
            f"{folder / CONFIG_NAME}: peft_type is {config.get('peft_type')!r}. Expected LORA or "
            "IA3, or a file from `save_adapter`."
        )
    problems += [f"the model has no linear layer '{path}'" for path in stored if path not in layers]
    if not stored and not problems:
        problems.append("it has no tensors")
    _raise(folder, problems)

    def make(layer: Any, path: str, **kwargs: Any) -> Adapter:
        try:
            return stored[path].cls(layer, dtype=dtype, **stored[path].options, **kwargs)
        except (TypeError, ValueError) as error:
            problems.append(f"{path}: {error}")
            return _Unfit(layer, **kwargs)

    new_model = attach(model, make, lambda _, path: path in stored, adapter_name)
    adapters = {p: x for p, x in find_adapters(new_model) if x.adapter_name == adapter_name}
    for path, adapter in adapters.items():
        problems += _check_weights(path, adapter, stored[path].weights)
    _raise(folder, problems)
    for path, adapter in adapters.items():
        for name, variable in adapter.adapter_weights.items():
            variable.assign(stored[path].weights[name])
    return new_model


class _Unfit(Adapter):
    """Stands where no adapter could be made, until all that is wrong is known."""

    def make_weights(self, linear: Any) -> None:
        pass

    def change(self, x: Any, training: bool | None = None) -> Any:
        return 0.0


def _check_weights(path: str, adapter: Adapter, weights: Mapping[str, np.ndarray]) -> list[str]:
    if isinstance(adapter, _Unfit):
        return []
    expected = {name: tuple(v.shape) for name, v in adapter.adapter_weights.items()}
    received = {name: array.shape for name, array in weights.items()}
    lines = [f"{path}: missing weight '{x}'" for x in sorted(expected.keys() - received.keys())]
    lines += [f"{path}: unknown weight '{x}'" for x in sorted(received.keys() - expected.keys())]
    return lines + [
        f"{path}: '{x}' expected shape {expected[x]}, received {received[x]}"
        for x in sorted(expected.keys() & received.keys())
        if expected[x] != received[x]
    ]


def _from_paths(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], methods: Sequence[type]
) -> tuple[dict[str, Stored], list[str]]:
    name = str(config["registered_name"])
    known = {cls.__name__: cls for cls in methods}
    cls = known.get(name.rpartition(">")[2]) or keras.saving.get_registered_object(name)
    if not (isinstance(cls, type) and issubclass(cls, Adapter)):
        raise ValueError(
            f"The adapter is of the class '{name}', which is not known here. Import the module "
            "that defines it, with `@keras.saving.register_keras_serializable()` on it, or give "
            "it as `methods=[...]`."
        )
    layers = config.get("layers")
    if not isinstance(layers, dict) or not all(isinstance(x, dict) for x in layers.values()):
        raise ValueError(f"Expected 'layers' to map paths to options, received {layers!r:.200}.")
    stored = {path: Stored(cls, dict(options), {}) for path, options in layers.items()}
    problems = []
    for key, array in tensors.items():
        path = next((p for p in sorted(layers, key=len) if key.startswith(f"{p}/")), None)
        if path is None:
            problems.append(f"tensor '{key}' belongs to none of the layers in the config")
        else:
            stored[path].weights[key.removeprefix(f"{path}/")] = array
    return stored, problems


def _read_config(folder: Path) -> dict[str, Any]:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            hint = ""
            if (folder / "adapter_model.bin").is_file():
                hint = " Save it again with PEFT's `save_pretrained(safe_serialization=True)`."
            raise FileNotFoundError(f"Expected {name} in {folder}: it is not there.{hint}")
    return read_json(folder / CONFIG_NAME)


def _raise(folder: Path, problems: Sequence[str]) -> None:
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(
            f"The adapter in {folder} does not fit the model, {len(problems)} differences:\n"
            f"  {shown}{more}\nCheck that adapter and model belong together."
        )
