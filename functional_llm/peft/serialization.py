"""A model's adapters as JSON, and the same adapters on another model."""

from collections.abc import Sequence
from graphlib import TopologicalSorter
from typing import Any, TypeAlias

import keras
from keras import ops

from functional_llm.graph.selection import walk
from functional_llm.graph.types import JSON, Layer
from functional_llm.peft.adapter import Adapter, activate, find_adapters, join

_PACKAGE = "functional_llm>"


def adapters_to_config(model: keras.Model) -> list[JSON]:
    """Returns name, class, layers and options of each adapter, in the order of attaching."""
    configs: dict[_Part, JSON] = {}
    below: dict[_Part, set[_Part]] = {}  # the parts that must be attached before
    for path, adapter in find_adapters(model):
        part = _part_of(adapter)
        config = configs.setdefault(
            part,
            {
                "adapter_name": adapter.adapter_name,
                "method": part[1],
                "dtype": adapter.dtype,
                "active": (weight := float(ops.convert_to_numpy(adapter.gate.value))) != 0,
                **({} if weight in (0, 1) else {"weight": weight}),
                "layers": {},
            },
        )
        config["layers"][path] = adapter.get_options()
        below.setdefault(part, set()).update(map(_part_of, list(adapter.chain())[1:]))
    return [configs[part] for part in TopologicalSorter(below).static_order()]


# What one adapter has of one class, in one direction of an embedding.
_Part: TypeAlias = tuple[str, str, bool | None]


def _part_of(adapter: Adapter) -> _Part:
    method = keras.saving.get_registered_name(type(adapter)).removeprefix(_PACKAGE)
    return adapter.adapter_name, method, adapter.reverse


def attach_from_config(model: keras.Model, configs: Sequence[JSON]) -> keras.Model:
    """Returns a model with the adapters that `adapters_to_config` has written down.

    Raises:
        ValueError: If a class is not known here, or the model has no such layers.
    """
    for config in configs:
        if missing := sorted(set(config["layers"]) - {path for path, _ in walk(model)}):
            raise ValueError(f"The model has no layers {missing}, which the file has adapters for.")
        model = _attach_one(model, _find_class(config["method"]), config)
    if configs:
        active = [config for config in configs if config["active"]]
        activate(model, {x["adapter_name"]: x.get("weight", 1.0) for x in active})
    return model


def _attach_one(model: keras.Model, method: type[Adapter], config: JSON) -> keras.Model:
    layers = config["layers"]

    def make(layer: Layer, path: str, **kwargs: Any) -> Adapter:
        return method(layer, **layers[path], **kwargs)

    return join(model, make, list(layers), config["adapter_name"], dtype=config["dtype"])


def _find_class(name: str) -> type[Adapter]:
    for full in (f"{_PACKAGE}{name}", name):
        cls = keras.saving.get_registered_object(full)
        if isinstance(cls, type) and issubclass(cls, Adapter):
            return cls
    raise ValueError(
        f"The file has an adapter of the class '{name}', which is not known here. Import the "
        "module that defines it, with `@keras.saving.register_keras_serializable()` on it."
    )
