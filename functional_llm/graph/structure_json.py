"""Nested structures of InputSpecs as JSON, as the configs of composites store them."""

import keras

from functional_llm.graph.types import JSON, Nested


def encode(value: Nested) -> JSON | None:
    """Returns a structure of InputSpecs (or of anything) as JSON.

    Keras's own serialization turns tuples into lists, and JSON turns all keys into strings.

    Args:
        value: Nested structure. Of leaves that are no InputSpecs only the place is kept.
    """
    if value is None:
        return None
    if isinstance(value, dict):
        return {"dict": [[key, encode(x)] for key, x in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [encode(x) for x in value]}
    return {"leaf": value.get_config() if isinstance(value, keras.InputSpec) else None}


def decode(config: JSON | None) -> Nested:
    """Returns the structure that `encode` wrote; leaves that are no InputSpecs become 0."""
    if config is None:
        return None
    ((kind, value),) = config.items()
    if kind == "dict":
        return {key: decode(x) for key, x in value}
    if kind in ("list", "tuple"):
        values = [decode(x) for x in value]
        return tuple(values) if kind == "tuple" else values
    return 0 if value is None else keras.InputSpec.from_config(value)
