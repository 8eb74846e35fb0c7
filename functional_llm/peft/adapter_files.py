"""Adapters on disk: PEFT's own format, and the same two files for methods that PEFT lacks."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from safetensors import SafetensorError
from safetensors.numpy import save_file

from functional_llm.files.json_files import read_json
from functional_llm.files.replacing import replaced_file
from functional_llm.formats.safetensors_reader import open_safetensors
from functional_llm.graph.selection import walk
from functional_llm.graph.types import JSON, Layer, Tensor
from functional_llm.peft.adapter import (
    Adapter,
    adapter_names,
    attach,
    find_adapters,
    origin_of,
)
from functional_llm.peft.linear import LINEAR_LAYERS, Linear
from functional_llm.peft.peft_format import SavedAdapter, from_peft, to_peft

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(model: keras.Model, folder: str | Path, adapter_name: str | None = None) -> None:
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
        config, tensors = _to_paths(adapters)
    else:
        config, tensors = to_peft(adapters, _module_of(model, adapters), _linear_at(model))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replaced_file(folder / WEIGHTS_NAME) as path:
        try:
            save_file(tensors, path, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / WEIGHTS_NAME} could not be written: {error}.") from error
    with replaced_file(folder / CONFIG_NAME) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _module_of(model: keras.Model, paths: Iterable[str]) -> dict[str, str]:
    """Returns path -> name of the module; a model that belongs to no family has only paths."""
    names = dict(getattr(model, "module_names", {}))
    return {**{path: path.replace("/", ".") for path in paths if path not in names}, **names}


def _linear_at(model: keras.Model) -> Callable[[str], Linear]:
    layers = dict(walk(model))
    return lambda path: Linear(origin_of(layers[path]))


def _to_paths(adapters: Mapping[str, Adapter]) -> tuple[JSON, dict[str, np.ndarray]]:
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
    model: keras.Model,
    folder: str | Path,
    adapter_name: str = "default",
    methods: Sequence[type[Adapter]] = (),
    dtype: str = "float32",
) -> keras.Model:
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
        saved, problems = _from_paths(config, tensors, methods)
    elif config.get("peft_type") in ("LORA", "IA3"):
        saved, problems = from_peft(config, tensors, _module_of(model, layers), _linear_at(model))
    else:
        raise ValueError(
            f"{folder / CONFIG_NAME}: peft_type is {config.get('peft_type')!r}. Expected LORA or "
            "IA3, or a file from `save_adapter`."
        )
    problems += [f"the model has no linear layer '{path}'" for path in saved if path not in layers]
    if not saved and not problems:
        problems.append("it has no tensors")
    _raise_at(problems, folder)

    def make(layer: Layer, path: str, **kwargs: Any) -> Adapter:
        try:
            return saved[path].cls(layer, **saved[path].options, **kwargs)
        except (TypeError, ValueError) as error:
            problems.append(f"{path}: {error}")
            return _Placeholder(layer, **kwargs)

    new_model = attach(model, make, lambda _, path: path in saved, adapter_name, dtype=dtype)
    adapters = {p: x for p, x in find_adapters(new_model) if x.adapter_name == adapter_name}
    for path, adapter in adapters.items():
        problems += _check_weights(path, adapter, saved[path].weights)
    _raise_at(problems, folder)
    for path, adapter in adapters.items():
        for name, variable in adapter.adapter_weights.items():
            variable.assign(saved[path].weights[name])
    return new_model


class _Placeholder(Adapter):
    """Stands in the place of an adapter that could not be made, until all problems are known."""

    def make_weights(self, linear: Linear) -> None:
        pass

    def change(self, x: Tensor, training: bool | None = None) -> Tensor:
        return 0.0


def _check_weights(path: str, adapter: Adapter, weights: Mapping[str, np.ndarray]) -> list[str]:
    if isinstance(adapter, _Placeholder):
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
    config: JSON, tensors: Mapping[str, np.ndarray], methods: Sequence[type[Adapter]]
) -> tuple[dict[str, SavedAdapter], list[str]]:
    """Reads an adapter of a method that PEFT lacks; returns as `from_peft`."""
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
    saved = {path: SavedAdapter(cls, dict(options), {}) for path, options in layers.items()}
    problems = []
    for key, array in tensors.items():
        path = next((p for p in sorted(layers, key=len) if key.startswith(f"{p}/")), None)
        if path is None:
            problems.append(f"tensor '{key}' belongs to none of the layers in the config")
        else:
            saved[path].weights[key.removeprefix(f"{path}/")] = array
    return saved, problems


def _read_config(folder: Path) -> JSON:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            hint = ""
            if (folder / "adapter_model.bin").is_file():
                hint = " Save it again with PEFT's `save_pretrained(safe_serialization=True)`."
            raise FileNotFoundError(f"Expected {name} in {folder}: it is not there.{hint}")
    return read_json(folder / CONFIG_NAME)


def _raise_at(problems: Sequence[str], folder: Path) -> None:
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(
            f"The adapter in {folder} does not fit the model, {len(problems)} differences:\n"
            f"  {shown}{more}\nCheck that adapter and model belong together."
        )
