"""Rematerialisation: layers that are computed again in the backward pass."""

import math
from typing import Any, TypeAlias

import jax
import keras

from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.rewiring import rewire
from functional_llm.graph.types import JSON, Layer, Nested
from functional_llm.kernels import keeps_attended
from functional_llm.xla.jax_private import dot_general_p

# For the environment variable XLA_FLAGS, before JAX starts. On CPUs, XLA's default scheduler starts
# everything as early as it can: it computes layers again before the backward pass needs them, and
# keeps the results.
REMAT_XLA_FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
SAVING_FLAG = REMAT_XLA_FLAG  # the name of 0.1

# What of a layer is computed again in the backward pass. With "products" the results of its
# products with weights are kept, which take the time, and what attention's kernels return; with
# "layer" only its inputs are. Compiled for an H100 (`python -m benchmarks.gpu_programs`), LoRA on
# all linear layers of Llama 3.2 1B keeps 76, 52 and 4 kB a layer and token.
REMAT = ("nothing", "products", "layer")

_WIDEST = 8  # results a term of a product that is worth to be kept: Gemma's gate has so many

Values: TypeAlias = list[jax.Array]  # of variables, in their model's order


def remat_name(remat: bool | str) -> str:
    """Returns what is computed again: one of `REMAT`; `True` is "layer", `False` is "nothing".

    Raises:
        ValueError: If it is none of them.
    """
    if isinstance(remat, bool):
        return "layer" if remat else "nothing"
    if remat not in REMAT:
        raise ValueError(f"Expected `remat` of {', '.join(REMAT)}, received {remat!r}.")
    return remat


def rematerialize(graph: keras.Model, remat: bool | str = "layer") -> keras.Model:
    """Returns the same graph, whose CompositeLayers keep less for the backward pass.

    `keras.RematScope` does this for layers that are made inside it; these exist already. On CPUs,
    memory is saved only with `REMAT_XLA_FLAG`.

    Args:
        graph: Functional model. Only its outermost CompositeLayers, the decoder layers, change.
        remat: One of `REMAT`.
    """
    name = remat_name(remat)
    if name == "nothing":
        return graph

    def is_outermost(layer: Layer, path: str) -> bool:
        return isinstance(layer, CompositeLayer) and "/" not in path

    return rewire(graph, lambda layer, path: Rematerialized(layer, name), where=is_outermost)


@keras.saving.register_keras_serializable("functional_llm")
class Rematerialized(keras.layers.Layer):
    """A layer that keeps little, and is computed again for its gradients.

    Args:
        layer: A built layer, whose weights it uses.
        remat: `"layer"`: only its inputs are kept; `"products"`: also what its matrices make of
            them and what attention's kernels return, so that what is done number by number is
            computed again, and explicit attention.
        **kwargs: As for `keras.layers.Layer`.
    """

    def __init__(self, layer: Layer, remat: str = "layer", **kwargs: Any) -> None:
        super().__init__(**{"name": layer.name, "dtype": layer.dtype_policy, **kwargs})
        self.layer, self.remat = layer, remat_name(remat)
        self.built = True

    def call(self, inputs: Nested, training: bool | None = None) -> Nested:
        leaves, structure = jax.tree.flatten(inputs)
        distinct = {id(x): x for x in leaves}
        numbers = {key: number for number, key in enumerate(distinct)}

        # Values go in and come out: no variable may keep a value of the trace. What was one tensor
        # is one inside too, for that says something: `kernels.Mask.to_tensors`.
        def run(trainable: Values, fixed: Values, values: Values) -> tuple[Nested, Values]:
            inputs = jax.tree.unflatten(structure, [values[numbers[id(x)]] for x in leaves])
            return self.layer.stateless_call(trainable, fixed, inputs, training=training)

        variables = self.layer.non_trainable_variables
        policy = _is_kept if self.remat == "products" else None
        outputs, values = jax.checkpoint(run, policy=policy)(
            [variable.value for variable in self.layer.trainable_variables],
            [variable.value for variable in variables],
            [*distinct.values()],
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
        return {**super().get_config(), "layer": layer, "remat": self.remat}

    @classmethod
    def from_config(cls, config: JSON) -> "Rematerialized":
        layer = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**{**config, "layer": layer})


def _is_kept(primitive: Any, *inputs: Any, **params: Any) -> bool:
    """Whether a result takes long for its size: a product with weights, or a kernel's attention.

    Not explicit attention's products: they have batch axes, and the scores are the largest results
    of all. Not the second product of a LoRA either: as large as the layer's, in float32, of few
    terms.
    """
    if primitive is not dot_general_p:
        return keeps_attended(primitive, *inputs, **params)
    (summed, _), (paired, _) = params["dimension_numbers"]
    terms = math.prod(inputs[0].shape[axis] for axis in summed)
    width = min(math.prod(x.shape) // max(1, terms) for x in inputs)  # of the matrix
    return not paired and terms * _WIDEST >= width
