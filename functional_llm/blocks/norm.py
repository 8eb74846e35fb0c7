"""Normalisation layers."""

import keras
from keras import ops

from functional_llm.blocks.attention import Inputs, PartFunction
from functional_llm.graph.types import Tensor


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


def layer_norm(epsilon: float, name: str) -> keras.layers.Layer:
    """Layer norm with a learned scale and bias.

    Reference:
        [Layer Normalization](https://arxiv.org/abs/1607.06450).
    """
    return keras.layers.LayerNormalization(epsilon=epsilon, name=name)
