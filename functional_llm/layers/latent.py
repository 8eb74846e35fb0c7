"""Multi-head latent attention's own layers: keys and values out of latents, or attention to those.

Keys and values of all heads are linear in one vector of a token, its latent. Of many tokens they
are expanded. To expand a whole cache for one token would take most of its time; its queries and
what it attends to are multiplied with the same matrices instead ("absorbed"), and the cache of
latents is attended to as it is.

Shapes: B batch, T query tokens, S key slots, N heads, R latent, P rotated key that all heads share,
H the rest of a key, V value.

Reference:
    [DeepSeek-V2](https://arxiv.org/abs/2405.04434), section 2.1.2 and appendix C.
"""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.keras_private import calls
from functional_llm.graph.types import JSON, Layer, Nested, Tensor
from functional_llm.layers.attention import AttentionDotProduct

PACKAGE = "functional_llm"


@keras.saving.register_keras_serializable(PACKAGE)
class LatentProduct(CompositeLayer):
    """Attention to latents, out of which its graph makes keys and values: two Dense layers.

    For one token it absorbs them, if the graph is as it was but for what stands in their places,
    and of that the matrices are known (`product_matrix`). An `AttentionDotProduct` attends either
    way, to N keys (H + P) or to one key (R + P).

    Args:
        num_heads: N.
        rotary_dim: P.
        value_dim: V.
        scale: Factor on the scores.
        **kwargs: Of `keras.layers.Layer`.
    """

    def __init__(
        self, num_heads: int, rotary_dim: int, value_dim: int, scale: float, **kwargs: Any
    ) -> None:
        super().__init__(**{"autocast": False, **kwargs})
        self.num_heads = num_heads
        self.rotary_dim = rotary_dim
        self.value_dim = value_dim
        self.scale = scale

    def functional_build(self, inputs: Mapping[str, Nested]) -> Tensor:
        def dense(size: int, name: str) -> Layer:
            return keras.layers.Dense(self.num_heads * size, use_bias=False, name=name)

        query, both = inputs["query"], inputs["latent"]
        latent = LatentPart(both.shape[-1] - self.rotary_dim, name="latent_part")(both)
        key = dense(query.shape[-1] - self.rotary_dim, "key")(latent)
        value = dense(self.value_dim, "value")(latent)
        heads = LatentHeads(self.rotary_dim, name="heads")
        parts = heads({"query": query, "latent": both, "key": key, "value": value})
        attend = AttentionDotProduct(self.scale, name="dot_product")
        return attend({**parts, "mask": inputs["mask"]})

    def call(
        self,
        inputs: Mapping[str, Nested],
        training: bool | None = None,
        mask: Nested | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            inputs: `query` (B, T, N, H + P), rotated; `latent` (B, S, R + P), the shared key behind
                the latent; `mask` as for `AttentionDotProduct`.

        Returns:
            (B, T, N, V).
        """
        if inputs["query"].shape[1] == 1 and not training:
            parts = self.absorbable()
            if parts is not None:
                return _attend_absorbed(inputs, self.rotary_dim, *parts)
        return super().call(inputs, training=training, mask=mask)

    def absorbable(self) -> tuple[Layer, Tensor, Tensor] | None:
        """Returns what attends and the matrices of keys and values, if the graph is as it was."""
        graph = self._built()[0]
        found = list(calls(graph))
        of_kind = {type(call.operation): call for call in found}
        kinds = (AttentionDotProduct, LatentHeads, LatentPart)
        if len(found) != 5 or len(graph.outputs) != 1 or not of_kind.keys() >= {*kinds}:
            return None
        attend, heads, part = (of_kind[kind] for kind in kinds)
        made = {id(x): call for call in found for x in call.outputs}
        given, received = heads.args[0], attend.args[0]
        key, value = (made.get(id(given[name])) for name in ("key", "value"))
        if key is None or value is None or key is value:
            return None
        is_alike = (
            graph.outputs[0] is attend.outputs[0]
            and all(x is part.outputs[0] for x in (*key.inputs, *value.inputs))
            and given["latent"] is part.inputs[0]
            and set(received) == {"query", "key", "value", "mask"}
            and all(made.get(id(received[x])) is heads for x in ("query", "key", "value"))
        )
        if not is_alike:
            return None
        matrices = product_matrix(key.operation), product_matrix(value.operation)
        return None if any(x is None for x in matrices) else (attend.operation, *matrices)


def _attend_absorbed(
    inputs: Mapping[str, Nested], rotary_dim: int, attend: Layer, key: Tensor, value: Tensor
) -> Tensor:
    """Returns what attention to latents makes of queries.

    Args:
        inputs: As for `LatentProduct`.
        rotary_dim: P.
        attend: The `AttentionDotProduct`.
        key: (R, N * H).
        value: (R, N * V).
    """
    query, latent = inputs["query"], inputs["latent"]
    (rank, _), heads, size = key.shape, query.shape[2], query.shape[3] - rotary_dim
    key_RNH = ops.reshape(key, (rank, heads, size))
    value_RNV = ops.reshape(value, (rank, heads, -1))
    absorbed = ops.einsum("btnh,rnh->btnr", ops.cast(query[..., :size], key.dtype), key_RNH)
    both = ops.concatenate([ops.cast(absorbed, query.dtype), query[..., size:]], axis=-1)
    # As the value, the latent comes with the key behind it: to cut that off is a copy of the cache.
    shared = ops.expand_dims(latent, 2)
    inner = {"query": both, "key": shared, "value": shared, "mask": inputs["mask"]}
    latents = ops.cast(attend(inner)[..., :rank], value.dtype)
    return ops.cast(ops.einsum("btnr,rnv->btnv", latents, value_RNV), latent.dtype)


def product_matrix(layer: Layer) -> Tensor | None:
    """Returns the matrix (in, out) with which a layer multiplies, if it does nothing else.

    A layer of another kind says it by a method of this name.

    Args:
        layer: A built layer.
    """
    if hasattr(layer, "product_matrix"):
        return layer.product_matrix()
    is_plain = type(layer) is keras.layers.Dense and layer.quantization_mode is None
    if not is_plain or layer.bias is not None or layer.lora_enabled:
        return None
    if layer.activation is not keras.activations.linear:
        return None
    return ops.cast(layer.kernel, layer.compute_dtype)


@keras.saving.register_keras_serializable(PACKAGE)
class LatentPart(keras.layers.Layer):
    """The first numbers of the last axis.

    Args:
        size: How many.
        **kwargs: Of `keras.layers.Layer`.
    """

    def __init__(self, size: int, **kwargs: Any) -> None:
        super().__init__(**{"autocast": False, **kwargs})
        self.size = size

    def call(self, x: Tensor) -> Tensor:
        return x[..., : self.size]

    def get_config(self) -> JSON:
        return {**super().get_config(), "size": self.size}


@keras.saving.register_keras_serializable(PACKAGE)
class LatentHeads(keras.layers.Layer):
    """Splits keys and values into heads, and puts the shared key behind that of each head.

    Args:
        rotary_dim: P.
        **kwargs: Of `keras.layers.Layer`.
    """

    def __init__(self, rotary_dim: int, **kwargs: Any) -> None:
        super().__init__(**{"autocast": False, **kwargs})
        self.rotary_dim = rotary_dim

    def call(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Splits.

        Args:
            inputs: `query` (B, T, N, H + P); `latent` (B, S, R + P); `key` (B, S, N * H) and
                `value` (B, S, N * V).

        Returns:
            `query` as it is, `key` (B, S, N, H + P) and `value` (B, S, N, V).
        """
        query, latent = inputs["query"], inputs["latent"]
        heads = query.shape[2]
        shared = ops.expand_dims(latent[..., latent.shape[-1] - self.rotary_dim :], 2)
        key = [_split(inputs["key"], heads), ops.repeat(shared, heads, axis=2)]
        value = _split(inputs["value"], heads)
        return {"query": query, "key": ops.concatenate(key, axis=-1), "value": value}

    def compute_output_spec(self, inputs: Mapping[str, Tensor]) -> dict[str, keras.KerasTensor]:
        query, value = inputs["query"], inputs["value"]
        batch, _, heads, size = query.shape
        return {
            "query": keras.KerasTensor(query.shape, query.dtype),
            "key": keras.KerasTensor((batch, None, heads, size), query.dtype),
            "value": keras.KerasTensor((batch, None, heads, value.shape[-1] // heads), value.dtype),
        }

    def get_config(self) -> JSON:
        return {**super().get_config(), "rotary_dim": self.rotary_dim}


def _split(x: Tensor, heads: int) -> Tensor:
    """Returns (B, S, heads, ...) of (B, S, ...)."""
    sizes = (heads, x.shape[-1] // heads)
    if isinstance(x, keras.KerasTensor):  # of which `ops.reshape` cannot leave both B and S open
        return keras.layers.Reshape((-1, *sizes), dtype=x.dtype)(x)
    return ops.reshape(x, (*ops.shape(x)[:2], *sizes))
