"""A model's adapters as JSON, and the same adapters on another model."""

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Any

import keras
from keras import ops

from functional_llm.peft.adapter import Adapter, activate, attach, find_adapters

_PACKAGE = "functional_llm>"


def describe_adapters(model: Any) -> list[dict[str, Any]]:
    """Returns name, class, layers and options of each adapter, in the order of attaching."""
    described: dict[str, dict[str, Any]] = {}
    below: dict[str, set[str]] = {}  # names that must be attached before
    for path, adapter in find_adapters(model):
        name = adapter.adapter_name
        one = described.setdefault(
            name,
            {
                "adapter_name": name,
                "method": keras.saving.get_registered_name(type(adapter)).removeprefix(_PACKAGE),
                "dtype": adapter.dtype,
                "active": bool(ops.convert_to_numpy(adapter.gate.value)),
                "layers": {},
            },
        )
        one["layers"][path] = adapter.get_options()
        below.setdefault(name, set()).update(x.adapter_name for x in list(adapter.chain())[1:])
    return [described[name] for name in TopologicalSorter(below).static_order()]


def attach_described(model: Any, described: Sequence[Mapping[str, Any]]) -> Any:
    """Returns a model with adapters as `describe_adapters` has described them.

    Raises:
        ValueError: At a class that is not known here, or that the model has no such layers.
    """
    for one in described:
        model = _attach_one(model, _find_class(one["method"]), one)
    if described:
        activate(model, [one["adapter_name"] for one in described if one["active"]])
    return model


def _attach_one(model: Any, cls: type[Adapter], one: Mapping[str, Any]) -> Any:
    layers = one["layers"]

    def make(layer: Any, path: str, **kwargs: Any) -> Adapter:
        return cls(layer, dtype=one["dtype"], **layers[path], **kwargs)

    return attach(model, make, lambda _, path: path in layers, one["adapter_name"])


def _find_class(name: str) -> type[Adapter]:
    for full in (f"{_PACKAGE}{name}", name):
        cls = keras.saving.get_registered_object(full)
        if isinstance(cls, type) and issubclass(cls, Adapter):
            return cls
    raise ValueError(
        f"The file has an adapter of the class '{name}', which is not known here. Import the "
        "module that defines it, with `@keras.saving.register_keras_serializable()` on it."
    )
