"""Several streams in the place of one hidden state, of which a decoder layer computes one.

Shapes: B batch, T tokens, A streams, D model, R rank.

Reference:
    [Alternating Updates](https://arxiv.org/abs/2301.13310);
    [LAuReL](https://arxiv.org/abs/2411.07501); [Gemma 3n](https://ai.google.dev/gemma/docs/gemma-3n).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import keras
from keras import ops

from functional_llm.blocks.attention import Inputs, Part, PartFunction, apply_parts
from functional_llm.blocks.decoder import Apply, NamedPart, layer_of_parts
from functional_llm.blocks.norm import rms_norm
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import Tensor

_LEAST_SQUARE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The streams of a model.

    Args:
        count: A.
        active: Which of them decoder layers compute; the others are predicted and corrected.
        hidden_dim: D.
        epsilon: Of norms.
    """

    count: int
    active: int
    hidden_dim: int
    epsilon: float

    def begin(self) -> PartFunction:
        """Part from (B, T, D) to (B, T, A, D): projections of it beside it, as large as it is."""
        project = self._projections("altup_projection")

        def stack(x_BTD: Tensor, inputs: Inputs) -> Tensor:
            others = [_as_large_as(x_BTD, layer(x_BTD)) for layer in project]
            return ops.stack([x_BTD, *others], axis=2)

        return stack

    def end(self, norm: Part) -> PartFunction:
        """Part from (B, T, A, D) to (B, T, D): the mean of projections, and a norm behind it."""
        project = self._projections("altup_unembedding")

        def join(x_BTAD: Tensor, inputs: Inputs) -> Tensor:
            first = x_BTAD[:, :, 0]
            others = [
                _as_large_as(first, layer(x_BTAD[:, :, i])) for i, layer in enumerate(project, 1)
            ]
            mean = sum(others, start=first) / self.count
            return apply_parts([norm], mean, inputs)

        return join

    def _projections(self, name: str) -> list[keras.layers.Layer]:
        return [
            keras.layers.Dense(self.hidden_dim, use_bias=False, name=f"{name}_{i}")
            for i in range(self.count - 1)
        ]

    def predictor(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
        """Returns a layer's two functions: what the streams will be; what they are.

        The first makes of the streams before a layer (B, T, A, D) a prediction of those after it.
        The second corrects the prediction, given what the layer has made of the active stream.
        """
        count = self.count
        norm = rms_norm(self.epsilon, "altup_norm")
        router = keras.layers.Dense(count, use_bias=False, name="altup_router")
        mixing = keras.layers.Dense(count * count, use_bias=False, name="altup_prediction")
        gain = keras.layers.Dense(count, use_bias=False, name="altup_correction")
        square = keras.layers.Reshape((-1, count, count), name="altup_square")

        def route(x_BTD: Tensor) -> Tensor:
            return ops.tanh(router(norm(x_BTD) / self.hidden_dim))

        def predict(x_BTAD: Tensor) -> Tensor:
            mix_BTAA = square(mixing(route(x_BTAD[:, :, self.active])))
            return x_BTAD + ops.matmul(mix_BTAA, x_BTAD)

        def correct(predicted_BTAD: Tensor, y_BTD: Tensor) -> Tensor:
            surprise_BTD = y_BTD - predicted_BTAD[:, :, self.active]
            gain_BTA1 = ops.expand_dims(gain(route(y_BTD)) + 1.0, 3)
            return predicted_BTAD + ops.expand_dims(surprise_BTD, 2) * gain_BTA1

        return predict, correct


def _as_large_as(x: Tensor, y: Tensor) -> Tensor:
    """Returns `y` scaled to the magnitude of `x`."""

    def square(z: Tensor) -> Tensor:
        return ops.mean(ops.square(z), axis=-1, keepdims=True)

    return y * ops.sqrt(square(x)) / ops.sqrt(ops.maximum(square(y), _LEAST_SQUARE))


@keras.saving.register_keras_serializable("functional_llm")
class ChannelScale(CompositeLayer):
    """Multiplies each channel by a learned number."""

    def functional_build(self, inputs: Tensor) -> Tensor:
        self.scale = self.add_weight((inputs.shape[-1],), "zeros", name="scale")
        return inputs * self.scale


def laurel(rank: int, hidden_dim: int, epsilon: float) -> CompositeLayer:
    """X + norm(right(left(x))), of a low rank.

    Args:
        rank: R.
        hidden_dim: D.
        epsilon: Of the norm.
    """
    left = keras.layers.Dense(rank, use_bias=False, name="left")
    right = keras.layers.Dense(hidden_dim, use_bias=False, name="right")
    norm = rms_norm(epsilon, "norm")
    return CompositeLayer(lambda x: x + norm(right(left(x))), name="laurel")


def sparse(share: float) -> Callable[[Tensor], Tensor]:
    """Keeps what exceeds the quantile of a normal distribution, less that quantile.

    Args:
        share: Of the numbers that become zero, below 1.
    """
    deviations = NormalDist().inv_cdf(share)

    def cut(x: Tensor) -> Tensor:
        mean = ops.mean(x, axis=-1, keepdims=True)
        return ops.relu(x - mean - deviations * ops.std(x, axis=-1, keepdims=True))

    return cut


def altup_decoder(
    name: str,
    streams: Streams,
    attention: NamedPart,
    mlp: CompositeLayer,
    per_layer: NamedPart,
    *,
    rank: int,
    scales: bool,
) -> CompositeLayer:
    """A decoder layer for several streams, with norms on both sides of attention and MLP.

    Args:
        name: Name of the layer.
        streams: Of the model.
        attention: Layer or part named "attention".
        mlp: Layer named "mlp".
        per_layer: What brings an embedding of the layer's own to the streams but the first.
        rank: R, of the branch beside the attention.
        scales: Whether the active stream is scaled by learned numbers on its way to `per_layer`.

    Returns:
        Layer from `{"x": (B, T, A, D), "layer_embedding", ...}` to `{"x": (B, T, A, D), "cache"}`.
    """
    norm, (predict, correct) = partial(rms_norm, streams.epsilon), streams.predictor()
    beside = laurel(rank, streams.hidden_dim, streams.epsilon)
    scale: list[Part] = [ChannelScale(name="altup_scale")] if scales else []

    def step(x_BTAD: Tensor, apply: Apply) -> Tensor:
        def after(x: Tensor, *parts: Part) -> Tensor:
            for part in parts:
                x = apply(part, x)
            return x

        predicted = predict(x_BTAD)
        active = predicted[:, :, streams.active]
        normed = after(active, norm("attention_norm"))
        attended = after(normed, attention, norm("attention_post_norm"))
        y = (active + attended + after(normed, beside)) * 2.0**-0.5
        y = y + after(y, norm("mlp_norm"), mlp, norm("mlp_post_norm"))
        corrected = correct(predicted, y)
        first = corrected[:, :, streams.active]
        own = after(first, *scale, per_layer, norm("per_layer_post_norm"))
        others = corrected[:, :, 1:] + ops.expand_dims(own, 2)
        return ops.concatenate([corrected[:, :, :1], others], axis=2)

    return layer_of_parts(name, step)
