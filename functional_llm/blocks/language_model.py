"""A stack of decoder layers between an embedding and a head.

Shapes: B batch, T tokens, S slots, W positions of a window, D model, V vocabulary.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import keras
from keras import ops

from functional_llm.blocks.attention import (
    Inputs,
    Kept,
    Part,
    PartFunction,
    Shapes,
    apply_parts,
)
from functional_llm.blocks.rope import Rope, rotation
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import Nested, Tensor
from functional_llm.layers.attention import AttentionMask, KVCacheLookup
from functional_llm.layers.states import PaddingBack, PaddingLast, StatePosition

Kinds: TypeAlias = str | tuple[str, ...]  # the type of a layer, or all that it is of
Graph: TypeAlias = tuple[dict[str, Nested], dict[str, Nested]]  # symbolic inputs and outputs
# From embedded tokens and the model's inputs to what each decoder layer receives of its own.
OwnInputs: TypeAlias = Callable[[Tensor, Inputs], Sequence[Inputs]]


@dataclass(frozen=True)
class LayerType:
    """What the layers of one type share.

    Args:
        rope: The rotary embedding of their queries and keys; `None` for none.
        window: Number of positions a token sees, itself included; `None` for all up to itself.
            Layers with a window keep a ring of that many slots.
        chunk: Length of the chunks that a text is cut into: a token sees those of its own chunk up
            to itself. Such layers keep a ring of that many slots, too; `None` for no chunks.
    """

    rope: Rope | None = None
    window: int | None = None
    chunk: int | None = None

    @property
    def slots(self) -> int | None:
        """How many slots such layers keep; `None` for one for each token."""
        sizes = [size for size in (self.window, self.chunk) if size is not None]
        return min(sizes, default=None)


@dataclass(frozen=True)
class StateType:
    """Layers of one type that keep a state of all tokens so far: their cache has one slot."""

    slots: int = field(default=1, init=False)


def causal_lm(
    *,
    vocabulary_size: int,
    hidden_dim: int,
    layer_types: Mapping[str, LayerType | StateType],
    layers: Sequence[tuple[Kinds, CompositeLayer]],
    keeps: Shapes | Sequence[Shapes | Sequence[Shapes]],
    final_norm: Part,
    tie_word_embeddings: bool,
    head_bias: bool = False,
    embedding_parts: Sequence[Part] = (),
    logit_parts: Sequence[Part] = (),
    own_inputs: OwnInputs | None = None,
    lenders: Mapping[str, str] | None = None,
) -> Graph:
    """Builds the graph of a language model.

    Args:
        vocabulary_size: V.
        hidden_dim: D.
        layer_types: Name of a type -> what its layers share.
        layers: Decoder layers in order, each with the name of its type; or with those of several,
            as layers that attend and keep a state have, or of none, as those that keep nothing.
        keeps: What all layers keep of a token in the cache, or what each of them keeps; in a dtype
            of its own where it is a `Kept`, nothing where it is an empty dict. Of a `StateType`,
            the states. Of a layer with several types, one for each of them.
        final_norm: Part before the head.
        tie_word_embeddings: Whether the head is the transposed embedding.
        head_bias: Whether a head of its own adds a bias.
        embedding_parts: Parts after the embedding; they may use the input "positions".
        logit_parts: Parts after the head.
        own_inputs: What each layer receives beside what its type shares.
        lenders: Name of a layer -> name of the earlier one of its type whose "lent" it receives;
            such a layer keeps nothing itself.

    Returns:
        Inputs `token_ids`, `positions`, `segment_ids`, `mask`, `in_order`, `cache`; outputs
        `logits` (B, T, V), `hidden` (B, T, D), which the head turns into logits, and `cache`. A
        cache holds, for each type of layers, the positions in its slots and what each layer keeps.

    Raises:
        ValueError: If a lender is no earlier layer, or lends nothing.
    """
    kinds = [(kind,) if isinstance(kind, str) else kind for kind, _ in layers]
    used = {kind: layer_types[kind] for kind in dict.fromkeys(itertools.chain(*kinds))}
    all_keep = [keeps] * len(layers) if isinstance(keeps, Mapping) else keeps
    kept: dict[str, dict[str, Shapes]] = {kind: {} for kind in used}
    for own_kinds, (_, layer), keep in zip(kinds, layers, all_keep, strict=True):
        each = [keep] if isinstance(keep, Mapping) else keep
        for kind, own in zip(own_kinds, each, strict=True):
            kept[kind][layer.name] = own
    inputs = make_inputs(used, kept)
    read = _with_padding_last(inputs) if _has_states(used) else inputs
    embedding = keras.layers.ReversibleEmbedding(
        vocabulary_size, hidden_dim, name="token_embedding"
    )
    x = apply_parts(embedding_parts, embedding(read["token_ids"]), read)
    shared, cache = {}, {}
    for kind, layer_type in used.items():
        shared[kind], slot_positions = shared_inputs(kind, layer_type, read)
        cache[kind] = {"positions": slot_positions}
    each = own_inputs(x, read) if own_inputs else [{}] * len(layers)
    lent: dict[str, Nested] = {}
    lenders = lenders or {}
    for own_kinds, (_, layer), own in zip(kinds, layers, each, strict=True):
        given: Inputs = {"x": x, "positions": read["positions"], "cache": {}, **own}
        if layer.name in lenders:
            given["lent"] = _lent_by(lenders[layer.name], layer.name, lent)
        for kind in own_kinds:
            given |= shared[kind]
            given["cache"] |= inputs["cache"][kind][layer.name]
        result = layer(given)
        x, lent[layer.name] = result["x"], result.get("lent")
        for kind in own_kinds:
            names = inputs["cache"][kind][layer.name]
            cache[kind][layer.name] = {name: result["cache"][name] for name in names}
    hidden = apply_parts([final_norm], x, read)
    if _has_states(used):
        hidden = PaddingBack(name="padding_back")({"x": hidden, "places": read["places"]})
    if tie_word_embeddings:
        logits = embedding(hidden, reverse=True)
    else:
        logits = keras.layers.Dense(vocabulary_size, use_bias=head_bias, name="head")(hidden)
    logits = apply_parts(logit_parts, logits, inputs)
    return inputs, {"logits": logits, "hidden": hidden, "cache": cache}


def _lent_by(lender: str, borrower: str, lent: Mapping[str, Nested]) -> Nested:
    lending = [name for name, tensors in lent.items() if tensors is not None]
    if lender not in lending:
        raise ValueError(
            f'Expected the lender of {borrower} to be an earlier layer that returns "lent". '
            f"Received: {lender!r}; such layers are {lending}."
        )
    return lent[lender]


def _has_states(types: Mapping[str, LayerType | StateType]) -> bool:
    return any(isinstance(x, StateType) for x in types.values())


def _with_padding_last(inputs: Inputs) -> Inputs:
    """Returns the inputs with all padding behind the tokens, and `places` to move it back."""
    names = ("token_ids", "positions", "segment_ids", "in_order")
    moved = PaddingLast(name="padding_last")({name: inputs[name] for name in names})
    return {**inputs, **moved}


def make_inputs(
    types: Mapping[str, LayerType | StateType], kept: Mapping[str, Mapping[str, Shapes]]
) -> Inputs:
    """Returns the symbolic inputs of a language model.

    Args:
        types: Name of a type -> the type.
        kept: Name of a type -> what each of its layers keeps.

    Returns:
        `token_ids` and `positions` (B, T) int32; `segment_ids` (B, T) int32, optional; `mask`,
        optional, (B, T, S) boolean for types that attend; `in_order`, optional: the very tensor
        `positions` if it is certain that in each row they are 0, 1, 2 ..., padding only behind them
        (`Mask.to_tensors`); `cache`,
        optional, for each type: `positions` (B, S) int32, the position of the token in each slot,
        and what each layer keeps, (B, S, ...).
    """
    dtype = keras.config.dtype_policy().compute_dtype

    def make(name: str, slots: int | None, own: tuple[int, ...] | Kept | Shapes) -> Nested:
        if isinstance(own, Mapping):
            return {key: make(f"{name}_{key}", slots, inner) for key, inner in own.items()}
        kept = own if isinstance(own, Kept) else Kept(own, dtype)
        return keras.Input((slots, *kept.shape), dtype=kept.dtype, name=name, optional=True)

    cache = {}
    for kind, layer_type in types.items():
        name, slots = f"cache_{kind}_positions", layer_type.slots
        positions = keras.Input((slots,), dtype="int32", name=name, optional=True)
        cache[kind] = {"positions": positions, **make("cache", slots, kept[kind])}
    return {
        "token_ids": keras.Input((None,), dtype="int32", name="token_ids"),
        "positions": keras.Input((None,), dtype="int32", name="positions"),
        "segment_ids": keras.Input((None,), dtype="int32", name="segment_ids", optional=True),
        "mask": {
            kind: keras.Input((None, None), dtype="bool", name=f"mask_{kind}", optional=True)
            for kind, layer_type in types.items()
            if isinstance(layer_type, LayerType)
        },
        "in_order": keras.Input((None,), dtype="int32", name="in_order", optional=True),
        "cache": cache,
    }


def shared_inputs(
    kind: str, layer_type: LayerType | StateType, inputs: Inputs
) -> tuple[dict[str, Nested], Tensor]:
    """Returns what layers of a type receive beside `x`, and their cache's positions afterwards."""
    positions = inputs["positions"]
    if isinstance(layer_type, StateType):
        before = inputs["cache"][kind]["positions"]
        tag = StatePosition(name=f"{kind}_positions")({"positions": positions, "cache": before})
        shared = {name: inputs[name] for name in ("positions", "segment_ids")}
        return {**shared, "state_position": before}, tag
    slot_positions, kept = KVCacheLookup(name=f"{kind}_positions")(
        {"new": positions, "cache": inputs["cache"][kind]["positions"], "positions": positions}
    )
    parts = {
        "query_positions": positions,
        "slot_positions": slot_positions,
        "segment_ids": inputs["segment_ids"],
        "mask": inputs["mask"][kind],
        "in_order": inputs["in_order"],
    }
    if layer_type.chunk is not None:
        parts["first_positions"] = positions // layer_type.chunk * layer_type.chunk
    mask = AttentionMask(layer_type.window, name=f"{kind}_mask")(parts)
    shared = {"positions": positions, "mask": mask}
    if layer_type.rope is not None:
        turned = rotation(positions, layer_type.rope, inputs["segment_ids"], kind)
        dtype = keras.config.dtype_policy().compute_dtype
        shared["rotation"] = {key: ops.cast(x, dtype) for key, x in turned.items()}
    return shared, kept


def scale(factor: float) -> PartFunction:
    """Part that multiplies by a number."""
    return lambda x, inputs: x * factor


def soft_cap(bound: float) -> PartFunction:
    """Part that bounds values to (-bound, bound) by tanh.

    Reference:
        [Gemma 2](https://arxiv.org/abs/2408.00118), section 2.
    """
    return lambda x, inputs: ops.tanh(x / bound) * bound


def learned_positions(max_sequence_length: int, hidden_dim: int, offset: int = 0) -> PartFunction:
    """Part that adds a learned vector for each position.

    Args:
        max_sequence_length: How many positions there are.
        hidden_dim: D.
        offset: Row of the table that belongs to position 0.
    """
    rows = max_sequence_length + offset
    embedding = keras.layers.Embedding(rows, hidden_dim, name="position_embedding")
    # Padding has position -1. It may get any vector, because no token sees it.
    return lambda x, inputs: x + embedding(ops.maximum(inputs["positions"], 0) + offset)
