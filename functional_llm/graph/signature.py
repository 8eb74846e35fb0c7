"""The nested inputs and outputs of a graph: describing, matching, flattening, storing them."""

import numbers
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
        self._taken = [spec is not None for spec in tree.flatten(inputs)]

    def match(self, values: Any, name: str) -> Any:
        """Returns `values` in the exact structure of the inputs; `None` may stand for a subtree.

        Args:
            values: What the layer was called with.
            name: The layer's name, for messages.

        Raises:
            ValueError: If structures, ranks or kinds of numbers differ, a required input is
                `None`, or an input is given that was absent when the graph was traced.
        """
        return _match(self.inputs, values, name, ())

    def present(self, values: Any) -> list[Any]:
        """Returns the flat list of those leaves that the graph takes."""
        return [x for x, taken in zip(tree.flatten(values), self._taken, strict=True) if taken]

    def masks(self, mask: Any, name: str) -> list[Any] | None:
        """Returns one mask, or `None`, for each input the graph takes; `None` if there is none.

        Raises:
            ValueError: If the masks do not come in the structure of the inputs.
        """
        if mask is None:
            return None
        if len(tree.flatten(mask)) != len(self._taken):
            raise ValueError(
                f"`mask` of '{name}': expected the structure of the inputs ({len(self._taken)} "
                f"leaves), {_received(mask)}. Give None for an input without a mask."
            )
        masks = self.present(mask)
        return None if all(m is None for m in masks) else masks

    def pack(self, outputs: Any) -> Any:
        """Returns the graph's flat outputs in their structure."""
        return tree.pack_sequence_as(self.outputs, tree.flatten(outputs))

    def get_config(self) -> dict[str, Any]:
        return {"inputs": encode(self.inputs), "outputs": encode(self.outputs)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Structure":
        return cls(decode(config["inputs"]), decode(config["outputs"]))


def encode(value: Any) -> dict[str, Any] | None:
    """Returns a structure of InputSpecs (or of anything) as JSON.

    Keras's own serialization turns tuples into lists, and JSON turns all keys into strings.
    """
    if value is None:
        return None
    if isinstance(value, dict):
        return {"dict": [[key, encode(x)] for key, x in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [encode(x) for x in value]}
    return {"leaf": value.get_config() if isinstance(value, keras.InputSpec) else None}


def decode(config: dict[str, Any] | None) -> Any:
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


def dotted(path: Iterable[Any]) -> str:
    """Returns a path in a nested structure as words: `("cache", 0)` -> "cache.0"."""
    return ".".join(str(part) for part in path)


def _match(spec: Any, value: Any, name: str, path: tuple[Any, ...]) -> Any:
    # Runs at every call of every composite: a message is put together only when it is needed.
    if isinstance(spec, dict):
        if value is None:
            value = dict.fromkeys(spec)
        elif not isinstance(value, dict) or value.keys() != spec.keys():
            raise _error(name, path, f"expected a dict with keys {list(spec)}, {_received(value)}.")
        return {k: _match(s, value[k], name, (*path, k)) for k, s in spec.items()}
    if isinstance(spec, (list, tuple)):
        if value is None:
            value = [None] * len(spec)
        elif not isinstance(value, (list, tuple)) or len(value) != len(spec):
            raise _error(
                name, path, f"expected a list or tuple of {len(spec)}, {_received(value)}."
            )
        pairs = enumerate(zip(spec, value, strict=True))
        matched = [_match(s, v, name, (*path, i)) for i, (s, v) in pairs]
        return tuple(matched) if isinstance(spec, tuple) else matched
    if spec is None:
        return _match_absent(value, name, path)
    if value is None:
        if spec.optional:
            return None
        raise _error(
            name,
            path,
            f"is required: expected a tensor of shape {spec.shape}, received None. If it may be "
            f"left out, {_HOW_TO_DECLARE}.",
        )
    if isinstance(value, (dict, list, tuple)):
        raise _error(name, path, f"expected one tensor, {_received(value)}.")
    _check_tensor(spec, value, name, path)
    return value


def _match_absent(value: Any, name: str, path: tuple[Any, ...]) -> None:
    if any(x is not None for x in tree.flatten(value)):
        raise _error(
            name,
            path,
            f"was None when the layer was built, and stays absent: expected None, "
            f"{_received(value)}. To give it in some calls and not in others, {_HOW_TO_DECLARE}.",
        )


def _check_tensor(spec: keras.InputSpec, value: Any, name: str, path: tuple[Any, ...]) -> None:
    """Stops what a Functional would let pass: it squeezes ranks and casts numbers silently."""
    shape = getattr(value, "shape", None)
    if shape is not None and len(shape) != len(spec.shape):
        raise _error(
            name, path, f"expected rank {len(spec.shape)} (shape {spec.shape}), {_received(value)}."
        )
    dtype = getattr(value, "dtype", None)
    if dtype is None or dtype == spec.dtype:
        return
    dtype = keras.backend.standardize_dtype(dtype)
    to_float = keras.backend.is_float_dtype(spec.dtype)
    from_float = keras.backend.is_float_dtype(dtype)
    too_narrow = to_float and keras.backend.is_int_dtype(dtype) and spec.dtype not in _WIDE_FLOATS
    if too_narrow or (from_float and not to_float):
        raise _error(
            name,
            path,
            f"was built for {spec.dtype}, in which {dtype} loses digits. Cast the input, "
            f"or build the layer with InputSpec(shape=..., dtype='{dtype}'). A Sequential model "
            f"casts to {keras.config.floatx()} unless it begins with keras.Input(..., dtype=...).",
        )


_WIDE_FLOATS = ("float32", "float64")
_HOW_TO_DECLARE = (
    "call the layer the first time on a keras.Input(..., optional=True), or set `layer.input_spec` "
    "with InputSpec(shape=..., optional=True) before that"
)


def _error(name: str, path: tuple[Any, ...], message: str) -> ValueError:
    where = f"Input '{dotted(path)}'" if path else "The input"
    return ValueError(f"{where} of '{name}' {message}")


def _received(value: Any) -> str:
    if isinstance(value, dict):
        return f"received a dict with keys {list(value)}"
    if isinstance(value, (list, tuple)):
        return f"received a {type(value).__name__} of {len(value)}"
    return f"received a {type(value).__name__} of shape {getattr(value, 'shape', None)}"


def describe(x: Any) -> keras.InputSpec | None:
    """Returns the InputSpec of a tensor, optional if its `keras.Input` is.

    Args:
        x: Symbolic tensor, array (any batch size shall do), InputSpec or `None` (stays `None`).
    """
    if x is None or isinstance(x, keras.InputSpec):
        return x
    if isinstance(x, keras.KerasTensor):
        return keras.InputSpec(shape=x.shape, dtype=x.dtype, optional=_is_optional(x))
    tensor = keras.ops.convert_to_tensor(x)
    shape = tuple(tensor.shape)
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return keras.InputSpec(shape=(None, *shape[1:]) if shape else (), dtype=dtype)


def _is_optional(x: keras.KerasTensor) -> bool:
    """Private Keras: no public way leads from a tensor to its `keras.Input`'s `optional`."""
    history = getattr(x, "_keras_history", None)
    return history is not None and getattr(history.operation, "optional", False)


class Described:
    """A structure of InputSpecs in which `[None, None]` is two absent inputs, not a shape."""

    def __init__(self, specs: Any) -> None:
        self.specs = specs


def specs_of(shapes: Any, dtype: str) -> Any:
    """Returns a nested structure of InputSpecs for shapes, tensors or InputSpecs.

    Args:
        shapes: Nested structure; a tuple or list of ints and `None` is one shape, except in a
            `Described`, which is taken as it is.
        dtype: The dtype where only a shape is given.
    """
    if isinstance(shapes, Described):
        return shapes.specs
    if shapes is None or hasattr(shapes, "shape"):
        return describe(shapes)
    if isinstance(shapes, dict):
        return {key: specs_of(value, dtype) for key, value in shapes.items()}
    is_shape = all(x is None or isinstance(x, numbers.Integral) for x in shapes)
    if is_shape and (len(shapes) > 0 or isinstance(shapes, tuple)):
        return keras.InputSpec(shape=tuple(shapes), dtype=dtype)
    specs = [specs_of(x, dtype) for x in shapes]
    return tuple(specs) if isinstance(shapes, tuple) else specs


def merge(specs: Any, declared: Any, name: str) -> Any:
    """Returns `specs` with what the user declared by hand on `layer.input_spec`.

    Raises:
        ValueError: If there are not as many declared as received, or a required one is `None`.
    """
    if declared is None:
        return specs
    specs = _spread(specs, declared)
    flat, flat_declared = tree.flatten_with_path(specs), tree.flatten(declared)
    if len(flat) != len(flat_declared):
        raise ValueError(
            f"'{name}' declares {len(flat_declared)} inputs in `input_spec`, received {len(flat)}."
        )
    merged = []
    for (path, spec), by_hand in zip(flat, flat_declared, strict=True):
        if spec is None and by_hand is not None and not by_hand.optional:
            raise _error(name, path, "is required: expected a tensor, received None.")
        if by_hand is None or (spec is None and by_hand.shape is None):
            merged.append(spec)
            continue
        shape = by_hand.shape if spec is None else spec.shape
        dtype = by_hand.dtype or (keras.config.floatx() if spec is None else spec.dtype)
        optional = bool(by_hand.optional) or (spec is not None and spec.optional)
        merged.append(keras.InputSpec(shape=shape, dtype=dtype, optional=optional))
    return tree.pack_sequence_as(specs, merged)


def _spread(specs: Any, declared: Any) -> Any:
    """`None` for a whole subtree, as `None` for each of the inputs declared in it."""
    if specs is None:
        return tree.map_structure(lambda _: None, declared)
    if isinstance(specs, dict) and isinstance(declared, dict) and specs.keys() == declared.keys():
        return {key: _spread(spec, declared[key]) for key, spec in specs.items()}
    return specs


def with_float_dtype(specs: Any, dtype: str) -> Any:
    """Returns the specs as they are once a layer has cast floats to its compute dtype."""

    def cast(spec: keras.InputSpec | None) -> keras.InputSpec | None:
        if spec is None or not keras.backend.is_float_dtype(spec.dtype or "float32"):
            return spec
        return keras.InputSpec(shape=spec.shape, dtype=dtype, optional=bool(spec.optional))

    return tree.map_structure(cast, specs)


def make_inputs(specs: Any, names: list[str] | None = None) -> Any:
    """Returns `keras.Input`s for InputSpecs.

    Args:
        specs: Nested structure of InputSpecs, `None` where no input shall be.
        names: One for each leaf. Defaults to its path: "input.cache.0".
    """
    flat = tree.flatten_with_path(specs)
    if names is None:
        # Keras demands names that are unique in the graph: a dot is not in names it makes up, and
        # hardly in a user's.
        names = [f"input.{dotted(path) or 0}".replace("/", "_") for path, _ in flat]
        if len(set(names)) < len(names):
            names = [f"{name}.{i}" for i, name in enumerate(names)]
    inputs = [
        None
        if spec is None
        else keras.Input(
            batch_shape=spec.shape, dtype=spec.dtype, name=name, optional=bool(spec.optional)
        )
        for (_, spec), name in zip(flat, names, strict=True)
    ]
    return tree.pack_sequence_as(specs, inputs)


def layer_paths(layers: Iterable[Any], above: tuple[str, ...] = ()) -> dict[int, tuple[str, ...]]:
    """Returns the names that lead to each layer, by its id, into nested graphs."""
    paths: dict[int, tuple[str, ...]] = {}
    for layer in layers:
        path = (*above, layer.name)
        paths.setdefault(id(layer), path)
        for inner, inner_path in layer_paths(getattr(layer, "layers", ()), path).items():
            paths.setdefault(inner, inner_path)
    return paths


def layer_at(layers: Iterable[Any], path: Iterable[str]) -> Any:
    """Returns the layer that these names lead to, or `None`."""
    found = None
    for name in path:
        found = next((layer for layer in layers if layer.name == name), None)
        layers = getattr(found, "layers", ())
    return found
