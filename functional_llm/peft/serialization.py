"""A model's adapters as JSON, and the same adapters on another model."""

from collections.abc import Sequence
from graphlib import TopologicalSorter
from typing import Any

import keras
from keras import ops

from functional_llm.graph.types import JSON, Layer
from functional_llm.peft.adapter import Adapter, activate, attach, find_adapters

_PACKAGE = "functional_llm>"


def adapters_to_config(model: keras.Model) -> list[JSON]:
    """Returns name, class, layers and options of each adapter, in the order of attaching."""
    configs: dict[str, JSON] = {}
    below: dict[str, set[str]] = {}  # the names that must be attached before
    for path, adapter in find_adapters(model):
        name = adapter.adapter_name
        config = configs.setdefault(
            name,
            {
                "adapter_name": name,
                "method": keras.saving.get_registered_name(type(adapter)).removeprefix(_PACKAGE),
                "dtype": adapter.dtype,
                "active": bool(ops.convert_to_numpy(adapter.gate.value)),
                "layers": {},
            },
        )
        config["layers"][path] = adapter.get_options()
        below.setdefault(name, set()).update(x.adapter_name for x in list(adapter.chain())[1:])
    return [configs[name] for name in TopologicalSorter(below).static_order()]


def attach_from_config(model: keras.Model, configs: Sequence[JSON]) -> keras.Model:
    """Returns a model with the adapters that `adapters_to_config` has written down.

    Raises:
        ValueError: If a class is not known here, or the model has no such layers.
    """
    for config in configs:
        model = _attach_one(model, _find_class(config["method"]), config)
    if configs:
        activate(model, [config["adapter_name"] for config in configs if config["active"]])
    return model


def _attach_one(model: keras.Model, method: type[Adapter], config: JSON) -> keras.Model:
    layers = config["layers"]

    def make(layer: Layer, path: str, **kwargs: Any) -> Adapter:
        return method(layer, **layers[path], **kwargs)

    return attach(
        model,
        make,
        lambda _, path: path in layers,
        config["adapter_name"],
        dtype=config["dtype"],
    )


def _find_class(name: str) -> type[Adapter]:
    for full in (f"{_PACKAGE}{name}", name):
        cls = keras.saving.get_registered_object(full)
        if isinstance(cls, type) and issubclass(cls, Adapter):
            return cls
    raise ValueError(
        f"The file has an adapter of the class '{name}', which is not known here. Import the "
        "module that defines it, with `@keras.saving.register_keras_serializable()` on it."
    )
