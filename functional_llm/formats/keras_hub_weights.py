"""The weights of KerasHub's models: in the files of a preset, and in a model in memory."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import keras
import ml_dtypes
import numpy as np

from functional_llm.files.json_files import read_json
from functional_llm.formats.tensor_source import TensorSource, with_names
from functional_llm.graph.types import Layer

FILE, INDEX = "model.weights.h5", "model.weights.json"
# The state of random generators, as of dropout.
RANDOM_STATES = "*/seed_generator/vars/*"


class KerasHubFiles:
    """The weights of a preset: one file, or several with an index.

    Args:
        folder: Of the preset.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or of an older format.
    """

    def __init__(self, folder: Path) -> None:
        self._files = [_open(path) for path in _weight_files(folder)]

    @cached_property
    def _tensors(self) -> dict[str, h5py.Dataset]:
        found: dict[str, h5py.Dataset] = {}

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                found[name] = item

        for file in self._files:
            file.visititems(visit)
        return found

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by its place."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, dtype: str) -> np.ndarray:
        """Returns one tensor in a dtype."""
        tensor = self._tensors[name]
        array = tensor[()]
        if tensor.attrs.get("dtype") == "bfloat16":  # HDF5 has no such numbers
            array = array.view(ml_dtypes.bfloat16)
        return array.astype(dtype, copy=False)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / FILE).is_file() or not (folder / INDEX).is_file():
        paths = [folder / FILE]
    else:
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(f"{folder / INDEX}: expected a weight_map. Fetch the file again.")
        lists = (x if isinstance(x, list) else [x] for x in index.values())
        names = sorted({str(name) for some in lists for name in some})
        paths = [folder / Path(name).name for name in names]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"The KerasHub preset lacks {path.name}: nothing is at {path}. Fetch the preset "
                "again, all of it."
            )
    return paths


def _open(path: Path) -> h5py.File:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(
            f"{path} is malformed. Expected: a file of weights that Keras has written (HDF5). "
            f"Received: {error}. Fetch the file again."
        ) from error
    if "layers" not in file:
        raise ValueError(
            f"{path}: expected the weights of a KerasHub backbone as Keras 3 saves them. Received: "
            f"{sorted(file)[:5]}, the format of an older version. Load the preset with the version "
            "of KerasHub that wrote it and save it with the present one (`save_to_preset`)."
        )
    return file


def numbered(source: TensorSource, names: Sequence[str]) -> TensorSource:
    """Returns the weights under places in which the first layer of a kind has the number 0.

    Args:
        source: The weights; Keras leaves out the number of the first.
        names: The places that a model needs.
    """
    needed = {name.replace("_0/", "/"): name for name in names}
    return with_names(source, lambda name: needed.get(name, name))


@dataclass
class KerasHubLayers:
    """The weights of a KerasHub model in memory, those that LoRA adds merged.

    Args:
        model: The backbone.
        names: The places that are needed.
        encoders: Places of layers whose weights are not needed.

    Raises:
        ValueError: If the model is quantized, or has weights that are at none of the places.
    """

    model: keras.Model
    names: Sequence[str]
    encoders: Sequence[str] = ()
    layers: dict[str, Layer] = field(init=False)  # by their place

    def __post_init__(self) -> None:
        self.layers = find_layers(self.model, [layer_place(name) for name in self.names])
        quantized = sorted({x.quantization_mode for x in self.layers.values()} - {None})
        if quantized:
            raise ValueError(
                f"Expected a KerasHub model in floating point. Received: one quantized to "
                f"{', '.join(quantized)}. Load it again without quantizing it."
            )
        known = {**self.layers, **find_layers(self.model, self.encoders)}
        found = {id(weight) for layer in known.values() for weight in layer.weights}
        unknown = [weight.path for weight in self.model.weights if id(weight) not in found]
        if unknown:
            raise ValueError(
                f"Expected a KerasHub {type(self.model).__name__} as its class makes it. Received: "
                f"one with the unknown weights {unknown[:5]}."
            )

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for place, layer in self.layers.items():
            store: dict[str, Any] = {}
            layer.save_own_variables(store)
            found |= {f"{place}/vars/{key}": value for key, value in store.items()}
        return found

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by its place."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, dtype: str) -> np.ndarray:
        """Returns one tensor in a dtype."""
        return keras.ops.convert_to_numpy(self._tensors[name]).astype(dtype, copy=False)

    def assign(self, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
        """Gives every weight its value.

        Args:
            tensors: Place and value of each.
        """
        stores: dict[str, dict[str, np.ndarray]] = {}
        left = {place: sum(layer_place(x) == place for x in self.names) for place in self.layers}
        for name, array in tensors:
            place = layer_place(name)
            stores.setdefault(place, {})[name.rpartition("/")[2]] = array
            left[place] -= 1
            if not left[place]:
                self.layers[place].load_own_variables(stores.pop(place))


def layer_place(name: str) -> str:
    """Returns the place of the layer that has the weight at a place."""
    return name.rpartition("/vars/")[0]


def find_layers(model: keras.Model, places: Sequence[str]) -> dict[str, Layer]:
    """Returns the layers at some places."""
    found = {}
    for place in places:
        layer: Any = model
        for part in place.split("/"):
            inside = _by_kind(layer) if isinstance(layer, list) else {}
            layer = inside.get(part, getattr(layer, part, None))
        if layer is None:
            raise ValueError(
                f"Expected the layer {place} in KerasHub's {type(model).__name__}. "
                "Received: none, so this is a version of KerasHub that is not known here. Install "
                "keras-hub 0.32."
            )
        found[place] = layer
    return found


def _by_kind(layers: Sequence[Layer]) -> dict[str, Layer]:
    """Returns the layers of a list by their kind and number; the first may lack the number."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(_snake_case(type(layer).__name__), []).append(layer)
    numbered = {f"{kind}_{i}": x for kind, some in kinds.items() for i, x in enumerate(some)}
    return {**numbered, **{kind: some[0] for kind, some in kinds.items()}}


def _snake_case(name: str) -> str:
    """Returns the name of a class as Keras writes it into files of weights."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
