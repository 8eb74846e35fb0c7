"""Rematerialisation: layers that are computed again in the backward pass."""

from typing import Any, TypeAlias

import jax
import keras

from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.rewiring import rewire
from functional_llm.graph.types import JSON, Layer, Nested

# For the environment variable XLA_FLAGS, before JAX starts. On CPUs, XLA's default scheduler starts
# everything as early as it can: it computes layers again before the backward pass needs them, and
# keeps the results.
REMAT_XLA_FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
SAVING_FLAG = REMAT_XLA_FLAG  # the name of 0.1

Values: TypeAlias = list[jax.Array]  # of variables, in their model's order


def rematerialize(graph: keras.Model) -> keras.Model:
    """Returns the same graph, whose CompositeLayers keep only their inputs for the backward pass.

    `keras.RematScope` does this for layers that are made inside it; these exist already. On CPUs,
    memory is saved only with `REMAT_XLA_FLAG`.

    Args:
        graph: Functional model. Only its outermost CompositeLayers, the decoder layers, change.
    """

    def is_outermost(layer: Layer, path: str) -> bool:
        return isinstance(layer, CompositeLayer) and "/" not in path

    return rewire(graph, lambda layer, path: Rematerialized(layer), where=is_outermost)


@keras.saving.register_keras_serializable("functional_llm")
class Rematerialized(keras.layers.Layer):
    """A layer that keeps only its inputs, and is computed again for its gradients.

    Args:
        layer: A built layer, whose weights it uses.
        **kwargs: As for `keras.layers.Layer`.
    """

    def __init__(self, layer: Layer, **kwargs: Any) -> None:
        super().__init__(**{"name": layer.name, "dtype": layer.dtype_policy, **kwargs})
        self.layer = layer
        self.built = True

    def call(self, inputs: Nested, training: bool | None = None) -> Nested:
        # Values go in and come out: no variable may keep a value of the trace.
        @jax.checkpoint
        def run(trainable: Values, fixed: Values, inputs: Nested) -> tuple[Nested, Values]:
            return self.layer.stateless_call(trainable, fixed, inputs, training=training)

        variables = self.layer.non_trainable_variables
        outputs, values = run(
            [variable.value for variable in self.layer.trainable_variables],
            [variable.value for variable in variables],
            inputs,
        )
        weights = {id(variable) for variable in self.layer.weights}
        for variable, value in zip(variables, values, strict=True):
            if id(variable) not in weights:
                variable.assign(value)
        return outputs

    def compute_output_spec(self, inputs: Nested, **kwargs: Any) -> Nested:
        return self.layer.compute_output_spec(inputs)

    def get_config(self) -> JSON:
        layer = keras.saving.serialize_keras_object(self.layer)
        return {**super().get_config(), "layer": layer}

    @classmethod
    def from_config(cls, config: JSON) -> "Rematerialized":
        layer = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**{**config, "layer": layer})
