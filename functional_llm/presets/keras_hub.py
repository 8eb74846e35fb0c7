"""KerasHub's models in memory to ours, and back."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import keras
import numpy as np

from functional_llm.backbones.families import FAMILIES
from functional_llm.backbones.family import Family, ModelConfig
from functional_llm.backbones.keras_hub.column import KerasHub
from functional_llm.formats.keras_hub_config import make_arguments, read_arguments
from functional_llm.formats.keras_hub_lora import load_lora
from functional_llm.formats.keras_hub_weights import KerasHubLayers, find_layers, layer_place
from functional_llm.formats.table_checks import check_source
from functional_llm.formats.weight_table import (
    Tensor,
    expand_table,
    export_weights,
    load_weights,
    shapes_of,
)
from functional_llm.graph.backend import require_jax
from functional_llm.graph.keras_values import uninitialized
from functional_llm.graph.types import Layer
from functional_llm.presets.backbone import Backbone


def from_keras_hub(
    model_or_preset: keras.Model | str | Path, lora: str | Path | None = None
) -> Backbone:
    """Returns our model of one of KerasHub's: every weight copied once, in its dtype.

    What `enable_lora` has added is merged. The two models share nothing, so that either can be
    trained: Keras writes the results of a step into the weights.

    Args:
        model_or_preset: A KerasHub backbone, its CausalLM task, or a handle of a preset.
        lora: A `.lora.h5` file that KerasHub's `save_lora_weights` has written, to merge as well;
            this needs KerasHub.

    Raises:
        ImportError: If KerasHub is needed and not installed.
        RuntimeError: With another backend than JAX.
        ValueError: If it is no text model that this library has, is quantized, or has numbers or
            weights that are unknown here.
    """
    require_jax("from_keras_hub")
    if lora is not None:
        hub = to_keras_hub(from_keras_hub(model_or_preset))
        load_lora(hub, Path(lora))
        return from_keras_hub(hub)
    if isinstance(model_or_preset, (str, Path)):
        return Backbone.from_preset(model_or_preset)
    model = _backbone_of(model_or_preset)
    arguments, name = model.get_config(), _class_name(model)
    if hasattr(model, "tie_word_embeddings"):  # which LlamaBackbone leaves out of its config
        arguments["tie_word_embeddings"] = model.tie_word_embeddings
    family, config = read_arguments(name, arguments, False, FAMILIES, f"The KerasHub {name}")
    with uninitialized():  # SmolLM3's dtype is not that of its layers
        backbone = Backbone._build(
            family, config, _embedding(model, family, config).dtype_policy.name
        )
    column, tensors = _tensors(backbone, family)
    computed = list(_computed(column, config))
    names = [*(tensor.name for tensor in tensors), *computed]
    source = KerasHubLayers(model, names, column.encoder_places(arguments))
    check_source(tensors, shapes_of(backbone.variables), source, ignored=computed)
    load_weights(backbone.variables, tensors, source)
    return backbone


def to_keras_hub(backbone: Backbone, class_name: str | None = None) -> Any:
    """Returns KerasHub's backbone of our model: every weight copied once, in its dtype.

    Its tasks (`keras_hub.models.Llama3CausalLM(hub_backbone, preprocessor)`), samplers and
    `save_to_preset` work with it. A warning says if its `generate` does not write what it computes.

    Args:
        backbone: The model. Adapters must be merged (`flm.peft.merge`), int8 weights cannot go.
        class_name: Name of the class in `keras_hub.models`, where a family has several:
            `"LlamaBackbone"`, for a Llama with a sentencepiece tokenizer, instead of
            `"Llama3Backbone"`.

    Raises:
        ImportError: If KerasHub is not installed.
        ValueError: If the model was edited, or KerasHub has no such model.
    """
    family = backbone.check_preset()
    arguments = make_arguments(backbone.config, family)
    column, tensors = _tensors(backbone, family)
    name = class_name or column.classes[0]
    if name not in column.classes:
        raise ValueError(
            f"Expected class_name to be one of {', '.join(column.classes)} for a "
            f"{family.model_type}. Received: {class_name!r}."
        )
    if wrong := column.wrong_text(backbone.config):
        warnings.warn(
            f"The `generate` of KerasHub's {name} does not write what the model computes: "
            f"{'; '.join(wrong)}. Train it there, and write text here.",
            stacklevel=2,
        )
    try:
        import keras_hub
    except ImportError as error:
        raise ImportError(
            "to_keras_hub needs KerasHub. Install it with `pip install keras-hub`, or "
            "keras-hub alone with `pip install --no-deps keras-hub` for what needs no TensorFlow."
        ) from error
    with uninitialized(), _dtype_policy(_policy(backbone)):
        hub = getattr(keras_hub.models, name)(**arguments, dtype=_policy(backbone))
    computed = _computed(column, backbone.config)
    layers = KerasHubLayers(hub, [*(tensor.name for tensor in tensors), *computed])
    layers.assign(chain(export_weights(backbone.variables, tensors), computed.items()))
    return hub


@contextmanager
def _dtype_policy(name: str) -> Iterator[None]:
    """Inside, it is the policy of layers that are given none: SmolLM3 gives its layers none."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _computed(column: KerasHub, config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns the values of the weights that follow from the arguments, by their place."""
    places = column.computed(config).items()
    return {place.format(i): x for i in range(config.num_layers) for place, x in places}


def _tensors(backbone: Backbone, family: Family) -> tuple[KerasHub, list[Tensor]]:
    """Returns KerasHub's column of a family, and its tensors for a model."""
    column = family.keras_hub
    if column is None:
        raise ValueError(f"KerasHub has no models of the family {family.model_type!r}.")
    config, shapes = backbone.config, shapes_of(backbone.variables)
    return column, expand_table(column.weights(config), shapes, config.num_layers)


def _embedding(model: keras.Model, family: Family, config: ModelConfig) -> Layer:
    """Returns the layer of a KerasHub model that embeds tokens."""
    rows = () if family.keras_hub is None else family.keras_hub.weights(config)
    places = [place for place, path, _ in rows if path == "token_embedding/embeddings"]
    (layer,) = find_layers(model, [layer_place(place) for place in places]).values()
    return layer


def _backbone_of(model: Any) -> Any:
    """Returns the backbone of a task; a backbone is its own."""
    if not hasattr(model, "backbone"):
        return model
    if not any(_registered(kind).endswith("CausalLM") for kind in type(model).__mro__):
        raise ValueError(
            "Expected a KerasHub backbone, or a task that writes text (CausalLM). Received: a "
            f"{type(model).__name__}, whose own weights would be lost. Give its `backbone`."
        )
    return model.backbone


def _class_name(model: Any) -> str:
    """Returns the name of the KerasHub class that a model is of."""
    for kind in type(model).__mro__:
        package, _, name = _registered(kind).rpartition(">")
        if package in ("keras_hub", "keras_nlp") and isinstance(model, keras.Model):
            return name
    raise ValueError(
        "Expected a KerasHub backbone, its CausalLM task, or the handle of a preset. Received: a "
        f"{type(model).__name__}."
    )


def _registered(kind: type) -> str:
    return str(keras.saving.get_registered_name(kind))


def _policy(backbone: Backbone) -> str:
    stored, computed = str(backbone.variables[0].dtype), backbone.product_dtype
    return stored if stored == computed else f"mixed_{computed}"
