"""Layers that are equal but for their weights are traced once for all of them.

Most models are one layer many times. JAX traces and lowers each of them, and the rules for CPUs
read each: seconds of Python before a program is found on the disk, let alone compiled. Here equal
layers call one compiled function with their own weights. XLA puts it in the place of each call, so
that the program that runs is the same.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import keras

from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.interchangeable import Key, program_key
from functional_llm.graph.keras_private import mask_of
from functional_llm.graph.rewiring import rewire
from functional_llm.graph.types import Layer, Nested

_Program: TypeAlias = Callable[..., Nested]
_Pattern: TypeAlias = tuple[Any, tuple[int, ...]]  # a structure, and which value each leaf is


def trace_equal_layers_once(model: keras.Model) -> keras.Model:
    """Returns a model that computes the same, to be traced by JAX in less time.

    Args:
        model: A functional model, to be called inside `jax.jit` and never to be trained. Of its
            outermost CompositeLayers, the decoder layers, those that are equal share a function.
    """
    groups: dict[Key, list[Layer]] = defaultdict(list)
    for layer in model.layers:
        if isinstance(layer, CompositeLayer):
            groups[program_key(layer)].append(layer)
    programs = {
        id(layer): program
        for layers in groups.values()
        if len(layers) > 1
        for program in [_program_of(layers[0])]
        for layer in layers
    }
    if not programs:
        return model
    return rewire(
        model,
        lambda layer, path: _TracedOnce(layer, programs[id(layer)]),
        where=lambda layer, path: id(layer) in programs and "/" not in path,
    )


def _program_of(layer: Layer) -> _Program:
    """Returns weights and inputs -> outputs, of a layer and all that are equal to it."""

    def run(weights: Sequence[jax.Array], values: Sequence[jax.Array], pattern: _Pattern) -> Nested:
        structure, numbers = pattern
        inputs = jax.tree.unflatten(structure, [values[number] for number in numbers])
        scope = keras.StatelessScope(state_mapping=list(zip(layer.variables, weights, strict=True)))
        with scope:
            return layer(inputs, training=False)

    run.__name__ = run.__qualname__ = type(layer).__name__
    return jax.jit(run, static_argnums=2)


class _TracedOnce(keras.layers.Layer):
    """A layer that computes by a function which equal layers share.

    Args:
        layer: A built layer, whose weights it uses.
        program: From `_program_of`.
    """

    def __init__(self, layer: Layer, program: _Program) -> None:
        super().__init__(name=layer.name, dtype=layer.dtype_policy, autocast=False)
        self.layer, self._program = layer, program
        self.built = True

    def call(self, inputs: Nested, training: bool | None = None) -> Nested:
        leaves, structure = jax.tree.flatten(inputs)
        if any(mask_of(x) is not None for x in leaves):  # it would not reach the function
            return self.layer(inputs, training=training)
        # What was one tensor is one inside too, for that says something: `kernels.Mask.to_tensors`.
        distinct = {id(x): x for x in leaves}
        places = {key: number for number, key in enumerate(distinct)}
        pattern = structure, tuple(places[id(x)] for x in leaves)
        weights = [variable.value for variable in self.layer.variables]
        return self._program(weights, [*distinct.values()], pattern)

    def compute_output_spec(self, inputs: Nested, **kwargs: Any) -> Nested:
        return self.layer.compute_output_spec(inputs)
