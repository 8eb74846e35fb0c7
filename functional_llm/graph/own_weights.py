"""Weights that a body uses itself, not by way of a layer: as layers of the graph.

`inputs * self.scale` notes the variable among the arguments of a product, where nobody finds it: a
file could not hold that graph, and a variable that is no attribute would not train.
"""

import itertools
from typing import Any, Self

import keras
from keras import tree

from functional_llm.graph.cloning import clone_graph
from functional_llm.graph.input_specs import inputs_like
from functional_llm.graph.keras_private import calls, is_optional_input
from functional_llm.graph.types import JSON, Layer, Nested, Tensor


@keras.saving.register_keras_serializable("functional_llm")
class OwnWeight(keras.layers.Layer):
    """A layer that returns a variable, whatever its input.

    Args:
        variable: The variable.
        **kwargs: Of `keras.layers.Layer`.
    """

    def __init__(self, variable: keras.Variable, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.variable = variable
        self.built = True

    def call(self, inputs: Tensor) -> Tensor:
        return keras.ops.convert_to_tensor(self.variable)

    def compute_mask(self, inputs: Nested, previous_mask: Nested) -> None:
        """Returns nothing: the mask of the input says nothing of a weight."""
        return

    def load_own_variables(self, store: Any) -> None:
        if store.keys():  # in files of 0.1 only the composite has it
            super().load_own_variables(store)

    def get_config(self) -> JSON:
        variable = self.variable
        described = {
            "name": variable.name,
            "shape": list(variable.shape),
            "dtype": variable.dtype,
            "trainable": variable.trainable,
            "regularizer": keras.regularizers.serialize(variable.regularizer),
            "constraint": keras.constraints.serialize(variable.constraint),
        }
        return {**super().get_config(), "variable": described}

    @classmethod
    def from_config(cls, config: JSON) -> Self:
        described = dict(config["variable"])
        regularizer, constraint = described.pop("regularizer"), described.pop("constraint")
        variable = keras.Variable("zeros", **described)
        variable.regularizer = keras.regularizers.get(regularizer)
        variable.constraint = keras.constraints.get(constraint)
        return super().from_config({**config, "variable": variable})


def with_own_weights(graph: keras.Model, dtype_policy: keras.DTypePolicy) -> keras.Model:
    """Returns a graph whose calls take no variables, but the outputs of an `OwnWeight`.

    Args:
        graph: Functional model. Without variables in its calls, it is returned as it is.
        dtype_policy: That of the layer whose graph it is.
    """
    arguments = tree.flatten([(call.args, call.kwargs) for call in calls(graph)])
    variables = {id(x): x for x in arguments if isinstance(x, keras.Variable)}
    if not variables:
        return graph
    inputs = inputs_like(graph)
    given = [not is_optional_input(x) for x in graph.inputs]
    source = tree.flatten(inputs)[given.index(True) if any(given) else 0]
    names = {operation.name for operation in graph.operations}
    tensors: dict[int, Tensor] = {}
    for key, variable in variables.items():
        numbered = (f"{variable.name}_{i}" for i in itertools.count(1))
        name = next(x for x in itertools.chain([variable.name], numbered) if x not in names)
        names.add(name)
        tensors[key] = OwnWeight(variable, name=name, dtype=dtype_policy)(source)
    return clone_graph(graph, lambda layer: layer, inputs, lambda x: tensors.get(id(x), x))


def weight_of(layer: Layer | None) -> keras.Variable | None:
    """Returns the variable of an `OwnWeight`; `None` for any other layer."""
    return layer.variable if isinstance(layer, OwnWeight) else None


def check_no_ties(graph: keras.Model) -> None:
    """Refuses a graph that uses a weight of one of its layers both through the layer and by itself.

    A file would hold that weight twice, and they would not be one any more.

    Raises:
        NotImplementedError: If there is such a weight.
    """
    own = {id(x.variable): x for x in graph.layers if isinstance(x, OwnWeight)}
    for layer in graph.layers if own else ():
        for variable in layer.weights if not isinstance(layer, OwnWeight) else ():
            if id(variable) in own:
                raise NotImplementedError(
                    f"A graph of '{graph.name}' uses the weight '{variable.name}' of its layer "
                    f"'{layer.name}' outside of that layer: a file would hold two of them. "
                    "Expected a layer for each use, such as keras.layers.ReversibleEmbedding, "
                    "which is called twice."
                )
