"""Lowering: the same model in built-in layers and `keras.ops` only.

Stock Keras cannot leave an input out, but it can take one of zero length: to concatenate keys with
those of a cache without slots changes nothing. So the stock graph always takes a cache, and the
model around it passes one without slots.

Shapes: B batch, T new tokens, S slots of the cache, V vocabulary.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

import keras
from keras import ops, tree

from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.keras_private import calls, freeze_layer_only, set_untracked
from functional_llm.graph.keras_values import has_value
from functional_llm.graph.rewiring import shared_copy
from functional_llm.graph.selection import inner_graph, inner_layers
from functional_llm.graph.types import Layer, Nested, Tensor
from functional_llm.stock.several_layers import Copies, InStockLayers, StockLayers

Lower: TypeAlias = Callable[..., Nested]  # (layer, *args, **kwargs) -> outputs
_Body: TypeAlias = Callable[[list[Tensor]], list[Tensor]]
_LOWERINGS: dict[type, Lower | type | StockLayers] = {}
_FIRST: dict[type, Callable[[Nested], Nested]] = {}


def register_lowering(
    cls: type, lower: Lower | type | StockLayers, first: Callable[[Nested], Nested] | None = None
) -> None:
    """Registers how a layer of your own is written with stock layers and `keras.ops`.

    ```python
    register_lowering(MyLayer, MyLayer.call)  # if `call` uses nothing else
    register_lowering(MyLayer, lambda layer, x: keras.ops.tanh(x) * layer.factor)
    register_lowering(MyDense, keras.layers.Dense)  # a subclass that computes the same otherwise
    ```

    Args:
        cls: The class. Its subclasses are lowered alike, unless they are registered themselves.
        lower: `lower(layer, *args, **kwargs)` returns the outputs for symbolic inputs. `layer` is
            like the layer in the model, but its own weights are symbolic tensors, which stock
            layers hold and train; the layers in it can be called. `lower` may also be the stock
            class that `cls` derives from, if that class needs nothing but the layer's attributes;
            or `StockLayers`, if it takes several.
        first: What that stock class takes of the first argument of a call, if it is not all of it.
    """
    _LOWERINGS[cls] = lower
    if first is not None:
        _FIRST[cls] = first


class Lowering:
    """A model lowered to stock Keras.

    `model` is the result: a Functional from `token_ids` (B, T) to logits (B, T, V), which shares
    the weights of the original's stock layers. Its layer "decoder" is a Functional that takes

    - `token_ids`: (B, T) int32,
    - `cache_length`: (B,) int32, how many slots of each row are filled,
    - `cache`: what each decoder layer keeps, as a nested dict of (B, S, ...) arrays,

    and returns `logits` (B, T, V) and `cache_update` (B, T, ...), which belongs into the slots from
    `cache_length` to `cache_length + T - 1`. The decoder of a model with layers that keep a state
    also takes

    - `new_length`: (B,) int32, behind how many of a row's new tokens there is padding only,
    - `state`: what those layers keep, (B, 1, ...) arrays, zeros before the first token,

    and returns `state`, which takes the place of the one before.

    Args:
        original: A Backbone, or any functional model with its inputs and outputs.

    Raises:
        ValueError: At a layer that stock Keras does not have, unless it is registered.
    """

    def __init__(self, original: keras.Model) -> None:
        self._original = original
        self._frozen = frozenset(getattr(original, "_frozen", ()))
        self._places: dict[int, Any] = {}  # by the identity of the original's objects
        self._stand_ins: dict[int, Layer] = {}
        self._given: dict[int, list[bool]] = {}  # which of a layer's outputs are not None
        self._homes: dict[int, Layer] = {}
        self._home: Layer = original  # what is being lowered now: a model of its own
        self._names: set[str] = set()
        self._called_twice: set[int] = set()
        # A custom layer's weights are copied into stock layers, perhaps in another shape.
        self.copies: Copies = []
        self.model = self._around(self._decoder())

    def copy_back(self) -> None:
        """Assigns the weights of the stock model to the original's custom layers."""
        for variable, held in self.copies:
            variable.assign(ops.reshape(held, variable.shape))

    def call(
        self, operation: keras.Operation, path: str, *args: Nested, **kwargs: Nested
    ) -> list[Tensor]:
        """Returns the flat outputs of an operation's call, made by stock operations."""
        if inner_layers(operation) is not None:
            return self._call_graph(operation, path, args)
        lower = _lowering_for(operation)
        if lower is not None and not isinstance(lower, _PLACED):
            return self._call_custom(lower, operation, path, args, kwargs)
        if lower is None and not _is_stock(operation):
            name = type(operation).__name__
            raise ValueError(
                f"'{path}' is a {name}, which stock Keras does not have. Say how it is written "
                f"with stock layers and ops: `functional_llm.register_lowering({name}, fn)`, where "
                f"`fn(layer, *args, **kwargs)` returns the outputs; `{name}.call` may do."
            )
        return tree.flatten(self._stock(operation, path)(*args, **kwargs))

    def _stock(self, operation: keras.Operation, path: str) -> Callable[..., Nested]:
        """Returns what calls the stock layer that stands for one, as that one is called."""
        placed, first = self.place(operation, path), _FIRST.get(type(operation))
        if first is None:
            return placed
        return lambda x, **kwargs: placed(first(x), **kwargs)

    def place(self, operation: keras.Operation, path: str) -> Layer | InStockLayers:
        """Returns what stands for an operation here, frozen if its weights are frozen.

        It is a shared copy of a stock operation.
        """
        if self._homes.setdefault(id(operation), self._home) is not self._home:
            raise ValueError(
                f"'{operation.name}' is used inside '{self._home.name}' and inside "
                f"'{self._homes[id(operation)].name}'. Stock Keras loads no file in which two "
                "nested models share a layer: expected all its calls in one of them."
            )
        if id(operation) not in self._places:
            new = self._places[id(operation)] = self._placed(operation, path)
            variables = getattr(operation, "variables", ())
            if variables and all(id(v) in self._frozen for v in variables):
                for layer in getattr(new, "layers", (new,)):
                    freeze_layer_only(layer)
        return self._places[id(operation)]

    def _placed(self, operation: keras.Operation, path: str) -> Layer | InStockLayers:
        # A loaded weight's path is its layer's name, and torch needs them to be different.
        name = path.replace("/", "_")
        stock = _lowering_for(operation)
        if isinstance(stock, StockLayers):
            made = stock.make(operation, self._unique(name))
            self.copies += made.copies
            return made
        new = shared_copy(operation)
        if stock is not None:
            build_config = new.get_build_config()
            new.__class__ = stock
            set_untracked(new, "get_build_config", lambda: build_config)
        if getattr(operation, "variables", ()):
            new.name = self._unique(name)
        return new

    def _unique(self, name: str) -> str:
        """Returns the name, with a number behind it if a layer has the name already."""
        numbered = (f"{name}_{i}" for i in itertools.count(2))
        new = next(x for x in itertools.chain([name], numbered) if x not in self._names)
        self._names.add(new)
        return new

    def _call_graph(self, layer: Layer, path: str, args: Nested) -> list[Tensor]:
        graph = inner_graph(layer)
        is_composite = isinstance(layer, CompositeLayer)
        given = layer.unpack_inputs(*args) if is_composite else tree.flatten(args)
        pairs = zip(given, graph.inputs, strict=True)
        specs = [spec for x, spec in pairs if x is not None]

        def body(inputs: list[Tensor]) -> list[Tensor]:
            tensors = {
                id(spec): _cast(x, spec.dtype) for x, spec in zip(inputs, specs, strict=True)
            }
            return self._run(graph, tensors, path)

        names = [spec.name.removeprefix("input.").replace(".", "_") for spec in specs]
        names = ["x"] if names == ["0"] else names  # the one input of a layer
        inside = {inner.name for inner in inner_layers(layer) or ()}
        names = [f"{name}_input" if name in inside else name for name in names]
        return self._call_model(layer, [x for x in given if x is not None], names, body)

    def _call_custom(
        self, lower: Lower, layer: Layer, path: str, args: Nested, kwargs: Nested
    ) -> list[Tensor]:
        if id(layer) in self._called_twice:  # perhaps in two ways, for which one model is too few
            return self._lower(lower, layer, path, args, kwargs)
        pairs = tree.flatten_with_path((args, kwargs))
        named = [(path, x) for path, x in pairs if isinstance(x, keras.KerasTensor)]
        given = [x for _, x in named]
        names = ["_".join(key for key in path if isinstance(key, str)) or "x" for path, _ in named]

        def body(inputs: list[Tensor]) -> list[Tensor]:
            new = {id(x): y for x, y in zip(given, inputs, strict=True)}
            new_args, new_kwargs = tree.map_structure(lambda x: new.get(id(x), x), (args, kwargs))
            return self._lower(lower, layer, path, new_args, new_kwargs)

        return self._call_model(layer, given, names, body)

    def _lower(
        self, lower: Lower, layer: Layer, path: str, args: Nested, kwargs: Nested
    ) -> list[Tensor]:
        def autocast(x: Tensor) -> Tensor:
            is_float = isinstance(x, keras.KerasTensor) and keras.backend.is_float_dtype(x.dtype)
            return _cast(x, layer.compute_dtype) if is_float and layer.autocast else x

        args, kwargs = tree.map_structure(autocast, (args, kwargs))
        if id(layer) not in self._stand_ins:
            tensors = (x for x in tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor))
            self._stand_ins[id(layer)] = self._stand_in(layer, path, next(tensors))
        return tree.flatten(lower(self._stand_ins[id(layer)], *args, **kwargs))

    def _call_model(
        self, layer: Layer, given: list[Tensor], names: list[str], body: _Body
    ) -> list[Tensor]:
        """Calls the stock model that stands for a layer; the first call makes it."""
        if id(layer) not in self._places:
            names = [
                name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)
            ]
            inputs = [
                keras.Input(batch_shape=x.shape, dtype=x.dtype, name=name)
                for x, name in zip(given, names, strict=True)
            ]
            outside, self._home = self._home, layer
            outputs = body(inputs)
            self._given[id(layer)] = [x is not None for x in outputs]
            outputs = [x for x in outputs if x is not None]
            self._places[id(layer)] = keras.Model(inputs, outputs, name=layer.name)
            self._home = outside
        returned = iter(tree.flatten(self._places[id(layer)](given)))
        return [next(returned) if is_given else None for is_given in self._given[id(layer)]]

    def _run(self, graph: keras.Model, tensors: dict[int, Tensor], path: str) -> list[Tensor]:
        """Returns the flat outputs of a graph for new tensors in the places of its inputs."""
        counts = Counter(id(call.operation) for call in calls(graph))
        self._called_twice |= {operation for operation, count in counts.items() if count > 1}
        for call in calls(graph):
            args, kwargs = call.with_tensors(tensors)
            inside = f"{path}/{call.operation.name}" if path else call.operation.name
            outputs = self.call(call.operation, inside, *args, **kwargs)
            tensors |= {id(old): new for old, new in zip(call.outputs, outputs, strict=True)}
        return [tensors[id(x)] for x in tree.flatten(graph.output)]

    def _stand_in(self, layer: Layer, path: str, x: Tensor) -> Layer:
        """Returns a copy of a custom layer whose weights are symbolic tensors, made from `x`."""
        new = shared_copy(layer)
        set_untracked(new, "place", lambda inner: self.place(inner, path))
        for name, value in vars(layer).items():
            if isinstance(value, keras.Variable) and not value.shape and not value.trainable:
                set_untracked(new, name, float(ops.convert_to_numpy(value.value)))  # a switch
            elif isinstance(value, keras.Variable):
                set_untracked(new, name, self._hold(value, f"{path}/{value.name}", x))
            elif isinstance(value, keras.layers.Layer):
                is_itself = value.name == layer.name  # but for what the layer adds
                inner_path = path if is_itself else f"{path}/{value.name}"
                set_untracked(new, name, self._callable(value, inner_path))
        return new

    def _callable(self, layer: Layer, path: str) -> Callable[..., Nested]:
        if _is_stock(layer) or isinstance(_lowering_for(layer), _PLACED):
            if inner_layers(layer) is None:
                return self._stock(layer, path)

        def call(*args: Nested, **kwargs: Nested) -> Nested:
            lower = _lowering_for(layer)
            if lower is None:
                outputs = self.call(layer, path, *args, **kwargs)
            else:  # in the same model: see `place`
                outputs = self._lower(lower, layer, path, args, kwargs)
            return outputs[0] if len(outputs) == 1 else outputs

        return call

    def _hold(self, variable: keras.Variable, path: str, x: Tensor) -> Tensor:
        """Returns a weight as a symbolic tensor: all rows of a stock Embedding that holds it."""
        shape = tuple(variable.shape)
        rows = shape[0] if len(shape) > 1 else 1
        holder = keras.layers.Embedding(
            rows,
            math.prod(shape) // rows,
            name=self._unique(path.replace("/", "_")),
            dtype=variable.dtype,
            trainable=variable.trainable and id(variable) not in self._frozen,
        )
        tensor = ops.reshape(holder(indices(rows, x)), shape)
        if has_value(variable):  # else a file gives one to the holder
            holder.embeddings.assign(ops.reshape(variable, holder.embeddings.shape))
        self.copies.append((variable, holder.embeddings))
        return tensor

    def _decoder(self) -> keras.Model:
        model = self._original
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        length = keras.Input((), dtype="int32", name="cache_length")
        tensors = {id(model.input["token_ids"]): token_ids}
        states: list[str] = []  # names of types of layers
        groups: list[str] = []
        for kind in model.input["cache"]:
            (groups if kind in model.input.get("mask", [kind]) else states).append(kind)
        cache = self._cache_inputs(groups, "cache", tensors)
        inputs = {"token_ids": token_ids, "cache_length": length, "cache": cache}
        if states:
            inputs["new_length"] = keras.Input((), dtype="int32", name="new_length")
            inputs["state"] = self._cache_inputs(states, "state", tensors)
        positions, slots, tag = _positions(token_ids, length, *tree.flatten(cache)[:1])
        if states:
            positions = _without_padding(positions, inputs["new_length"])
        tensors[id(model.input["positions"])] = positions
        for kind, group in model.input["cache"].items():
            tensors[id(group["positions"])] = tag if kind in states else slots
        outputs = tree.pack_sequence_as(model.output, self._run(model, tensors, ""))
        results = {key: x for key, x in outputs.items() if key not in ("hidden", "cache")}
        results["cache_update"] = _merged(outputs["cache"], groups)
        if states:
            results["state"] = _merged(outputs["cache"], states)
        return keras.Model(inputs, results, name="decoder")

    def _cache_inputs(
        self, kinds: list[str], prefix: str, tensors: dict[int, Tensor]
    ) -> dict[str, Nested]:
        """Returns inputs for what layers of some types keep, in the places of the original's."""
        kept = _merged(self._original.input["cache"], kinds)
        for path, spec in tree.flatten_with_path(kept):
            slots = spec.shape[1] if prefix == "state" else None
            name = "_".join((prefix, *map(str, path)))
            tensors[id(spec)] = keras.Input((slots, *spec.shape[2:]), dtype=spec.dtype, name=name)
        return tree.map_structure(lambda spec: tensors[id(spec)], kept)

    def _around(self, decoder: keras.Model) -> keras.Model:
        """Returns the model that passes a cache without slots, and empty states, to the decoder."""
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        nothing, first = token_ids[:, :0], token_ids[:, :1]
        empty: dict[object, Tensor] = {}

        def make(spec: keras.KerasTensor) -> Tensor:
            sizes, begin = spec.shape[2:], nothing if spec.shape[1] is None else first * 0
            key = (spec.shape[1], sizes, spec.dtype)
            if key not in empty:
                x = ops.expand_dims(begin, tuple(range(2, 2 + len(sizes))))
                empty[key] = ops.cast(ops.tile(x, (1, 1, *sizes)), spec.dtype)
            return empty[key]

        length = ops.cast(ops.sum(nothing, axis=1), "int32")
        inputs = {"token_ids": token_ids, "cache_length": length}
        inputs["cache"] = tree.map_structure(make, decoder.input["cache"])
        if "state" in decoder.input:
            inputs["state"] = tree.map_structure(make, decoder.input["state"])
            inputs["new_length"] = ops.sum(ops.ones_like(token_ids), axis=1)
        return keras.Model(token_ids, decoder(inputs)["logits"], name=self._original.name)


def _merged(cache: dict[str, Nested], kinds: list[str]) -> dict[str, Nested]:
    """Returns what the layers of some types keep, those that keep something."""
    groups = [group.items() for kind, group in cache.items() if kind in kinds]
    return {
        name: kept for name, kept in itertools.chain(*groups) if name != "positions" and kept != {}
    }


def _positions(token_ids: Tensor, length: Tensor, cache: Tensor | None = None) -> list[Tensor]:
    """Returns the positions of tokens: new (B, T), in slots (B, S), the last one there (B, 1).

    Without a cache, S is T.
    """
    given = [token_ids, length, token_ids if cache is None else cache]
    inputs = [
        keras.Input(batch_shape=x.shape, dtype=x.dtype, name=name)
        for x, name in zip(given, ("token_ids", "cache_length", "slots"), strict=True)
    ]
    length_B1 = ops.expand_dims(inputs[1], 1)
    rest = (0,) * (len(given[2].shape) - 2)
    slot_BS = _count(inputs[2][(slice(None), slice(None), *rest)])
    slots_BS = ops.where(slot_BS < length_B1, slot_BS, -1)
    outputs = [_count(inputs[0]) + length_B1, slots_BS, length_B1 - 1]
    return keras.Model(inputs, outputs, name="positions")(given)


def _without_padding(positions_BT: Tensor, new_length_B: Tensor) -> Tensor:
    """Returns the positions, -1 behind the first `new_length` of each row."""
    is_new_BT = _count(positions_BT) < ops.expand_dims(new_length_B, 1)
    return ops.where(is_new_BT, positions_BT, -1)


def _count(x_BN: Tensor) -> Tensor:
    """Returns 0, 1, 2 ... along the second axis."""
    return ops.cast(ops.cumsum(ops.ones_like(x_BN, dtype="int32"), axis=1), "int32") - 1


def indices(count: int, x: Tensor) -> Tensor:
    """Returns 0 ... count - 1 as a symbolic tensor, which it can only be if it depends on `x`."""
    one = ops.ones_like(ops.reshape(ops.sum(x), (1,)), dtype="int32")
    return ops.cast(ops.cumsum(ops.tile(one, (count,))), "int32") - 1


def _cast(x: Tensor, dtype: str) -> Tensor:
    return x if x.dtype == dtype else ops.cast(x, dtype)


_PLACED = (type, StockLayers)  # lowerings to stock layers


def _lowering_for(operation: keras.Operation) -> Any:
    classes = type(operation).__mro__
    return next((_LOWERINGS[cls] for cls in classes if cls in _LOWERINGS), None)


def _is_stock(operation: keras.Operation) -> bool:
    is_lambda = isinstance(operation, keras.layers.Lambda)  # is code, which is no stock to load
    return type(operation).__module__.startswith("keras.") and not is_lambda
