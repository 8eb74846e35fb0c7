"""Folding adapters into the weights they change, and back."""

from typing import TypeAlias

import keras
from keras import ops

from functional_llm.graph.freezing import freeze_variables
from functional_llm.graph.keras_private import calls
from functional_llm.graph.rewiring import rewire, shared_copy
from functional_llm.graph.selection import inner_graph, walk
from functional_llm.graph.types import Layer
from functional_llm.peft.adapter import Adapter, find_adapters
from functional_llm.peft.linear import MATRIX_LAYERS, Lookup
from functional_llm.peft.retrained import retrained_copy


class _MergedAdapter:
    """Holds the adapter that a layer was made from, which Keras then neither tracks nor saves."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter


def merge(model: keras.Model, keep: bool = True) -> keras.Model:
    """Returns a model without adapters that computes the same: stock layers, as before.

    The active adapters, each by its weight (see `activate`), are folded in float32 into copies of
    the weights that they change; the new model shares all other weights with `model`. Everything
    trains in it.

    Args:
        model: A model with adapters.
        keep: Whether the new model remembers the adapters and the weights under them, for
            `unmerge`. With `False` their memory is freed.

    Raises:
        ValueError: If there are no adapters.
    """
    if not list(find_adapters(model)):
        raise ValueError(f"'{model.name}' has no adapters. Expected a model with some.")

    heads = {x.operation.name for x in calls(inner_graph(model)) if x.kwargs.get("reverse")}

    def fold(adapter: Adapter, path: str) -> Layer:
        chain = reversed(list(adapter.chain()))
        weighted = [(x, float(ops.convert_to_numpy(x.gate.value))) for x in chain]
        active = [(x, weight) for x, weight in weighted if weight != 0]
        if not isinstance(adapter.origin, MATRIX_LAYERS):
            inners = [(x.inner, weight) for x, weight in active]
            layer = retrained_copy(adapter.origin, inners)
        elif isinstance(adapter.origin, keras.layers.Embedding):
            layer = _fold_embedding(adapter.origin, active, path in heads)
        else:
            layer = _fold_linear(adapter, active)
        if keep:
            layer.merged_adapter = _MergedAdapter(adapter)
        return layer

    return rewire(model, fold, where=Adapter, freeze=False)


_Weighted: TypeAlias = list[tuple[Adapter, float]]


def _fold_linear(adapter: Adapter, active: _Weighted) -> Layer:
    linear, kernel, bias = adapter.linear, adapter.linear.kernel(), adapter.linear.bias()
    for one, weight in active:
        kernel_change, bias_change = one.kernel_change(), one.bias_change()
        kernel = kernel if kernel_change is None else kernel + weight * kernel_change
        if bias_change is not None:
            bias_change = weight * bias_change
            bias = bias_change if bias is None else bias + bias_change
    return linear.make_layer(kernel, bias, adapter.activation)


def _fold_embedding(origin: Layer, active: _Weighted, is_head: bool) -> Layer:
    """Returns an embedding; a head that it is, too, gets a matrix of its own if they differ now."""
    tables = {reverse: Lookup(origin).kernel() for reverse in (False, True)}
    for one, weight in active:
        change = one.kernel_change()
        for reverse in tables:
            if change is not None and one.changes(reverse):
                change_here = change if one.linear.takes_integers else ops.transpose(change)
                tables[reverse] += weight * change_here
    config = {key: x for key, x in origin.get_config().items() if key != "quantization_config"}
    config["dtype"] = origin.dtype_policy.name.rpartition("_from_")[2]
    untied = is_head and any(one.reverse is not None for one, _ in active)
    if untied:
        config["tie_weights"] = False
    is_reversible = isinstance(origin, keras.layers.ReversibleEmbedding)
    cls = keras.layers.ReversibleEmbedding if is_reversible else type(origin)
    new = cls.from_config(config)
    new.build_from_config(origin.get_build_config())
    new.embeddings.assign(ops.copy(tables[False]))
    if untied:
        new.reverse_embeddings.assign(ops.copy(ops.transpose(tables[True])))
    return new


def unmerge(model: keras.Model) -> keras.Model:
    """Returns the model with its adapters again, exactly as they were merged.

    Args:
        model: From `merge`, with `keep`.

    Raises:
        ValueError: If nothing in it remembers an adapter.
    """
    merged = {p: x for p, x in walk(model) if hasattr(x, "merged_adapter")}
    if not merged:
        raise ValueError(
            f"'{model.name}' has nothing to unmerge. Expected a model from `merge(..., keep=True)`."
        )
    new_model = rewire(
        model,
        lambda layer, path: shared_copy(layer.merged_adapter.adapter),
        where=lambda _, path: path in merged,
    )
    own = [v for _, x in find_adapters(new_model) for v in x.adapter_weights.values()]
    freeze_variables(new_model, [v for v in new_model.variables if all(v is not w for w in own)])
    return new_model
