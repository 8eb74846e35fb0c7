"""Self-attention as parts in order.

Shapes: B batch, T tokens, D model, N query heads, K key/value heads, H head size.

A *part* is a layer, or a function `(x, inputs) -> x` that may use the block's other inputs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import keras
from keras import ops

from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import Nested, Tensor
from functional_llm.layers.attention import AttentionDotProduct, KVCacheLookup

Inputs: TypeAlias = dict[str, Nested]
PartFunction: TypeAlias = Callable[[Tensor, Inputs], Tensor]
Part: TypeAlias = keras.layers.Layer | PartFunction
Product: TypeAlias = Callable[[Inputs], Tensor]  # of an `AttentionDotProduct`'s inputs


@dataclass(frozen=True)
class Kept:
    """What is kept of one token, in a dtype of its own.

    Args:
        shape: Of it.
        dtype: The name of that in which the layer computes it.
    """

    shape: tuple[int, ...]
    dtype: str


# What is kept of one token; shapes alone are in the dtype that the model computes in.
Shapes: TypeAlias = Mapping[str, "tuple[int, ...] | Kept | Shapes"]


def apply_parts(parts: Sequence[Part], x: Tensor, inputs: Inputs) -> Tensor:
    """Returns `x` after the parts, in the order written."""
    for part in parts:
        x = part(x) if isinstance(part, keras.layers.Layer) else part(x, inputs)
    return x


def heads(num_heads: int, head_dim: int, name: str, use_bias: bool = False) -> PartFunction:
    """Projects (B, T, D) to (B, T, num_heads, H) by one Dense called `name`."""
    project = keras.layers.Dense(num_heads * head_dim, use_bias=use_bias, name=name)
    split = split_heads(num_heads, head_dim, name)
    return lambda x, inputs: split(project(x))


def split_heads(num_heads: int, head_dim: int, name: str) -> keras.layers.Layer:
    """Splits (B, T, num_heads * H) into (B, T, num_heads, H)."""
    return keras.layers.Reshape((-1, num_heads, head_dim), name=f"{name}_heads")


def key_value_shapes(num_heads: int, head_dim: int) -> Shapes:
    """Returns what a decoder layer with one `attention` keeps of a token: keys and values."""
    shape = (num_heads, head_dim)
    return {"attention": {"key": shape, "value": shape}}


def alibi_slopes(num_heads: int) -> list[float]:
    """Returns ALiBi's slope for each head, for `AttentionDotProduct`.

    Of a number of heads that is no power of two, the heads beyond one get every second slope of
    twice as many heads.

    Reference:
        [Train Short, Test Long](https://arxiv.org/abs/2108.12409), section 3, and its code.
    """
    whole = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * i / whole) for i in range(1, whole + 1)]
    between = [2.0 ** (-4 * (2 * i + 1) / whole) for i in range(num_heads - whole)]
    return slopes + between


def attention(
    query: Sequence[Part],
    key: Sequence[Part],
    value: Sequence[Part],
    output: keras.layers.Layer,
    product: Product | None = None,
    *,
    key_and_value: Sequence[Part] = (),
    lends: bool = False,
) -> CompositeLayer:
    """Self-attention over the new tokens and those in the cache.

    Args:
        query: Parts from (B, T, D) to (B, T, N, H).
        key: Parts from (B, T, D) to (B, T, K, H).
        value: Parts from (B, T, D) to (B, T, K, V); V is the head size of the values.
        output: Layer from (B, T, N * V) to (B, T, D).
        product: What attends: an `AttentionDotProduct`, which is the default, or a function that
            calls one with more inputs, such as `attending_with_sinks`.
        key_and_value: Parts before those of keys and before those of values, which both take what
            comes out of them.
        lends: Whether the layer also returns the keys and values that its queries look at, those
            in the cache among them, for a `borrowing_attention`.

    Returns:
        Layer from `{"x": (B, T, D), "positions", "mask", "rotation", "cache"}` to
        `{"x": (B, T, D), "cache": {"key", "value"}}`, and `"lent": {"key", "value"}` if it lends,
        (B, S, K, H) and (B, S, K, V).
    """
    attend = _attending(output, product)

    def body(inputs: Inputs) -> dict[str, Nested]:
        x = inputs["x"]
        q_BTNH = apply_parts(query, x, inputs)
        x = apply_parts(key_and_value, x, inputs)
        new = {"key": apply_parts(key, x, inputs), "value": apply_parts(value, x, inputs)}
        visible, cache = KVCacheLookup(name="kv_cache_lookup")(
            {"new": new, "cache": inputs["cache"], "positions": inputs["positions"]}
        )
        result = {"x": attend(q_BTNH, visible, inputs), "cache": cache}
        return {**result, "lent": visible} if lends else result

    return CompositeLayer(body, name="attention", autocast=False)  # a cache keeps its dtypes


def borrowing_attention(
    query: Sequence[Part], output: keras.layers.Layer, product: Product | None = None
) -> "BesideX":
    """Attention to the keys and values of an earlier layer: it has none, and keeps nothing.

    Args:
        query: As for `attention`.
        output: As for `attention`.
        product: As for `attention`.

    Returns:
        A part named "attention" that also takes the block's inputs "positions", "mask", "rotation"
        and "lent".

    Reference:
        [You Only Cache Once](https://arxiv.org/abs/2405.05254), which shares those of one layer.
    """
    attend = _attending(output, product)

    def body(inputs: Inputs) -> Tensor:
        return attend(apply_parts(query, inputs["x"], inputs), inputs["lent"], inputs)

    layer = CompositeLayer(body, name="attention", autocast=False)
    return BesideX(layer, ("positions", "mask", "rotation", "lent"))


def _attending(
    output: keras.layers.Layer, product: Product | None
) -> Callable[[Tensor, Inputs, Inputs], Tensor]:
    """Returns a function of queries, of keys and values, and of the block's inputs."""
    attend = product or AttentionDotProduct(name="dot_product")

    def apply(q_BTNH: Tensor, visible: Inputs, inputs: Inputs) -> Tensor:
        attended = attend({"query": q_BTNH, **visible, "mask": inputs["mask"]})
        merge = keras.layers.Reshape((-1, math.prod(attended.shape[2:])), name="merge_heads")
        return output(merge(attended))

    return apply


@keras.saving.register_keras_serializable("functional_llm")
class Sinks(CompositeLayer):
    """A learned score for each query head that counts in its softmax, for nothing to be seen.

    From queries (B, T, N, H), of which it takes their number, to (N,).

    Reference:
        [gpt-oss](https://arxiv.org/abs/2508.10925), section 2.3.
    """

    def functional_build(self, inputs: Tensor) -> Tensor:
        self.score = self.add_weight((inputs.shape[2],), "zeros", name="score")
        # A weight by itself is no node of a graph: the zero makes it one.
        return ops.zeros_like(inputs[0, 0, :, 0]) + self.score


def attending_with_sinks() -> Product:
    """Returns what attends with `Sinks`, for `attention`."""
    sinks, attend = Sinks(name="sinks"), AttentionDotProduct(name="dot_product")
    return lambda inputs: attend({**inputs, "sinks": sinks(inputs["query"])})


@dataclass(frozen=True)
class BesideX:
    """A layer as a part that also takes other inputs of the block.

    Args:
        layer: Layer from a dict with `x` and these inputs.
        names: Of the inputs.
    """

    layer: CompositeLayer
    names: Sequence[str]

    @property
    def name(self) -> str:
        """The layer's name."""
        return str(self.layer.name)

    def __call__(self, x: Tensor, inputs: Inputs) -> Tensor:
        """Returns what the layer makes of `x` and the inputs."""
        return self.layer({"x": x, **{name: inputs[name] for name in self.names}})
