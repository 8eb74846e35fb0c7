"""The signature of a graph: which nested inputs it takes, and which nested outputs it returns."""

from typing import Self

import keras
from keras import tree

from functional_llm.graph.input_specs import Path, input_error
from functional_llm.graph.structure_json import decode, encode
from functional_llm.graph.types import JSON, Nested, Tensor


class Signature:
    """What a graph takes and returns.

    Args:
        inputs: Nested structure of `keras.InputSpec`, `None` where an input is absent.
        outputs: Nested structure of any leaves.
    """

    def __init__(self, inputs: Nested, outputs: Nested) -> None:
        self.inputs = inputs
        self.outputs = tree.map_structure(lambda _: 0, outputs)
        self._is_taken = [spec is not None for spec in tree.flatten(inputs)]
        self.input_spec = tree.map_structure(_spec_for_keras, inputs)

    def __deepcopy__(self, memo: object) -> Self:
        return self  # it never changes

    def match(self, values: Nested, name: str) -> Nested:
        """Returns `values` in the exact structure of the inputs; `None` may stand for a subtree.

        Args:
            values: What the layer was called with.
            name: The layer's name, for messages.

        Raises:
            ValueError: If structures, ranks, sizes that are not `None`, or kinds of numbers differ,
                a required input is `None`, or an input is given that was absent when the graph was
                traced.
        """
        return _match(self.inputs, values, name, ())

    def flatten_inputs(self, values: Nested) -> list[Tensor | None]:
        """Returns the flat list of those leaves that the graph takes."""
        return [x for x, taken in zip(tree.flatten(values), self._is_taken, strict=True) if taken]

    def flatten_masks(self, mask: Nested, name: str) -> list[Tensor | None] | None:
        """Returns one mask, or `None`, for each input the graph takes; `None` if there is none.

        Args:
            mask: Masks in the structure of the inputs.
            name: The layer's name, for messages.

        Raises:
            ValueError: If the masks do not come in the structure of the inputs.
        """
        if mask is None:
            return None
        if len(tree.flatten(mask)) != len(self._is_taken):
            raise ValueError(
                f"`mask` of '{name}': expected the structure of the inputs "
                f"({len(self._is_taken)} leaves), {_received(mask)}. Give None for an input "
                "without a mask."
            )
        masks = self.flatten_inputs(mask)
        return None if all(m is None for m in masks) else masks

    def with_known_sizes(self, values: Nested) -> Nested:
        """Returns symbolic inputs with the sizes that the graph was built with, where unknown."""

        def complete(x: Tensor, spec: keras.InputSpec | None) -> Tensor:
            if x is None or spec is None or None not in x.shape:
                return x
            shape = [b if a is None else a for a, b in zip(x.shape, spec.shape, strict=True)]
            return keras.KerasTensor(shape, x.dtype, x.sparse)

        return tree.map_structure(complete, values, self.inputs)

    def restore_outputs(self, outputs: Nested) -> Nested:
        """Returns the graph's flat outputs in the structure that the layer returns."""
        return tree.pack_sequence_as(self.outputs, tree.flatten(outputs))

    def get_config(self) -> JSON:
        return {"inputs": encode(self.inputs), "outputs": encode(self.outputs)}

    @classmethod
    def from_config(cls, config: JSON) -> Self:
        return cls(decode(config["inputs"]), decode(config["outputs"]))


def _match(spec: Nested, value: Nested, name: str, path: Path) -> Nested:
    # Runs at every call of every composite: a message is put together only when it is needed.
    if isinstance(spec, dict):
        if value is None:
            value = dict.fromkeys(spec)
        elif not isinstance(value, dict) or value.keys() != spec.keys():
            raise input_error(
                name, path, f"expected a dict with keys {list(spec)}, {_received(value)}."
            )
        return {k: _match(s, value[k], name, (*path, k)) for k, s in spec.items()}
    if isinstance(spec, (list, tuple)):
        if value is None:
            value = [None] * len(spec)
        elif not isinstance(value, (list, tuple)) or len(value) != len(spec):
            raise input_error(
                name, path, f"expected a list or tuple of {len(spec)}, {_received(value)}."
            )
        pairs = enumerate(zip(spec, value, strict=True))
        matched = [_match(s, v, name, (*path, i)) for i, (s, v) in pairs]
        return tuple(matched) if isinstance(spec, tuple) else matched
    if spec is None:
        return _match_absent(value, name, path)
    return _match_tensor(spec, value, name, path)


def _match_absent(value: Nested, name: str, path: Path) -> None:
    if any(x is not None for x in tree.flatten(value)):
        raise input_error(
            name,
            path,
            f"was None when the layer was built, and stays absent: expected None, "
            f"{_received(value)}. To give it in some calls and not in others, {_HOW_TO_DECLARE}.",
        )


def _match_tensor(spec: keras.InputSpec, value: Nested, name: str, path: Path) -> Tensor | None:
    if value is None:
        if spec.optional:
            return None
        raise input_error(
            name,
            path,
            f"is required: expected a tensor of shape {spec.shape}, received None. If it may be "
            f"left out, {_HOW_TO_DECLARE}.",
        )
    if isinstance(value, (dict, list, tuple)):
        raise input_error(name, path, f"expected one tensor, {_received(value)}.")
    _check_tensor(spec, value, name, path)
    return value


def _check_tensor(spec: keras.InputSpec, value: Tensor, name: str, path: Path) -> None:
    """Stops what a Functional would let pass: it squeezes ranks and casts numbers silently."""
    shape = getattr(value, "shape", None)
    if shape is not None and len(shape) != len(spec.shape):
        raise input_error(
            name, path, f"expected rank {len(spec.shape)} (shape {spec.shape}), {_received(value)}."
        )
    if shape is not None:
        for expected, size in zip(_sizes(spec), shape, strict=True):
            if expected is not None and size is not None and size != expected:
                raise input_error(
                    name,
                    path,
                    f"is incompatible with the layer: expected shape={spec.shape}, "
                    f"found shape={tuple(shape)}. A graph keeps the sizes that it was built with. "
                    "If a size may change, call the layer the first time on a "
                    "keras.Input((None, ...)), or set `layer.input_spec` with None for that axis "
                    "before that.",
                )
    dtype = getattr(value, "dtype", None)
    if dtype is None or dtype == spec.dtype:
        return
    dtype = keras.backend.standardize_dtype(dtype)
    to_float = keras.backend.is_float_dtype(spec.dtype)
    from_float = keras.backend.is_float_dtype(dtype)
    too_narrow = to_float and keras.backend.is_int_dtype(dtype) and spec.dtype not in _WIDE_FLOATS
    if too_narrow or (from_float and not to_float):
        raise input_error(
            name,
            path,
            f"was built for {spec.dtype}, in which {dtype} loses digits. Cast the input, "
            f"or build the layer with InputSpec(shape=..., dtype='{dtype}'). A Sequential model "
            f"casts to {keras.config.floatx()} unless it begins with keras.Input(..., dtype=...).",
        )


def _spec_for_keras(spec: keras.InputSpec | None) -> keras.InputSpec:
    """Keras compares dtypes before it casts, and fails at `None` among the specs of a dict."""
    if spec is None:
        return keras.InputSpec(optional=True)
    return keras.InputSpec(shape=_sizes(spec), optional=bool(spec.optional))


def _sizes(spec: keras.InputSpec) -> tuple[int | None, ...]:
    """Returns the sizes that are checked.

    An input that may be left out is a cache, say, of which a window is only the largest length.
    """
    shape = tuple(spec.shape)
    return (*shape[:1], None, *shape[2:]) if spec.optional and len(shape) > 1 else shape


_WIDE_FLOATS = ("float32", "float64")
_HOW_TO_DECLARE = (
    "call the layer the first time on a keras.Input(..., optional=True), or set `layer.input_spec` "
    "with InputSpec(shape=..., optional=True) before that"
)


def _received(value: Nested) -> str:
    if isinstance(value, dict):
        return f"received a dict with keys {list(value)}"
    if isinstance(value, (list, tuple)):
        return f"received a {type(value).__name__} of {len(value)}"
    return f"received a {type(value).__name__} of shape {getattr(value, 'shape', None)}"
