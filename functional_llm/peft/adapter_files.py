"""Adapters on disk: PEFT's own format, and the same two files for methods that PEFT lacks."""

import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from functional_llm.files.json_files import read_json, write_json
from functional_llm.files.replacing import replaced_folder, share
from functional_llm.formats.model_card import CardFacts, ModelCard, write_card
from functional_llm.formats.safetensors_reader import open_safetensors
from functional_llm.formats.upload import push_saved
from functional_llm.graph.placing import assign
from functional_llm.graph.selection import walk
from functional_llm.graph.types import JSON, Layer, Tensor
from functional_llm.peft.adapter import (
    REVERSED,
    Adapter,
    adapter_names,
    find_adapters,
    join,
    origin_of,
)
from functional_llm.peft.linear import MATRIX_LAYERS, Linear
from functional_llm.peft.names import NamedModel, Names, to_numpy
from functional_llm.peft.peft_format import SavedAdapter, from_peft, to_peft
from functional_llm.peft.peft_values import tokens_from_peft, values_from_peft, values_to_peft
from functional_llm.peft.retrained import Retrained
from functional_llm.peft.tokens import TrainedTokens

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_FINGERPRINT = "fingerprint"


def save_adapter(
    model: keras.Model,
    folder: str | Path,
    adapter_name: str | None = None,
    facts: CardFacts | None = None,
) -> None:
    """Saves an adapter: `adapter_config.json` and `adapter_model.safetensors`.

    LoRA, rsLoRA, PiSSA, OLoRA, DoRA and IA3, with what `retrain` and `train_tokens` put beside
    them, are what PEFT loads with `PeftModel.from_pretrained`, or by itself with
    `AutoPeftModelForCausalLM` if Transformers can open the base. Any other method, yours included,
    is kept by the paths of the model's layers. The files of the base's tokenizer are put beside,
    if they are known, and a model card as README.md, unless somebody else's is there.

    Args:
        model: A model with adapters.
        folder: Where to; made if it is not there.
        adapter_name: Which one, if the model has several.
        facts: What the card says beside what is known: data, method, losses.

    Raises:
        ValueError: If the model has no such adapter, or several and none is named.
        OSError: If the folder cannot be written to: the disk is full, say.
    """
    names = adapter_names(model)
    if adapter_name is None and len(names) == 1:
        adapter_name = names[0]
    if adapter_name not in names:
        raise ValueError(f"Expected adapter_name to be one of {names}, received {adapter_name!r}.")
    adapters = [(p, x) for p, x in find_adapters(model) if x.adapter_name == adapter_name]
    named = NamedModel(model)
    beside = [(path, x) for path, x in adapters if isinstance(x, (Retrained, TrainedTokens))]
    method = [(path, x) for path, x in adapters if not isinstance(x, (Retrained, TrainedTokens))]
    classes = sorted({type(x).__name__ for _, x in method or beside})
    if len(classes) > 1:
        raise ValueError(f"Adapter '{adapter_name}' mixes {classes}. Expected one class.")
    # PEFT has one module for all experts' gate and up, which is not written yet.
    has_experts = any(x.linear is not None and x.linear.stack for _, x in method)
    if not method or method[0][1].peft_type is None or has_experts:
        if method and beside:
            raise ValueError(
                f"Adapter '{adapter_name}' has layers that are retrained beside {classes}, which "
                "PEFT does not know, or beside experts. Give them an `adapter_name` of their own."
            )
        config, tensors = _to_paths(dict(adapters), named)
    else:
        keyed = {f"{path}{REVERSED}" if x.reverse else path: x for path, x in method}
        config, tensors = to_peft(keyed, named)
        targets = {named.modules[path] for path in keyed}
        tensors |= values_to_peft(beside, config, targets, named)
    with replaced_folder(Path(folder)) as beside_folder:
        try:
            save_file(tensors, beside_folder / WEIGHTS_NAME, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{Path(folder, WEIGHTS_NAME)} could not be written: {error}.") from error
        share(beside_folder / WEIGHTS_NAME)
        write_json(beside_folder / CONFIG_NAME, config)
        named.names.write_tokenizer(beside_folder)
        card = _card(config, classes[0], Path(folder), named.names, facts or CardFacts())
        write_card(card, Path(folder), beside_folder)


def push_to_hub(
    model: keras.Model,
    repository: str,
    adapter_name: str | None = None,
    *,
    facts: CardFacts | None = None,
    private: bool | None = None,
    message: str = "Upload with functional_llm",
    token: str | None = None,
) -> str:
    """Saves an adapter as a repository of the Hugging Face Hub; returns its address.

    Args:
        model: As for `save_adapter`.
        repository: `"organisation/name"`; made if it is not there.
        adapter_name: As for `save_adapter`.
        facts: As for `save_adapter`.
        private: As for `flm.push_to_hub`.
        message: Of the commit.
        token: As for `flm.push_to_hub`.

    Raises:
        ValueError: As `save_adapter` and `flm.push_to_hub`.
        RuntimeError: As `flm.push_to_hub`.
    """
    return push_saved(
        lambda folder: save_adapter(model, folder, adapter_name, facts),
        repository,
        private=private,
        message=message,
        token=token,
    )


def _card(config: JSON, method: str, folder: Path, names: Names, facts: CardFacts) -> ModelCard:
    words = method
    if "r" in config:
        words += f", rank {config['r']}, alpha {config['lora_alpha']:g}"
    targets = config.get("target_modules")
    if isinstance(targets, list) and len(targets) < 10:
        words += f", on {', '.join(sorted({x.rpartition('.')[2] for x in targets}))}"
    return ModelCard(
        name=folder.absolute().name,
        base=config.get("base_model_name_or_path"),
        licence=names.licence,
        adapter=words,
        is_peft="registered_name" not in config,
        facts=facts,
        tags=[method.lower()],
    )


def _to_paths(
    adapters: Mapping[str, Adapter], model: NamedModel
) -> tuple[JSON, dict[str, np.ndarray]]:
    cls = type(next(iter(adapters.values())))
    config = {
        "peft_type": cls.__name__,
        "base_model_name_or_path": model.names.base,
        "registered_name": keras.saving.get_registered_name(cls),
        "layers": {path: adapter.get_options() for path, adapter in adapters.items()},
    }
    tensors = {
        f"{path}/{name}": np.ascontiguousarray(to_numpy(v))
        for path, adapter in adapters.items()
        for name, v in adapter.adapter_weights.items()
    }
    for path, adapter in adapters.items():
        if (numbers := adapter.fingerprint()) is not None:
            tensors[f"{path}/{_FINGERPRINT}"] = np.ascontiguousarray(numbers)
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
        folder: From `save_adapter`, or from PEFT's `save_pretrained` (LoRA, DoRA, IA3, and their
            `modules_to_save`, `bias` and `trainable_token_indices`; TRAINABLE_TOKENS).
        adapter_name: Another name for each adapter in one model.
        methods: Your own subclasses of `Adapter`, unless they are registered with
            `keras.saving.register_keras_serializable`.
        dtype: Of the adapter's weights.

    Raises:
        FileNotFoundError: If one of the two files is missing.
        ValueError: If the adapter does not fit the model, or was trained on other weights than
            its method allows (SVF). All differences are named.
    """
    folder = Path(folder)
    config = _read_config(folder)
    source = open_safetensors(folder / WEIGHTS_NAME)
    tensors = {name: source.read(name, "float32") for name in source.shapes}
    if adapter_name in adapter_names(model):
        raise ValueError(f"The model has an adapter '{adapter_name}'. Expected another name.")
    saved, problems = _read(config, tensors, model, methods, folder)
    leaves = dict(walk(model))
    for path, one in saved:
        kinds = Layer if one.cls is Retrained else MATRIX_LAYERS
        if path not in leaves or not isinstance(origin_of(leaves[path]), kinds):
            problems.append(f"the model has no linear layer '{path}'")
    if not saved and not problems:
        problems.append("it has no tensors")
    _raise_at(problems, folder, config)
    new_model = model
    for part in dict.fromkeys(_part(one.cls, one.options) for _, one in saved):
        here = {path: one for path, one in saved if _part(one.cls, one.options) == part}
        make = partial(_make, saved=here, problems=problems)
        new_model = join(new_model, make, list(here), adapter_name, dtype=dtype)
    _raise_at(problems, folder, config)
    weights = {(path, _part(one.cls, one.options)): one.weights for path, one in saved}
    found = [(path, x) for path, x in find_adapters(new_model) if x.adapter_name == adapter_name]
    own = [(path, x, weights[path, _part(type(x), x.get_options())]) for path, x in found]
    # Files of version 0.1 have none, of no layer.
    has_fingerprints = any(_FINGERPRINT in values for *_, values in own)
    lines = [line for one in own for line in _check_weights(*one, has_fingerprints)]
    _raise_at(lines, folder, config)
    for _, adapter, values in own:
        for name, variable in adapter.adapter_weights.items():
            assign(variable, values[name])
    _raise_at([line for one in own for line in _check_fingerprint(*one)], folder, config)
    if not has_fingerprints and any(_has_fingerprint(adapter) for _, adapter, _ in own):
        warnings.warn(
            f"{folder} does not say which weights it was trained on: it was written by version "
            "0.1. Whether they are the weights of this model is not checked. Save it again.",
            stacklevel=2,
        )
    return new_model


def _part(cls: type[Adapter], options: JSON) -> tuple[type[Adapter], bool | None]:
    """Returns what one layer of one adapter has at most one of."""
    return cls, options.get("reverse", False)


def _has_fingerprint(adapter: Adapter) -> bool:
    return type(adapter).fingerprint is not Adapter.fingerprint


def _check_fingerprint(path: str, adapter: Adapter, weights: Mapping[str, np.ndarray]) -> list[str]:
    if _FINGERPRINT not in weights:
        return []
    try:
        adapter.check_fingerprint(weights[_FINGERPRINT])
    except ValueError as error:
        return [f"{path}: {error}"]
    return []


def _read(
    config: JSON,
    tensors: Mapping[str, np.ndarray],
    model: keras.Model,
    methods: Sequence[type[Adapter]],
    folder: Path,
) -> tuple[list[tuple[str, SavedAdapter]], list[str]]:
    """Returns path and adapter of each layer in the order of attaching, and what does not fit."""
    if "registered_name" in config:
        by_path, problems = _from_paths(config, tensors, methods)
        return list(by_path.items()), problems
    if config.get("peft_type") not in ("LORA", "IA3", "TRAINABLE_TOKENS"):
        raise ValueError(
            f"{folder / CONFIG_NAME}: peft_type is {config.get('peft_type')!r:.200}. Expected "
            "LORA, IA3 or TRAINABLE_TOKENS, or a file from `save_adapter`."
        )
    if config["peft_type"] == "TRAINABLE_TOKENS":
        config, tensors = tokens_from_peft(config, tensors)
    named = NamedModel(model)
    try:
        saved, others, problems = from_peft(config, tensors, named)
    except re.error as error:
        raise ValueError(
            f"{folder / CONFIG_NAME}: expected regular expressions for modules, received "
            f"{error.pattern!r:.200} ({error})."
        ) from None
    if saved or not problems:
        beside, more = values_from_peft(config, others, named)
        saved, problems = [*beside, *saved], [*problems, *more]
    return saved, problems


def _make(
    layer: Layer,
    path: str,
    saved: Mapping[str, SavedAdapter],
    problems: list[str],
    **kwargs: Any,
) -> Adapter:
    try:
        return saved[path].cls(layer, **saved[path].options, **kwargs)
    except (TypeError, ValueError) as error:
        problems.append(f"{path}: {error}")
        return _Placeholder(layer, **kwargs)


class _Placeholder(Adapter):
    """Stands in the place of an adapter that could not be made, until all problems are known."""

    def make_weights(self, linear: Linear) -> None:
        pass

    def change(self, x: Tensor, training: bool | None = None) -> Tensor:
        return 0.0


def _check_weights(
    path: str, adapter: Adapter, weights: Mapping[str, np.ndarray], has_fingerprints: bool
) -> list[str]:
    if isinstance(adapter, _Placeholder):
        return []
    expected = {name: tuple(v.shape) for name, v in adapter.adapter_weights.items()}
    received = {name: array.shape for name, array in weights.items()}
    if has_fingerprints and _has_fingerprint(adapter):  # the method checks its shape
        expected[_FINGERPRINT] = received.get(_FINGERPRINT, ())
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


def _raise_at(problems: Sequence[str], folder: Path, config: JSON) -> None:
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        base = config.get("base_model_name_or_path")
        raise ValueError(
            f"The adapter in {folder} does not fit the model, {len(problems)} differences:\n"
            f"  {shown}{more}\nCheck that adapter and model belong together"
            + (f": it was made for {base}." if base else ".")
        )
