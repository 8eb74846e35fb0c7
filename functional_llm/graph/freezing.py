"""Freezing weights in one model that train in another which shares them."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import keras

from functional_llm.graph.types import Layer

FROZEN = "_frozen"  # the attribute of a Freezable


class Freezable:
    """A mixin for models: a weight may be frozen in one model and train in another.

    Keras keeps "trainable" on the variable, which all models that use it share. Put this class
    before `keras.Model` to keep it on the model as well:
    `class MyModel(Freezable, keras.Model)`.
    """

    # Variables by id. A proxy, because Keras would track those in a dict as the model's own.
    _frozen: Mapping[int, keras.Variable] = MappingProxyType({})

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        variables = super().trainable_variables  # type: ignore[misc]
        return [v for v in variables if id(v) not in self._frozen]

    @property
    def non_trainable_variables(self) -> list[keras.Variable]:
        trainable = set(map(id, self.trainable_variables))
        return [v for v in self.variables if id(v) not in trainable]  # type: ignore[attr-defined]

    @property
    def trainable_weights(self) -> list[keras.Variable]:
        weights = super().trainable_weights  # type: ignore[misc]
        return [v for v in weights if id(v) not in self._frozen]

    @property
    def non_trainable_weights(self) -> list[keras.Variable]:
        trainable = set(map(id, self.trainable_weights))
        return [v for v in self.weights if id(v) not in trainable]  # type: ignore[attr-defined]


def keep_frozen(model: Layer, new_model: keras.Model, freeze: bool | None) -> None:
    """Freezes in a new model what `freeze` says, as for `rewire`."""
    before = () if freeze is False else getattr(model, FROZEN, {}).values()
    freeze_variables(new_model, [*before, *(model.variables if freeze else ())])


def freeze_variables(model: keras.Model, variables: Iterable[keras.Variable]) -> None:
    """Freezes variables in this model and in no other; what it froze before trains again.

    Args:
        model: A model with the mixin `Freezable`, or one whose variables do not train anyway.
        variables: The variables. Those that the model does not have are ignored.
    """
    present = set(map(id, model.variables))
    frozen = {id(v): v for v in variables if id(v) in present}
    if isinstance(model, Freezable):
        model._frozen = MappingProxyType(frozen)
    elif any(v.trainable for v in frozen.values()):
        raise ValueError(
            f"{type(model).__name__} '{model.name}' cannot freeze in one model what trains in "
            "another: Keras keeps that on the variables, which both share. Set "
            "`model.trainable = False` first, which freezes the original as well, or give the "
            "model a class with the mixin `Freezable`."
        )
