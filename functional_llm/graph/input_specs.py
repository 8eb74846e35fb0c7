"""InputSpecs: what is known of the nested inputs of a graph before there is one.

A structure of InputSpecs is a nested structure whose leaves are `keras.InputSpec`s, `None` where an
input is absent.
"""

import numbers
from collections.abc import Iterable
from typing import TypeAlias

import keras
from keras import tree

from functional_llm.graph.keras_private import is_optional_input
from functional_llm.graph.types import Nested, Tensor

Path: TypeAlias = tuple[str | int, ...]  # keys and indices that lead into a nested structure


class InputSpecs:
    """A structure of InputSpecs in which `[None, None]` is two absent inputs, not a shape.

    Args:
        specs: The structure.
    """

    def __init__(self, specs: Nested) -> None:
        self.specs = specs


def input_spec_of(x: Tensor | keras.InputSpec | None) -> keras.InputSpec | None:
    """Returns the InputSpec of a tensor, optional if its `keras.Input` is.

    Args:
        x: Symbolic tensor, array (the spec allows any batch size), InputSpec or `None` (stays
            `None`).
    """
    if x is None or isinstance(x, keras.InputSpec):
        return x
    if isinstance(x, keras.KerasTensor):
        return keras.InputSpec(shape=x.shape, dtype=x.dtype, optional=is_optional_input(x))
    tensor = keras.ops.convert_to_tensor(x)
    shape = tuple(tensor.shape)
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return keras.InputSpec(shape=(None, *shape[1:]) if shape else (), dtype=dtype)


def specs_of(shapes: Nested, dtype: str) -> Nested:
    """Returns a structure of InputSpecs for shapes, tensors or InputSpecs.

    Args:
        shapes: Nested structure; a tuple or list of ints and `None` is one shape, except in
            `InputSpecs`, which are taken as they are.
        dtype: The dtype of what has only a shape.
    """
    if isinstance(shapes, InputSpecs):
        return shapes.specs
    if shapes is None or hasattr(shapes, "shape"):
        return input_spec_of(shapes)
    if isinstance(shapes, dict):
        return {key: specs_of(value, dtype) for key, value in shapes.items()}
    is_shape = all(x is None or isinstance(x, numbers.Integral) for x in shapes)
    if is_shape and (len(shapes) > 0 or isinstance(shapes, tuple)):
        return keras.InputSpec(shape=tuple(shapes), dtype=dtype)
    specs = [specs_of(x, dtype) for x in shapes]
    return tuple(specs) if isinstance(shapes, tuple) else specs


def with_declared(specs: Nested, declared: Nested, name: str) -> Nested:
    """Returns `specs` with what the user declared on `layer.input_spec`.

    Args:
        specs: Structure of InputSpecs, of what the layer was called with.
        declared: Structure of InputSpecs, `None` for nothing declared.
        name: The layer's name, for messages.

    Raises:
        ValueError: If there are not as many declared as received, or a required one is `None`.
    """
    if declared is None:
        return specs
    specs = _spread_none(specs, declared)
    flat, flat_declared = tree.flatten_with_path(specs), tree.flatten(declared)
    if len(flat) != len(flat_declared):
        raise ValueError(
            f"'{name}' declares {len(flat_declared)} inputs in `input_spec`, received {len(flat)}. "
            "Declare one InputSpec for each input."
        )
    complete = []
    for (path, spec), by_user in zip(flat, flat_declared, strict=True):
        if spec is None and by_user is not None and not by_user.optional:
            raise input_error(name, path, "is required: expected a tensor, received None.")
        if by_user is None or (spec is None and by_user.shape is None):
            complete.append(spec)
            continue
        # A size that the user left open stays open: the graph must not keep that of the first call.
        shape = spec.shape if by_user.shape is None else by_user.shape
        dtype = by_user.dtype or (keras.config.floatx() if spec is None else spec.dtype)
        optional = bool(by_user.optional) or (spec is not None and spec.optional)
        complete.append(keras.InputSpec(shape=shape, dtype=dtype, optional=optional))
    return tree.pack_sequence_as(specs, complete)


def _spread_none(specs: Nested, declared: Nested) -> Nested:
    """Turns `None` for a whole subtree into `None` for each of the inputs declared in it."""
    if specs is None:
        return tree.map_structure(lambda _: None, declared)
    if isinstance(specs, dict) and isinstance(declared, dict) and specs.keys() == declared.keys():
        return {key: _spread_none(spec, declared[key]) for key, spec in specs.items()}
    return specs


def for_any_batch(shapes: Nested) -> Nested:
    """Returns shapes that are given by hand, or by another layer, without a batch size.

    Keras builds layers on the shapes of their first call, and layers work for any number of rows.

    Args:
        shapes: Structure of InputSpecs, of what had only a shape.
    """

    def forget(spec: keras.InputSpec | None) -> keras.InputSpec | None:
        if spec is None or not spec.shape:
            return spec
        shape = (None, *spec.shape[1:])
        return keras.InputSpec(shape=shape, dtype=spec.dtype, optional=bool(spec.optional))

    return tree.map_structure(forget, shapes)


def with_float_dtype(specs: Nested, dtype: str) -> Nested:
    """Returns the specs as they are once a layer has cast floats to its compute dtype.

    Args:
        specs: Structure of InputSpecs.
        dtype: The compute dtype.
    """

    def cast(spec: keras.InputSpec | None) -> keras.InputSpec | None:
        if spec is None or not keras.backend.is_float_dtype(spec.dtype or "float32"):
            return spec
        return keras.InputSpec(shape=spec.shape, dtype=dtype, optional=bool(spec.optional))

    return tree.map_structure(cast, specs)


def make_inputs(specs: Nested, names: list[str] | None = None) -> Nested:
    """Returns a `keras.Input` for each InputSpec, `None` for each `None`.

    Args:
        specs: Structure of InputSpecs.
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


def inputs_like(graph: keras.Model) -> Nested:
    """Returns new `keras.Input`s of the same shapes, dtypes and names as those of a graph."""
    specs = tree.map_structure(input_spec_of, graph.input)
    return make_inputs(specs, [x.name for x in tree.flatten(graph.input)])


def dotted(path: Iterable[str | int]) -> str:
    """Returns a path in a nested structure as words: `("cache", 0)` -> "cache.0"."""
    return ".".join(str(part) for part in path)


def input_error(name: str, path: Path, message: str) -> ValueError:
    """Returns an error about one input of a layer.

    Args:
        name: The layer's name.
        path: Where the input stands among the nested inputs.
        message: What is wrong with it, without a subject.
    """
    subject = f"Input '{dotted(path)}'" if path else "Input"
    return ValueError(f"{subject} of '{name}' {message}")
