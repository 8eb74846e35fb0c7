"""Normalisation layers."""

from typing import Any

import keras
from keras import ops

from functional_llm.blocks.attention import Inputs, PartFunction
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON, Tensor


def rms_norm(epsilon: float, name: str) -> keras.layers.Layer:
    """Root mean square norm with a learned scale, computed in float32.

    Reference:
        [RMSNorm](https://arxiv.org/abs/1910.07467).
    """
    return keras.layers.RMSNormalization(epsilon=epsilon, name=name)


def offset_rms_norm(epsilon: float, name: str) -> PartFunction:
    """Root mean square norm whose learned scale is an offset from one: norm(x) * (1 + scale).

    The variable is the offset, as in checkpoints: 1 + scale in bfloat16 would lose most digits of
    the scale.

    Reference:
        [gemma_pytorch](https://github.com/google/gemma_pytorch), `RMSNorm`.
    """
    scaled = rms_norm(epsilon, name)

    def norm(x: Tensor, inputs: Inputs) -> Tensor:
        return scaled(x) + ops.rms_normalization(x, epsilon=epsilon)

    return norm


def bare_rms_norm(epsilon: float) -> PartFunction:
    """Root mean square norm with nothing learned."""
    return lambda x, inputs: ops.rms_normalization(x, epsilon=epsilon)


def layer_norm(epsilon: float, name: str) -> keras.layers.Layer:
    """Layer norm with a learned scale and bias.

    Reference:
        [Layer Normalization](https://arxiv.org/abs/1607.06450).
    """
    return keras.layers.LayerNormalization(epsilon=epsilon, name=name)


def layer_norm_without_bias(epsilon: float, name: str) -> keras.layers.Layer:
    """Layer norm, which subtracts the mean, with a learned scale and no bias."""
    return keras.layers.LayerNormalization(epsilon=epsilon, center=False, name=name)


def bare_layer_norm(epsilon: float) -> PartFunction:
    """Layer norm with nothing learned."""
    return lambda x, inputs: ops.layer_normalization(x, epsilon=epsilon)


def offset_layer_norm(epsilon: float, name: str) -> PartFunction:
    """Layer norm whose learned scale is an offset from one: norm(x) * (1 + scale) + bias.

    The variable is the offset, as in checkpoints: see `offset_rms_norm`.

    Reference:
        [NVIDIA's NeMo](https://github.com/NVIDIA/NeMo), `LayerNorm1P`.
    """
    scaled = keras.layers.LayerNormalization(epsilon=epsilon, gamma_initializer="zeros", name=name)

    def norm(x: Tensor, inputs: Inputs) -> Tensor:
        return scaled(x) + ops.layer_normalization(x, epsilon=epsilon)

    return norm


@keras.saving.register_keras_serializable("functional_llm")
class LayerNormOfHeads(CompositeLayer):
    """Layer norm of each head, (..., N, H), with scales of its own and no bias.

    Args:
        epsilon: Added to the variance.
        **kwargs: Of `keras.layers.Layer`.

    Reference:
        [Scaling Vision Transformers to 22 Billion Parameters](https://arxiv.org/abs/2302.05442),
        section 2.1; one scale for all heads there.
    """

    def __init__(self, epsilon: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def functional_build(self, inputs: Tensor) -> Tensor:
        self.scale = self.add_weight(inputs.shape[-2:], "ones", name="scale")
        return ops.layer_normalization(inputs, epsilon=self.epsilon) * self.scale

    def get_config(self) -> JSON:
        return {**super().get_config(), "epsilon": self.epsilon}
