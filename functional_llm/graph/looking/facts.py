"""What there is to know of one layer: its weights, its config."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import keras

from functional_llm.graph.own_weights import OwnWeight
from functional_llm.graph.selection import inner_layers
from functional_llm.graph.types import JSON, Layer

# What each of equal layers has of its own.
_OWN = {"name", "seed", "trainable", "shared_object_id", "build_config", "quantization_config"}
_LONGEST = 300  # characters of one value


@dataclass(frozen=True)
class Weight:
    """A variable, as it is shown.

    Args:
        name: Its path inside its layer.
        shape: Its shape.
        dtype: Its dtype.
        trainable: Whether it trains in the model that is looked at.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.name} {' × '.join(map(str, self.shape)) or 'scalar'} {self.dtype}"


def weights_of(layer: Layer, trainable: Collection[int]) -> list[Weight]:
    """Returns the weights of a layer, each once.

    Args:
        layer: The layer.
        trainable: The ids of the variables that train.
    """
    unique = {id(v): v for v in layer.weights}
    return [
        Weight(_name(layer, v), tuple(v.shape), str(v.dtype), key in trainable)
        for key, v in unique.items()
    ]


def _name(layer: Layer, variable: keras.Variable) -> str:
    _, found, inner = variable.path.rpartition(f"{layer.name}/")
    return inner if found else variable.name


def config_of(layer: Layer) -> JSON:
    """Returns the config of a layer, without what its graph and its weights say already.

    A layer whose config cannot be had is shown without one: what a user's class raises there is no
    reason to show nothing at all.
    """
    if type(layer).__name__ == "CompositeLayer" or isinstance(layer, (keras.Model, OwnWeight)):
        return {}
    try:
        config = layer.get_config()
    except Exception as error:
        return {"config": f"not available: {type(error).__name__}"}
    if not isinstance(config, dict):  # one of KerasHub's encoder of images returns none
        return {"config": f"not available: received {type(config).__name__}"}
    hidden = {"name", "trainable", "body", "shared_object_id"}
    shown = {k: _short(x) for k, x in config.items() if k not in hidden and x is not None}
    return {**shown, "dtype": layer.dtype_policy.name}


def _short(value: Any) -> Any:
    """Returns a value as JSON that a reader can take in."""
    if isinstance(value, dict) and isinstance(value.get("class_name"), str):
        inner = value.get("config")
        inner = inner if isinstance(inner, dict) else {}
        if value["class_name"] == "DTypePolicy":
            return inner.get("name")
        given = {key: x for key, x in inner.items() if key not in _OWN and x is not None}
        value = f"{value['class_name']}({', '.join(f'{k}={_short(x)}' for k, x in given.items())})"
    if value is None or isinstance(value, (bool, int, float)):
        return value
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"


def key_of(layer: Layer) -> str:
    """Returns what layers that compute the same have in common, weights aside."""
    config = {k: x for k, x in config_of(layer).items() if k not in _OWN and "initializer" not in k}
    return f"{type(layer).__module__}.{type(layer).__qualname__} {config}"


def quantization_of(layer: Layer) -> str:
    """Returns how the weights of a leaf are quantised, such as `int8`; empty if they are not."""
    mode = None if inner_layers(layer) is not None else getattr(layer, "quantization_mode", None)
    return str(mode or "")
