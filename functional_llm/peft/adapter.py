"""What all methods have in common: an Adapter stands in the place of a layer and changes it.

A method of your own is a subclass of `Adapter` with `make_weights` and `kernel_change`, and
`attach` to put it into a model. It saves, loads and merges like those in this folder.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import keras
from keras import ops

from functional_llm.graph.rewiring import rewire, shared_copy
from functional_llm.graph.selection import Where, matches, select, walk
from functional_llm.peft.initializers import ones
from functional_llm.peft.linear import LINEAR_LAYERS, Linear

QUERY_AND_VALUE = ("query", "value")


class Adapter(keras.layers.Layer):
    """A layer in the place of `base`: its output, plus a change that trains.

    Changes are relative to the layer that was there first, so those of several adapters add up.

    Args:
        base: A built Dense or EinsumDense, or another Adapter.
        adapter_name: Names the adapter in a model that has several.
        gate: A variable that all layers of one adapter share: 1 if it is active, 0 if not.
        **kwargs: Of `keras.layers.Layer`. The dtype, float32 unless given, is that of the weights
            and of the change.
    """

    peft_type: str | None = None  # what PEFT calls the method; the methods it knows set it

    def __init__(
        self, base: Any, adapter_name: str = "default", gate: Any = None, **kwargs: Any
    ) -> None:
        kwargs = {"dtype": "float32", "name": base.name, **kwargs}
        super().__init__(autocast=False, **kwargs)  # the base gets its inputs as they are
        self.supports_masking = True
        self.adapter_name = adapter_name
        self.activation = base.activation
        self.base = shared_copy(base)
        self.base.activation = keras.activations.linear  # comes last, after the change
        self.gate = gate
        self._constants: list[Any] = []

    # What a method implements.

    def make_weights(self, linear: Linear) -> None:
        """Adds the adapter's weights. `kernel_change` must be 0 with their initial values."""
        raise NotImplementedError(f"{type(self).__name__} has no `make_weights`.")

    def kernel_change(self) -> Any:
        """Returns what is added to the matrix (in, out); `None` for nothing."""
        return

    def bias_change(self) -> Any:
        """Returns what is added to the bias (out); `None` for nothing."""
        return

    def change(self, x: Any, training: bool | None = None) -> Any:
        """Returns what is added to the output. Override it where there is a shorter way."""
        kernel, bias = self.kernel_change(), self.bias_change()
        changed = 0.0 if kernel is None else self.linear.apply(x, kernel)
        return changed if bias is None else changed + self.linear.as_output(bias)

    def get_options(self) -> dict[str, Any]:
        """Returns the constructor's arguments that are the method's own, as JSON."""
        return {}

    # What it gets.

    def add_constant(self, value: Any, name: str) -> Any:
        """Adds a weight that does not train and is not saved: it follows from the base."""
        variable = self.add_weight(shape=value.shape, name=name, trainable=False)
        variable.assign(value)
        self._constants = [*self._constants, variable]
        return variable

    @property
    def origin(self) -> Any:
        """The layer that was there first."""
        return self.base.origin if isinstance(self.base, Adapter) else self.base

    @property
    def adapter_weights(self) -> dict[str, Any]:
        """The weights of this adapter, by name, without those of the base."""
        others = [*self.base.weights, *self._constants, self.gate]
        foreign = set(map(id, others))
        prefix = f"{self.path}/"
        return {v.path.removeprefix(prefix): v for v in self.weights if id(v) not in foreign}

    def build(self, input_shape: Any) -> None:
        if not self.base.built:
            self.base.build(input_shape)
        self.linear = Linear(self.origin)
        if self.gate is None:
            self.gate = make_gate()
        self.make_weights(self.linear)

    def call(self, x: Any, training: bool | None = None) -> Any:
        y = self.base(x)
        change = self.gate * self.change(ops.cast(x, self.compute_dtype), training)
        changed = ops.cast(ops.cast(y, self.compute_dtype) + change, y.dtype)
        return self.activation(changed)

    def compute_output_spec(self, x: Any, training: bool | None = None) -> Any:
        return self.base.compute_output_spec(x)

    def get_config(self) -> dict[str, Any]:
        config = {key: x for key, x in super().get_config().items() if key != "autocast"}
        base = keras.saving.serialize_keras_object(self.base)
        activation = keras.activations.serialize(self.activation)
        own = {"base": base, "adapter_name": self.adapter_name, "base_activation": activation}
        return {**config, **own, **self.get_options()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        config = dict(config)
        activation = keras.activations.deserialize(config.pop("base_activation"))
        new = cls(keras.saving.deserialize_keras_object(config.pop("base")), **config)
        new.activation = activation
        return new

    def chain(self) -> "Iterator[Adapter]":
        """Yields this adapter, and those in its base."""
        layer = self
        while isinstance(layer, Adapter):
            yield layer
            layer = layer.base


def origin_of(layer: Any) -> Any:
    """Returns the layer under all adapters; any other layer as it is."""
    return layer.origin if isinstance(layer, Adapter) else layer


def make_gate() -> keras.Variable:
    """Returns a switch for an adapter, on."""
    return keras.Variable(ones, shape=(), trainable=False, dtype="float32", name="gate")


def attach(
    model: Any,
    make: Callable[..., Adapter],
    targets: Where,
    adapter_name: str = "default",
) -> Any:
    """Returns a model with adapters in it; nothing else trains there.

    Args:
        model: A functional model; it stays as it is, and its weights are shared.
        make: `make(layer, path, adapter_name=..., gate=...)` returns the Adapter for a layer.
        targets: Which layers, as for `select`, or `"all"` for every Dense and EinsumDense but those
            that make the model's output. Of what matches, only these and adapters count.
        adapter_name: Another name for each adapter in one model.

    Raises:
        ValueError: If the targets match no such layer, or the model has an adapter of this name.
    """
    if adapter_name in adapter_names(model):
        raise ValueError(
            f"The model has an adapter '{adapter_name}' already. Expected another `adapter_name`."
        )
    layers = find_targets(model, targets)
    gate = make_gate()

    def replace(layer: Any, path: str) -> Any:
        return make(layer, path, adapter_name=adapter_name, gate=gate)

    return rewire(model, replace, where=lambda _, path: path in layers, freeze=True)


def find_targets(model: Any, targets: Where) -> dict[str, Any]:
    """Returns the layers, by path, that `targets` (as for `attach`) stands for."""
    if isinstance(targets, str) and targets == "all":
        found = {path: x for path, x in walk(model) if not _is_head(model, path, x)}
    else:
        found = select(model, targets)
    fitting = {p: x for p, x in found.items() if isinstance(x, (*LINEAR_LAYERS, Adapter))}
    if not fitting:
        received = sorted({type(layer).__name__ for layer in found.values()})
        raise ValueError(
            f"Expected targets that are Dense or EinsumDense; {targets!r} matches only "
            f"{', '.join(received)}."
        )
    return fitting


def _is_head(model: Any, path: str, layer: Any) -> bool:
    """Whether a layer makes the model's output; a soft cap may follow it in a language model."""
    outputs = getattr(model, "output", None)
    if isinstance(outputs, dict) and "logits" in outputs:
        size = outputs["logits"].shape[-1]
        return "/" not in path and getattr(origin_of(layer), "units", None) == size
    return path in getattr(model, "output_names", ())


def find_adapters(model: Any) -> Iterator[tuple[str, Adapter]]:
    """Yields (path, adapter) for every adapter in a model."""
    for path, layer in walk(model):
        if isinstance(layer, Adapter):
            for adapter in layer.chain():
                yield path, adapter


def adapter_names(model: Any) -> list[str]:
    """Returns the names of the adapters in a model, sorted."""
    return sorted({adapter.adapter_name for _, adapter in find_adapters(model)})


def activate(model: Any, names: str | Sequence[str] | None) -> None:
    """Switches adapters: those named act, the others do not. Nothing is compiled again.

    Args:
        model: A model with adapters.
        names: One or several names; `None` for the base alone.

    Raises:
        ValueError: If the model has no adapter of such a name.
    """
    chosen = [] if names is None else [names] if isinstance(names, str) else list(names)
    unknown = sorted(set(chosen) - set(adapter_names(model)))
    if unknown:
        raise ValueError(f"No adapter {unknown}. The model has {adapter_names(model)}.")
    for gate, name in {
        id(x.gate): (x.gate, x.adapter_name) for _, x in find_adapters(model)
    }.values():
        gate.assign(float(name in chosen))


def value_for(path: str, value: Any, what: str) -> Any:
    """Returns an option for one layer: the option itself, or the first whose pattern matches."""
    if not isinstance(value, dict):
        return value
    for pattern, one in value.items():
        if matches(path, pattern):
            return one
    raise ValueError(f"No pattern of `{what}` matches '{path}'. It has {list(value)}.")


def rank_for(path: str, rank: Any, layer: Any) -> int:
    """Returns the rank for one layer.

    Raises:
        ValueError: Unless 1 <= rank <= the smaller side of the layer's matrix.
    """
    rank = value_for(path, rank, "rank")
    linear = Linear(origin_of(layer))
    limit = min(linear.in_size, linear.out_size)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= limit:
        raise ValueError(
            f"Expected a rank from 1 to {limit} for '{path}', a matrix {linear.in_size} x "
            f"{linear.out_size}. Received: {rank!r}."
        )
    return rank


def targets_for(targets: Any, rank: Any) -> Any:
    """Returns the targets: those given, those that `rank` has patterns for, or the default."""
    if targets is not None:
        return targets
    return list(rank) if isinstance(rank, dict) else QUERY_AND_VALUE


def seed_for(path: str, seed: int | None) -> int | None:
    """Returns a seed for one layer; `None` for another at every call."""
    return None if seed is None else (seed + zlib.crc32(path.encode())) % 2**31
