"""The nested inputs and outputs of a graph: describing, matching, flattening them."""

from collections.abc import Iterable
from typing import Any

import keras
from keras import tree


class Structure:
    """What a graph takes and returns.

    Args:
        inputs: Nested structure of `keras.InputSpec`, `None` where an input is absent.
        outputs: Nested structure of any leaves.
    """

    def __init__(self, inputs: Any, outputs: Any) -> None:
        self.inputs = inputs
        self.outputs = outputs

    def match(self, values: Any, name: str) -> Any:
        """Returns `values` in the exact structure of the inputs; `None` may stand for a subtree.

        Args:
            values: What the layer was called with.
            name: The layer's name, for messages.

        Raises:
            ValueError: If structures differ, a required input is `None`, or an input is given that
                was absent when the graph was traced.
        """
        return _match(self.inputs, values, name, ())

    def present(self, values: Any) -> list[Any]:
        """Returns the flat list of those leaves that the graph takes."""
        specs = tree.flatten(self.inputs)
        if len(specs) == 1:
            return [values] if tree.is_nested(values) is False else tree.flatten(values)
        return [x for x, spec in zip(tree.flatten(values), specs, strict=True) if spec is not None]

    def pack(self, outputs: Any) -> Any:
        """Returns the graph's flat outputs in their structure."""
        return tree.pack_sequence_as(self.outputs, tree.flatten(outputs))

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {"inputs": serialize(self.inputs), "outputs": serialize(self.outputs)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Structure":
        deserialize = keras.saving.deserialize_keras_object
        return cls(deserialize(config["inputs"]), deserialize(config["outputs"]))


def dotted(path: Iterable[Any]) -> str:
    """Returns a path in a nested structure as words: `("cache", 0)` -> "cache.0"."""
    return ".".join(str(part) for part in path) or "the input"


def _match(spec: Any, value: Any, name: str, path: tuple[Any, ...]) -> Any:
    here = f"Input '{dotted(path)}' of '{name}'"
    if isinstance(spec, dict):
        if value is not None and (not isinstance(value, dict) or set(value) != set(spec)):
            raise ValueError(f"{here}: expected a dict with keys {list(spec)}, {_received(value)}.")
        return {k: _match(s, value and value[k], name, (*path, k)) for k, s in spec.items()}
    if isinstance(spec, (list, tuple)):
        if value is not None and not _same_length(value, spec):
            raise ValueError(f"{here}: expected {len(spec)} values in a list, {_received(value)}.")
        values = [None] * len(spec) if value is None else value
        matched = [_match(s, v, name, (*path, i)) for i, (s, v) in enumerate(zip(spec, values))]
        return matched if isinstance(spec, list) else tuple(matched)
    if tree.is_nested(value):
        raise ValueError(f"{here}: expected one tensor, {_received(value)}.")
    if value is None and spec is not None and not spec.optional:
        raise ValueError(f"{here} is required: expected a tensor, received None.")
    if value is not None and spec is None:
        raise ValueError(
            f"{here} was None when the layer was built, and stays absent; {_received(value)}. To "
            "give it or not, set `layer.input_spec` with InputSpec(shape=..., optional=True) "
            "before the first call, or call the layer on a keras.Input(..., optional=True)."
        )
    return value


def _same_length(value: Any, spec: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == len(spec)


def _received(value: Any) -> str:
    if isinstance(value, dict):
        return f"received a dict with keys {list(value)}"
    if isinstance(value, (list, tuple)):
        return f"received a {type(value).__name__} of {len(value)}"
    return f"received {type(value).__name__} of shape {getattr(value, 'shape', None)}"


def describe(x: Any, dtype: str | None = None) -> keras.InputSpec | None:
    """Returns the InputSpec of a tensor: any batch size, optional if its `keras.Input` is.

    Args:
        x: Symbolic tensor, array, InputSpec or `None` (which stays `None`).
        dtype: The dtype to note. Defaults to the tensor's.
    """
    if x is None or isinstance(x, keras.InputSpec):
        return x
    if isinstance(x, keras.KerasTensor):
        return keras.InputSpec(shape=x.shape, dtype=dtype or x.dtype, optional=_is_optional(x))
    tensor = keras.ops.convert_to_tensor(x)
    dtype = dtype or keras.backend.standardize_dtype(tensor.dtype)
    shape = tuple(tensor.shape)
    return keras.InputSpec(shape=(None, *shape[1:]) if shape else (), dtype=dtype)


def _is_optional(x: keras.KerasTensor) -> bool:
    """Private Keras: no public way leads from a tensor to its `keras.Input`'s `optional`."""
    history = getattr(x, "_keras_history", None)
    return history is not None and getattr(history.operation, "optional", False)


def specs_of(shapes: Any, dtype: str) -> Any:
    """Returns a nested structure of InputSpecs for shapes, tensors or InputSpecs.

    Args:
        shapes: Nested structure; a tuple or list of ints and `None` is one shape.
        dtype: The dtype where only a shape is given.
    """
    if shapes is None or hasattr(shapes, "shape"):
        return describe(shapes)
    if isinstance(shapes, dict):
        return {key: specs_of(value, dtype) for key, value in shapes.items()}
    if shapes and all(x is None or isinstance(x, int) for x in shapes):
        return keras.InputSpec(shape=tuple(shapes), dtype=dtype)
    return type(shapes)(specs_of(x, dtype) for x in shapes)


def merge(specs: Any, declared: Any, name: str) -> Any:
    """Returns `specs` with what the user declared by hand on `layer.input_spec`.

    Raises:
        ValueError: If there are not as many declared as received.
    """
    if declared is None:
        return specs
    flat, flat_declared = tree.flatten(specs), tree.flatten(declared)
    if len(flat) != len(flat_declared):
        raise ValueError(
            f"'{name}' declares {len(flat_declared)} inputs in `input_spec`, received {len(flat)}."
        )
    merged = []
    for spec, by_hand in zip(flat, flat_declared):
        if by_hand is None or (spec is None and not (by_hand.optional and by_hand.shape)):
            merged.append(spec)
            continue
        shape = by_hand.shape if spec is None else spec.shape
        dtype = by_hand.dtype or (keras.config.floatx() if spec is None else spec.dtype)
        optional = bool(by_hand.optional) or (spec is not None and spec.optional)
        merged.append(keras.InputSpec(shape=shape, dtype=dtype, optional=optional))
    return tree.pack_sequence_as(specs, merged)


def make_inputs(specs: Any, names: Any = None) -> Any:
    """Returns `keras.Input`s for InputSpecs, named by their path in the structure.

    Args:
        specs: Nested structure of InputSpecs, `None` where no input shall be.
        names: The same structure of names, to use them instead.
    """
    given = None if names is None else tree.flatten(names)

    def make(index: int, path: tuple[Any, ...], spec: keras.InputSpec | None) -> Any:
        if spec is None:
            return None
        name = given[index] if given else "_".join(["input", *(str(part) for part in path)])
        return keras.Input(
            batch_shape=spec.shape, dtype=spec.dtype, name=name, optional=bool(spec.optional)
        )

    flat = tree.flatten_with_path(specs)
    inputs = [make(i, path, spec) for i, (path, spec) in enumerate(flat)]
    return tree.pack_sequence_as(specs, inputs)
