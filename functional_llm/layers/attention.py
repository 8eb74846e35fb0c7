"""The three layers that depend on whether an input is given. All other layers are stock Keras.

Shapes: B batch, T query tokens, S key slots, N query heads, K key/value heads, G = N / K queries
per key head, H head size of queries and keys, V that of values.

A *slot* holds the key and value of one token, and that token's position: -1 if the slot is empty.
Whether a query sees a slot depends on their positions (and segments) alone, so that padding, ragged
batches, chunks and rings need no masks of their own. A padding token has position -1: it sees
nothing, and no token sees it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Self, TypeAlias

import jax
import keras
from keras import ops, tree

from functional_llm.graph.types import JSON, Nested, Tensor
from functional_llm.kernels import (
    AttentionFacts,
    Mask,
    Scoring,
    choose_attention,
)
from functional_llm.layers.cache import store_token, store_tokens

PACKAGE = "functional_llm"


MaskTensors: TypeAlias = "Tensor | Mapping[str, Tensor | None]"


@keras.saving.register_keras_serializable(PACKAGE)
class AttentionMask(keras.layers.Layer):
    """Which slots each query token sees: causal, within a window, within its own segment.

    It returns a description, of which each `AttentionDotProduct` makes what its kernel needs. What
    comes in its place may return one, or the boolean mask (B, T, S) itself: `read_replacement`.

    Args:
        window: Number of positions a token sees, itself included; `None` for all up to itself.
        explicit: Whether to return the boolean mask (B, T, S) instead of a description.
    """

    may_return_none = True  # for those parts of a description that are absent

    def __init__(self, window: int | None = None, explicit: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.window = window
        self.explicit = explicit

    def call(self, inputs: Mapping[str, Tensor]) -> MaskTensors:
        """Describes the mask.

        Args:
            inputs: `query_positions` (B, T) int32; `slot_positions` (B, S) int32, -1 if empty;
                `segment_ids` (B, T) int32 or `None`: a token sees only its own segment. With
                segments, the slots must be the query tokens themselves. `mask` (B, T, S) boolean or
                `None`: a token sees no slot at which it is `False`. `in_order` or `None`: as in
                `Mask.to_tensors`. `first_positions` (B, T) int32, may be left out: a token sees no
                slot of a position below it.

        Returns:
            `Mask.to_tensors`: those inputs, and the window. Or the boolean mask (B, T, S).
        """
        mask = replace(Mask.from_tensors(inputs), window=self.window)
        return mask.visible() if self.explicit else mask.to_tensors()

    def compute_output_spec(self, inputs: Mapping[str, Tensor]) -> Nested:
        batch, queries = inputs["query_positions"].shape
        if self.explicit:
            shape = (batch, queries, inputs["slot_positions"].shape[1])
            return keras.KerasTensor(shape, dtype="bool")
        return _mask_specs(batch, queries)

    def get_config(self) -> JSON:
        return {**super().get_config(), "window": self.window, "explicit": self.explicit}

    @classmethod
    def from_config(cls, config: JSON) -> Self:
        # Files of versions that knew nothing else are explicit: their graphs expect one tensor.
        return cls(**{"explicit": True, **config})

    def read_replacement(self, outputs: MaskTensors) -> MaskTensors:
        """Returns what was called in this layer's place as this layer would have returned it.

        Args:
            outputs: A boolean mask (B, T, S), a description with or without all of its parts, or
                anything else, which is returned as it is.
        """
        is_mask = isinstance(outputs, keras.KerasTensor) and len(outputs.shape) == 3
        parts = {field.name for field in fields(Mask)}
        if self.explicit or not (is_mask or isinstance(outputs, Mapping) and set(outputs) <= parts):
            return outputs
        if not is_mask:
            outputs = {name: x for name, x in outputs.items() if x is not None}
        return DescribedMask(name=f"{self.name}_given")(outputs)


@keras.saving.register_keras_serializable(PACKAGE)
class DescribedMask(keras.layers.Layer):
    """Makes a description of a boolean mask (B, T, S), or of one that may lack parts."""

    may_return_none = True

    def call(self, inputs: MaskTensors) -> MaskTensors:
        return Mask.from_tensors(inputs).to_tensors()

    def compute_output_spec(self, inputs: MaskTensors) -> dict[str, keras.KerasTensor]:
        x = inputs if not isinstance(inputs, Mapping) else next(iter(inputs.values()))
        return _mask_specs(x.shape[0], None)


def _mask_specs(batch: int | None, queries: int | None) -> dict[str, keras.KerasTensor]:
    """Returns symbolic tensors for all parts of a mask, absent or not."""
    return {
        "query_positions": keras.KerasTensor((batch, queries), dtype="int32"),
        "slot_positions": keras.KerasTensor((batch, None), dtype="int32"),
        "segment_ids": keras.KerasTensor((batch, queries), dtype="int32"),
        "mask": keras.KerasTensor((batch, queries, None), dtype="bool"),
        "first_positions": keras.KerasTensor((batch, queries), dtype="int32"),
        "window": keras.KerasTensor((None, None), dtype="int32"),
        "in_order": keras.KerasTensor((batch, queries), dtype="int32"),
    }


@keras.saving.register_keras_serializable(PACKAGE)
class KVCacheLookup(keras.layers.Layer):
    """Joins what was computed for the new tokens with what the cache holds of earlier ones.

    The token at position p belongs in slot p modulo the number of slots, so that a cache with fewer
    slots than tokens is a ring, which keeps the latest ones. Padding is not stored. Each leaf stays
    in its dtype.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"autocast": False, **kwargs})

    def call(self, inputs: Mapping[str, Nested]) -> tuple[Nested, Nested]:
        """Looks up and stores.

        Args:
            inputs: `new`: nested structure of (B, T, ...) tensors; `positions`: (B, T) int32
                positions of the new tokens, -1 for padding; `cache`: the same structure of
                (B, S, ...) tensors, or `None`.

        Returns:
            What the queries may look at, (B, S', ...), and the cache after the new tokens. Without
            a cache both are the new tokens (S' = T). With one new token both are the updated
            cache (S' = S). With several, the queries look at the old cache and the new tokens side
            by side (S' = S + T): storing the last of them in a ring may overwrite what the first
            of them still see.
        """
        return look_up(inputs["new"], inputs["cache"], inputs["positions"])

    def compute_output_spec(self, inputs: Mapping[str, Nested]) -> tuple[Nested, Nested]:
        new, cache = inputs["new"], inputs["cache"]
        if all(x is None for x in tree.flatten(cache)):
            cache = new
        return tree.map_structure(_unknown_slots, new), tree.map_structure(_same_spec, cache)


def look_up(new: Nested, cache: Nested, positions_BT: Tensor) -> tuple[Nested, Nested]:
    """Returns what queries may look at, and the cache with new tokens, as `KVCacheLookup`."""
    if all(x is None for x in tree.flatten(cache)):
        return new, new
    if positions_BT.shape[1] == 1:
        updated = tree.map_structure(lambda n, c: store_token(n, c, positions_BT), new, cache)
        return updated, updated
    visible = tree.map_structure(lambda n, c: ops.concatenate([c, n], axis=1), new, cache)
    updated = tree.map_structure(lambda n, c: store_tokens(n, c, positions_BT), new, cache)
    return visible, updated


def _same_spec(x: Tensor) -> keras.KerasTensor:
    return keras.KerasTensor(x.shape, x.dtype)


def _unknown_slots(x: Tensor) -> keras.KerasTensor:
    return keras.KerasTensor((x.shape[0], None, *x.shape[2:]), x.dtype)


@keras.saving.register_keras_serializable(PACKAGE)
class AttentionDotProduct(keras.layers.Layer):
    """Scaled dot-product attention over the slots that each query sees, grouped queries included.

    What it computes is defined by `kernels.attend_explicitly`. How, `kernels.choose_attention`
    decides when a program is made: see `explain_attention`.

    Args:
        scale: Factor on the scores. Defaults to 1 / sqrt(H).
        soft_cap: Bounds the scores to (-soft_cap, soft_cap) by tanh; `None` for no bound.
        kernel: The name of a kernel: an error if it cannot compute this. Defaults to the best one.
        slopes: By how much each head's scores, scaled, fall with each position to a slot (ALiBi);
            `None` for not at all. Slopes that are learned are an input.
    """

    def __init__(
        self,
        scale: float | None = None,
        soft_cap: float | None = None,
        kernel: str | None = None,
        slopes: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.scale = scale
        self.soft_cap = soft_cap
        self.kernel = kernel
        self.slopes = None if slopes is None else tuple(slopes)

    def call(self, inputs: Mapping[str, Nested]) -> Tensor:
        """Attends.

        Args:
            inputs: `query` (B, T, N, H); `key` (B, S, K, H) and `value` (B, S, K, V), of which
                query head n uses head n // G; `mask`: what an `AttentionMask` returns, or booleans
                (B, T, S). Optional: `sinks` (N,) and `slopes` (N,), as for `attend_explicitly`.

        Returns:
            (B, T, N, V).
        """
        names = ("query", "key", "value")
        q_BTNH, k_BSKH, v_BSKV = (inputs[name] for name in names)
        mask = Mask.from_tensors(inputs["mask"])
        scale = k_BSKH.shape[3] ** -0.5 if self.scale is None else self.scale
        kernel, _ = choose_attention(self.facts(inputs), self.kernel)
        # In float32, whatever the layer's precision.
        slopes = None if self.slopes is None else ops.convert_to_tensor(self.slopes, "float32")
        added = inputs.get("sinks"), inputs.get("slopes", slopes)
        return kernel.attend(q_BTNH, k_BSKH, v_BSKV, mask, Scoring(scale, self.soft_cap), *added)

    def facts(self, inputs: Mapping[str, Nested]) -> AttentionFacts:
        """Returns what is known of a call when its program is made.

        Args:
            inputs: As for `call`; of the tensors, shapes and dtypes are read.
        """
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        mask = Mask.from_tensors(inputs["mask"])
        platform, capability = "other", (0, 0)
        if keras.backend.backend() == "jax" and not isinstance(query, keras.KerasTensor):
            platform, capability = jax.default_backend(), _capability()
        return AttentionFacts(
            platform=platform,
            capability=capability,
            dtype=keras.backend.standardize_dtype(query.dtype),
            batch_size=query.shape[0],
            queries=query.shape[1],
            slots=key.shape[1],
            heads=query.shape[2],
            kv_heads=key.shape[2],
            head_dim=query.shape[3],
            value_dim=value.shape[3],
            soft_cap=self.soft_cap is not None,
            window=mask.window,
            has_positions=mask.slot_positions is not None,
            has_segments=mask.segment_ids is not None,
            has_mask=mask.mask is not None,
            has_first=mask.first_positions is not None,
            in_order=mask.in_order,
            has_sinks=inputs.get("sinks") is not None,
            has_slopes=inputs.get("slopes", self.slopes) is not None,
        )

    def compute_output_spec(self, inputs: Mapping[str, Nested]) -> keras.KerasTensor:
        shape = (*inputs["query"].shape[:3], inputs["value"].shape[3])
        return keras.KerasTensor(shape, dtype=self.compute_dtype)

    def get_config(self) -> JSON:
        own = {"scale": self.scale, "soft_cap": self.soft_cap, "kernel": self.kernel}
        return {**super().get_config(), **own, "slopes": self.slopes}


def _capability() -> tuple[int, int]:
    """Returns the compute capability of an NVIDIA GPU; (0, 0) for all else."""
    numbers = str(getattr(jax.devices()[0], "compute_capability", "")).split(".")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        return 0, 0
    return int(numbers[0]), int(numbers[1])
