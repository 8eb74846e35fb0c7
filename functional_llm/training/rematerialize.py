"""Layers that are computed again in the backward pass instead of remembered."""

from typing import Any

import jax
import keras

from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.rewiring import rewire

# On CPUs, XLA's default order of work starts all of it as early as it can: what is computed again
# would be kept all the same. A flag of XLA's, for the environment variable XLA_FLAGS.
SAVING_FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


def rematerialize(graph: keras.Model) -> keras.Model:
    """Returns the same graph, whose CompositeLayers keep only their inputs for the backward pass.

    `keras.RematScope` does this for layers as they are made; here they are made already. On CPUs
    it saves memory only with `SAVING_FLAG`.

    Args:
        graph: Functional model. Only its outermost CompositeLayers, the decoder layers, change.
    """

    def is_outermost(layer: keras.layers.Layer, path: str) -> bool:
        return isinstance(layer, CompositeLayer) and "/" not in path

    return rewire(graph, lambda layer, path: Rematerialized(layer), where=is_outermost)


@keras.saving.register_keras_serializable("functional_llm")
class Rematerialized(keras.layers.Layer):
    """Computes a layer, and again when its gradients are wanted.

    Args:
        layer: A built layer. Its weights stay its own.
    """

    def __init__(self, layer: keras.layers.Layer, **kwargs: Any) -> None:
        super().__init__(**{"name": layer.name, "dtype": layer.dtype_policy, **kwargs})
        self.layer = layer
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        # Variables go in and come out: what a layer writes inside must not stay inside.
        @jax.checkpoint
        def run(trainable: list[Any], fixed: list[Any], inputs: Any) -> tuple[Any, list[Any]]:
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

    def compute_output_spec(self, inputs: Any, **kwargs: Any) -> Any:
        return self.layer.compute_output_spec(inputs)

    def get_config(self) -> dict[str, Any]:
        layer = keras.saving.serialize_keras_object(self.layer)
        return {**super().get_config(), "layer": layer}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Rematerialized":
        layer = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**{**config, "layer": layer})
