"""Adapters that KerasHub's `save_lora_weights` has written, given to a KerasHub model."""

from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from functional_llm.graph.keras_private import nested_layers
from functional_llm.graph.types import Layer

_PARTS = ("lora_kernel_a", "lora_kernel_b")


def load_lora(model: keras.Model, path: Path) -> None:
    """Enables LoRA in the layers of a file, and gives them its values.

    KerasHub counts the layers with weights, and loads by that number: in a model in which they come
    in another order, adapters get into the wrong layers without a word (keras-hub#2701). So here a
    number is turned into the path of a layer, and a file is refused unless all its layers can have
    LoRA, have the shapes of the file, and are the same ones in every decoder layer.

    Args:
        model: A KerasHub backbone without adapters.
        path: A file that ends in `.lora.h5`.

    Raises:
        ValueError: If the file is malformed, or is not of such a model.
    """
    found = _read(path)
    layers = [layer for layer in nested_layers(model) if layer.weights]
    by_name: dict[str, Layer] = {str(i): layer for i, layer in enumerate(layers)}
    by_name |= {layer.path: layer for layer in layers}
    problems = [f"no layer {name}" for name in found if name not in by_name]
    chosen = {name: by_name[name] for name in found if name in by_name}
    problems += [
        f"{layer.path} is a {type(layer).__name__}, which cannot have LoRA"
        for layer in chosen.values()
        if not hasattr(layer, "enable_lora")
    ]
    if not problems:
        problems = [*_wrong_shapes(chosen, found), *_uneven(chosen)]
    if problems:
        raise ValueError(
            f"{path}: expected adapters of such a {type(model).__name__}. Received: "
            f"{'; '.join(problems[:5])}. KerasHub counts layers, and counted others when it wrote "
            "the file. Load the file with KerasHub where it was written, and give the model there "
            "to `from_keras_hub`, which merges."
        )
    for name, layer in chosen.items():
        a, b = found[name]
        layer.enable_lora(a.shape[-1])
        layer.lora_kernel_a.assign(a)
        layer.lora_kernel_b.assign(b)


def _read(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns both parts of the adapter of each layer, by its number or path in the file."""
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if name.endswith(f"/vars/{_PARTS[0]}"):
            second = item.parent.get(_PARTS[1])
            if second is not None:
                found[name.removesuffix(f"/vars/{_PARTS[0]}")] = item[()], second[()]

    try:
        with h5py.File(path, "r") as file:
            if "lora" in file:
                file["lora"].visititems(visit)
    except OSError as error:
        raise ValueError(
            f"{path}: expected a file that KerasHub's save_lora_weights has written. Received: "
            f"{error}."
        ) from error
    if not found:
        raise ValueError(
            f"{path}: expected adapters that KerasHub's save_lora_weights has written. Received: a "
            "file without any."
        )
    return found


def _wrong_shapes(
    chosen: dict[str, Layer], found: dict[str, tuple[np.ndarray, np.ndarray]]
) -> list[str]:
    problems = []
    for name, layer in chosen.items():
        kernel, (a, b) = tuple(layer.kernel.shape), found[name]
        expected = (*kernel[:-1], a.shape[-1]), (a.shape[-1], kernel[-1])
        if (a.shape, b.shape) != expected:
            problems.append(
                f"{layer.path} has a kernel {kernel}, the file parts {a.shape} and {b.shape}"
            )
    return problems


def _uneven(chosen: dict[str, Layer]) -> list[str]:
    """Returns what is wrong unless every decoder layer has the same adapters."""
    inside: dict[str, set[str]] = {}
    for layer in chosen.values():
        top, _, rest = layer.path.partition("/")
        inside.setdefault(top, set()).add(rest)
    some = next(iter(inside.values()))
    return [
        f"{top} has other adapters than its siblings: {sorted(rest)}"
        for top, rest in inside.items()
        if rest != some
    ]
