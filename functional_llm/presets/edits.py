"""What was edited in a model since its family built it: read off, and put back."""

import keras
import numpy as np

from functional_llm.backbones.family import Family
from functional_llm.edits.quantization import (
    choose_modes,
    quantize,
    quantized_modes,
    to_load,
    with_uninitialized,
)
from functional_llm.formats.source import Edits, Source
from functional_llm.graph.equality import same_graph
from functional_llm.peft.adapter import origin_of
from functional_llm.peft.serialization import adapters_to_config, attach_from_config


def edits_of(model: keras.Model, plain: keras.Model) -> Edits | None:
    """Returns what was edited in a model; `None` if that is more than `Edits` can say.

    Args:
        model: A Backbone.
        plain: What its family builds for its config.
    """
    if not same_graph(model, plain, origin_of):
        return None
    return Edits(quantized=quantized_modes(model, origin_of), adapters=adapters_to_config(model))


def apply_edits(model: keras.Model, edits: Edits, has_values: bool) -> keras.Model:
    """Returns a model edited as `edits` says; the values of what is new are yet to be loaded.

    Args:
        model: What a family has built.
        edits: From `Source.edits`.
        has_values: Whether the model's variables have values.
    """
    model = with_uninitialized(model, edits.quantized)
    if not has_values:
        adapted = {layer for adapter in edits.adapters for layer in adapter["layers"]}
        for variable in model.variables:
            if variable.path.rpartition("/")[0] in adapted:
                # Methods decompose what they adapt. Integers are divided by a scale: no zeros.
                variable.assign(np.ones(variable.shape, "float32"))
    return attach_from_config(model, edits.adapters)


def quantized(model: keras.Model, mode: str | None) -> keras.Model:
    """Returns `flm.quantize` of a model; the model itself without a mode."""
    return model if mode is None else quantize(model, mode)


def load_into(source: Source, model: keras.Model, mode: str | None) -> keras.Model:
    """Returns a model with its weights, which are quantised as they are read.

    Args:
        source: The files.
        model: From `apply_edits`, without values.
        mode: As for `flm.quantize`; `None` for the weights as they are.
    """
    if mode is None or not source.has_tensors:
        source.load(model)
        return quantized(model, mode)
    new = with_uninitialized(model, choose_modes(model, mode))
    source.load(new, to_load(new, model))
    return new


def check_unedited(model: keras.Model, family: Family, plain: keras.Model) -> None:
    """Checks that a model is what its config promises, weights and graph.

    Args:
        model: A Backbone.
        family: Its family.
        plain: What the family builds for its config.

    Raises:
        ValueError: If the graph has other weights, as with adapters that are not merged, or layers
            that were dropped (all are named), or it was rewired in another way.
    """
    if modes := quantized_modes(model):
        raise ValueError(
            f"Expected a model in floating point: a directory holds no integers. Received "
            f"{len(modes)} quantised layers ({', '.join(list(modes)[:3])} ...). Save it as a "
            ".keras file with `save`. Of an adapter trained on it, save the adapter "
            "(`flm.peft.save_adapter`): it can be merged into the model that was not quantised."
        )
    expected = {v.path: tuple(v.shape) for v in plain.variables}
    received = {v.path: tuple(v.shape) for v in model.variables}
    problems = [
        f"'{path}': expected {expected.get(path, 'no such weight')}, received "
        f"{received.get(path, 'none')}"
        for path in sorted(expected.keys() | received.keys())
        if expected.get(path) != received.get(path)
    ]
    if problems:
        raise ValueError(
            f"The model does not fit its config, {len(problems)} differences:\n  "
            + "\n  ".join(problems[:20])
            + "\nA directory would lose them. Merge adapters first. What adds weights, as "
            "biases, or a head of its own beside a tied embedding, is saved as an adapter "
            "(`flm.peft.save_adapter`) or in a .keras file (`save`)."
        )
    if not same_graph(model, plain):
        raise ValueError(
            f"The model was rewired: its graph is not that of '{family.model_type}', which is "
            "all that a directory can say. Save it as a .keras file with `save`, graph and all."
        )
