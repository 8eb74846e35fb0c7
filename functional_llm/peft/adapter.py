"""What all methods have in common: an Adapter stands in the place of a layer and changes it.

A method of your own is a subclass of `Adapter` with `make_weights` and `kernel_change`, and
`attach` puts it into a model. It saves, loads and merges like those in this folder.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import keras
import numpy as np
from keras import ops
from tqdm import tqdm

from functional_llm.graph.backend import stored
from functional_llm.graph.freezing import freeze_variables
from functional_llm.graph.rewiring import rewire, shared_copy
from functional_llm.graph.selection import Where, matches, select, walk
from functional_llm.graph.types import JSON, Layer, Tensor
from functional_llm.layers.experts import ExpertDense, ExpertScores
from functional_llm.layers.latent import product_matrix
from functional_llm.peft.initializers import ones
from functional_llm.peft.linear import LINEAR_LAYERS, MATRIX_LAYERS, Linear, view

DEFAULT_TARGETS = ("query", "value")
# Of what has states in the place of attention: RWKV's receptance asks, as a query does.
_OF_STATES = (("receptance", "value"), ("input",))
REVERSED = ":reverse"  # behind the path of an embedding: the head that it is, too

Value = TypeVar("Value")


class Adapter(keras.layers.Layer):
    """A layer in the place of `base`: its output, plus a change that trains.

    Changes are relative to the layer that was there first, so those of several adapters add up.

    A method declares its options as a dataclass does, as annotated attributes with a default:
    `rank: int = 8`. Each is an argument of the constructor, and is saved.

    Args:
        base: A built Dense, EinsumDense or Embedding, or another Adapter.
        adapter_name: Names the adapter in a model that has several.
        gate: A variable that all layers of one adapter share: by how much its change counts, 1
            unless it was told; 0 if it is not active.
        reverse: Of an embedding that is the head, too: `True` for a change of the head, `False`
            for one of the embedding, `None` for both.
        **kwargs: The method's options, and those of `keras.layers.Layer`. The dtype, float32 unless
            given, is that of the weights and of the change.
    """

    peft_type: str | None = None  # PEFT's name of the method; `None` if PEFT does not know it
    changes_experts = False  # whether the method knows matrices (E, in, out)

    def __init__(
        self,
        base: Layer,
        adapter_name: str = "default",
        gate: keras.Variable | None = None,
        reverse: bool | None = False,
        **kwargs: Any,
    ) -> None:
        options = {name: kwargs.pop(name) for name in option_names(type(self)) if name in kwargs}
        kwargs = {"dtype": "float32", "name": base.name, **kwargs}
        super().__init__(autocast=False, **kwargs)  # the base gets its inputs as they are
        for name, value in options.items():
            setattr(self, name, value)
        self.supports_masking = True
        self.adapter_name = adapter_name
        self.reverse = reverse
        self.is_stacked = isinstance(base, Adapter)
        self.base = shared_copy(base)
        self.activation = getattr(base, "activation", keras.activations.linear)
        if hasattr(base, "activation"):  # the adapter applies it after the change
            self.base.activation = keras.activations.linear
        self.gate: keras.Variable = gate
        self._constants: list[keras.Variable] = []

    # What a method implements.

    def make_weights(self, linear: Linear) -> None:
        """Adds the adapter's weights. `kernel_change` must be 0 with their initial values."""
        raise NotImplementedError(f"{type(self).__name__} has no `make_weights`.")

    def kernel_change(self) -> Tensor | None:
        """Returns what is added to the matrix (in, out); `None` for nothing."""
        return None

    def bias_change(self) -> Tensor | None:
        """Returns what is added to the bias (out); `None` for nothing."""
        return None

    def change(self, x: Tensor, training: bool | None = None) -> Tensor:
        """Returns what is added to the output. Override it if there is a cheaper way."""
        kernel, bias = self.kernel_change(), self.bias_change()
        changed = 0.0 if kernel is None else self.linear.apply(x, kernel)
        return changed if bias is None else changed + self.linear.as_output(bias)

    def get_options(self) -> JSON:
        """Returns the constructor's arguments that are the method's own, as JSON."""
        options = {name: getattr(self, name) for name in option_names(type(self))}
        return options if self.reverse is False else {**options, "reverse": self.reverse}

    def fingerprint(self) -> np.ndarray | None:
        """Returns numbers of the base that the weights depend on, for the file; `None` for none."""
        return None

    def check_fingerprint(self, saved: np.ndarray) -> None:
        """Raises a ValueError if those numbers are others here than in the file."""

    @classmethod
    def for_layer(cls, layer: Layer, path: str, **kwargs: Any) -> Self:
        """Makes the adapter of one layer. Override it if an option depends on the layer."""
        return cls(layer, **kwargs)

    # What it gets.

    def add_constant(self, value: Tensor, name: str) -> keras.Variable:
        """Adds a weight that neither trains nor is saved, because it follows from the base."""
        variable = self.add_weight(shape=value.shape, name=name, trainable=False)
        variable.assign(value)
        self._constants = [*self._constants, variable]
        return variable

    @property
    def origin(self) -> Layer:
        """The layer that was there first."""
        return origin_of(self.base)

    @property
    def adapter_weights(self) -> dict[str, keras.Variable]:
        """The weights of this adapter, by name, without those of the base."""
        others = [*self.base.weights, *self._constants, self.gate]
        foreign = set(map(id, others))
        prefix = f"{self.path}/"
        return {v.path.removeprefix(prefix): v for v in self.weights if id(v) not in foreign}

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        if not self.base.built:
            self.base.build(input_shape)
        has_matrix = isinstance(self.origin, MATRIX_LAYERS)
        linear: Any = view(self.origin, bool(self.reverse)) if has_matrix else None
        self.linear = linear
        if linear is not None and linear.stack and not self.changes_experts:
            raise ValueError(
                f"'{self.name}' holds a matrix for each expert, which {type(self).__name__} does "
                "not know how to change. Expected LoRA there, or targets without experts."
            )
        if self.gate is None:
            self.gate = make_gate()
        self.make_weights(linear)

    def call(self, x: Tensor, training: bool | None = None, reverse: bool = False) -> Tensor:
        y = self.call_base(x, reverse)
        if not self.changes(reverse):
            return y
        change = self.gate * self.change(self.linear.prepare(x, self.compute_dtype), training)
        changed = ops.cast(ops.cast(y, self.compute_dtype) + change, y.dtype)
        if training:
            # Otherwise XLA keeps what this is the sum of for the gradient, one part in float32:
            # 1064 instead of 791 MB a layer of Llama 3.2 1B and 8192 tokens in bfloat16 (H100).
            changed = stored(changed)
        return self.activation(changed)

    def call_base(self, x: Tensor, reverse: bool) -> Tensor:
        """Returns what the layer under this adapter makes of an input."""
        return self.base(x, reverse=True) if reverse else self.base(x)

    def product_matrix(self) -> Tensor | None:
        """Returns the changed matrix (in, out); `None` if that is not all: see `layers.latent`."""
        matrix = product_matrix(self.base)
        is_linear = self.activation is keras.activations.linear and self.bias_change() is None
        if matrix is None or not is_linear or type(self).call is not Adapter.call:
            return None
        change = self.kernel_change()
        return None if change is None else ops.cast(matrix, "float32") + self.gate * change

    def changes(self, reverse: bool) -> bool:
        """Whether the adapter changes a call of the embedding, or of the head that it is."""
        return self.reverse is None or self.reverse == reverse

    def compute_output_spec(
        self, x: Tensor, training: bool | None = None, reverse: bool = False
    ) -> keras.KerasTensor:
        kwargs = {"reverse": True} if reverse else {}
        return self.base.compute_output_spec(x, **kwargs)

    def get_config(self) -> JSON:
        config = {key: x for key, x in super().get_config().items() if key != "autocast"}
        base = keras.saving.serialize_keras_object(self.base)
        activation = keras.activations.serialize(self.activation)
        own = {"base": base, "adapter_name": self.adapter_name, "base_activation": activation}
        return {**config, **own, **self.get_options()}

    @classmethod
    def from_config(cls, config: JSON) -> Self:
        config = dict(config)
        activation = keras.activations.deserialize(config.pop("base_activation"))
        new = cls(keras.saving.deserialize_keras_object(config.pop("base")), **config)
        new.activation = activation
        return new

    def chain(self) -> "Iterator[Adapter]":
        """Yields this adapter and those under it, the last attached first."""
        layer = self
        while isinstance(layer, Adapter):
            yield layer
            layer = layer.base


def option_names(method: type[Adapter]) -> list[str]:
    """Returns the names of a method's options: its annotated attributes that have a default."""
    classes = [x for x in reversed(method.__mro__) if issubclass(x, Adapter) and x is not Adapter]
    names = (name for x in classes for name in inspect.get_annotations(x) if name in vars(x))
    return [name for name in dict.fromkeys(names) if not hasattr(Adapter, name)]


def origin_of(layer: Layer) -> Layer:
    """Returns the layer under all adapters; any other layer as it is."""
    return layer.origin if isinstance(layer, Adapter) else layer


def make_gate() -> keras.Variable:
    """Returns a switch for an adapter, on."""
    return keras.Variable(ones, shape=(), trainable=False, dtype="float32", name="gate")


def attach(
    model: keras.Model,
    make: type[Adapter] | Callable[..., Adapter],
    targets: Where,
    adapter_name: str = "default",
    **options: Any,
) -> keras.Model:
    """Returns a model with adapters in it; nothing else trains there.

    Args:
        model: A functional model; it stays as it is, and its weights are shared.
        make: A subclass of `Adapter`, or `make(layer, path, adapter_name=..., gate=...)`, which
            returns the Adapter for a layer.
        targets: Which layers, as for `select`, or `"all"` for every Dense and EinsumDense except
            those that make the model's output, experts and their routers. Of the layers that
            match, only these two kinds, embeddings, and adapters of such layers count.
        adapter_name: Another name for each adapter in one model.
        **options: What else `make` gets: options of the subclass, or `dtype`. A dict has one for
            each pattern of paths: `rank={"query": 16, "value": 4}`.

    Raises:
        ValueError: If the targets match no such layer, or the model has an adapter of this name.
    """
    if adapter_name in adapter_names(model):
        raise ValueError(
            f"The model has an adapter '{adapter_name}' already. Expected another `adapter_name`."
        )
    layers = find_targets(model, targets)
    return join(model, make, list(layers), adapter_name, **options)


def join(
    model: keras.Model,
    make: type[Adapter] | Callable[..., Adapter],
    paths: Sequence[str],
    adapter_name: str,
    **options: Any,
) -> keras.Model:
    """Returns a model with more layers in one of its adapters, or in a new one; it alone trains.

    Args:
        model: A functional model; it stays as it is, and its weights are shared.
        make: As for `attach`.
        paths: Of the layers.
        adapter_name: Of the adapter.
        **options: As for `attach`.
    """
    make_adapter: Callable[..., Adapter] = make
    if isinstance(make, type) and issubclass(make, Adapter):
        make_adapter = make.for_layer
    present = [x for _, x in find_adapters(model) if x.adapter_name == adapter_name]
    gate = present[0].gate if present else make_gate()

    # Some methods decompose the weights, which takes seconds a layer.
    bar = {"unit": "layer", "leave": False, "disable": None, "delay": 1}
    with tqdm(total=len(paths), desc="Attaching adapters", **bar) as progress:

        def replace(layer: Layer, path: str) -> Adapter:
            progress.update()
            values = {name: _value_for(path, value, name) for name, value in options.items()}
            return make_adapter(layer, path, adapter_name=adapter_name, gate=gate, **values)

        new_model = rewire(model, replace, where=lambda _, path: path in paths, freeze=True)
    if present:
        train_only(new_model, [adapter_name])
    return new_model


def train_only(model: keras.Model, names: Sequence[str]) -> None:
    """Freezes all weights of a model except those of the adapters of these names."""
    adapters = (x for _, x in find_adapters(model) if x.adapter_name in names)
    own = {id(v) for x in adapters for v in x.adapter_weights.values()}
    freeze_variables(model, [v for v in model.variables if id(v) not in own])


def _value_for(path: str, value: Value | dict[str, Value], option: str) -> Value:
    """Returns an option for one layer: the option itself, or the first whose pattern matches."""
    if not isinstance(value, dict):
        return value
    for pattern, one in value.items():
        if matches(path, pattern):
            return one
    raise ValueError(f"No pattern of `{option}` matches '{path}'. It has {list(value)}.")


def targets_for(targets: Where | None, rank: int | dict[str, int]) -> Where:
    """Returns the targets: those given, those that `rank` has patterns for, or the default."""
    if targets is not None:
        return targets
    return list(rank) if isinstance(rank, dict) else DEFAULT_TARGETS


def has_named(model: keras.Model, name: str) -> bool:
    """Whether any layer of a model has this name."""
    return any(path.rpartition("/")[2] == name for path, _ in walk(model, composites=True))


def find_targets(model: keras.Model, targets: Where) -> dict[str, Layer]:
    """Returns the layers, by path, that `targets` (as for `attach`) stands for."""
    if targets == DEFAULT_TARGETS and not has_named(model, "query"):
        targets = next((x for x in _OF_STATES if has_named(model, x[0])), targets)
    if isinstance(targets, str) and targets == "all":
        found = {path: x for path, x in walk(model) if not _is_head(model, path, x)}
        # An adapter of every expert would be as large as that of a model with as many layers.
        others = (ExpertDense, ExpertScores)
        found = {path: x for path, x in found.items() if not isinstance(origin_of(x), others)}
        # Nor has one number a token, a gate, room for a rank.
        found = {path: x for path, x in found.items() if getattr(origin_of(x), "units", 0) != 1}
        kinds: tuple[type, ...] = LINEAR_LAYERS
    else:
        found, kinds = select(model, targets), MATRIX_LAYERS
    fitting = {path: x for path, x in found.items() if isinstance(origin_of(x), kinds)}
    if not fitting:
        received = sorted({type(origin_of(layer)).__name__ for layer in found.values()})
        raise ValueError(
            f"Expected targets that are Dense, EinsumDense or Embedding; {targets!r} matches only "
            f"{', '.join(received)}."
        )
    return fitting


def _is_head(model: keras.Model, path: str, layer: Layer) -> bool:
    """Whether a layer makes the model's output; a soft cap may follow it in a language model."""
    outputs = getattr(model, "output", None)
    if isinstance(outputs, dict) and "logits" in outputs:
        size = outputs["logits"].shape[-1]
        return "/" not in path and getattr(origin_of(layer), "units", None) == size
    return path in getattr(model, "output_names", ())


def find_adapters(model: keras.Model) -> Iterator[tuple[str, Adapter]]:
    """Yields (path, adapter) for every adapter in a model."""
    for path, layer in walk(model):
        if isinstance(layer, Adapter):
            for adapter in layer.chain():
                yield path, adapter


def adapter_names(model: keras.Model) -> list[str]:
    """Returns the names of the adapters in a model, sorted."""
    return sorted({adapter.adapter_name for _, adapter in find_adapters(model)})


def activate(model: keras.Model, names: str | Sequence[str] | Mapping[str, float] | None) -> None:
    """Switches on the adapters of these names, and all others off. Nothing is compiled again.

    Args:
        model: A model with adapters.
        names: One or several names; `None` for the base alone. A dict gives each a weight, by
            which its change is multiplied: `{"french": 0.7, "polite": 0.3}`.

    Raises:
        ValueError: If the model has no adapter of such a name, or a weight is no finite number.
    """
    if not isinstance(names, Mapping):
        names = dict.fromkeys([names] if isinstance(names, str) else names or (), 1.0)
    if not all(map(_is_finite, names.values())):
        raise ValueError(f"Expected weights that are finite numbers, received {dict(names)}.")
    chosen = {name: float(weight) for name, weight in names.items()}
    unknown = sorted(chosen.keys() - set(adapter_names(model)))
    if unknown:
        raise ValueError(f"No adapter {unknown}. The model has {adapter_names(model)}.")
    one_per_gate = {id(adapter.gate): adapter for _, adapter in find_adapters(model)}
    for adapter in one_per_gate.values():
        adapter.gate.assign(chosen.get(adapter.adapter_name, 0.0))


def _is_finite(weight: Any) -> bool:
    try:
        return math.isfinite(float(weight))
    except (TypeError, ValueError):
        return False
