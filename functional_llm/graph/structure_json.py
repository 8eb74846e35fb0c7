"""Nested structures as JSON, as the configs of composites store them."""

from collections.abc import Callable
from typing import Any

import keras

from functional_llm.graph.types import JSON, Nested


def _encode_spec(leaf: Any) -> Any:
    return leaf.get_config() if isinstance(leaf, keras.InputSpec) else None


def _decode_spec(leaf: Any) -> Any:
    return 0 if leaf is None else keras.InputSpec.from_config(leaf)


def encode(value: Nested, leaf: Callable[[Any], Any] = _encode_spec) -> JSON | None:
    """Returns a structure of InputSpecs (or of anything) as JSON.

    Keras's own serialization turns tuples into lists, and JSON turns all keys into strings.

    Args:
        value: Nested structure.
        leaf: Leaf -> JSON. By default, of leaves that are no InputSpecs only the place is kept.
    """
    if value is None:
        return None
    if isinstance(value, dict):
        return {"dict": [[key, encode(x, leaf)] for key, x in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [encode(x, leaf) for x in value]}
    return {"leaf": leaf(value)}


def decode(config: JSON | None, leaf: Callable[[Any], Any] = _decode_spec) -> Nested:
    """Returns the structure that `encode` wrote.

    Args:
        config: What it returned.
        leaf: JSON -> leaf. By default, leaves that are no InputSpecs become 0.
    """
    if config is None:
        return None
    ((kind, value),) = config.items()
    if kind == "dict":
        return {key: decode(x, leaf) for key, x in value}
    if kind in ("list", "tuple"):
        values = [decode(x, leaf) for x in value]
        return tuple(values) if kind == "tuple" else values
    return leaf(value)
