"""Normalisation layers under the names that configs use."""

from typing import Any

import keras
from keras import ops

from functional_llm.blocks.attention import Part


def rms_norm(epsilon: float, name: str) -> keras.layers.Layer:
    """Root mean square norm with a learned scale, computed in float32.

    Reference:
        [RMSNorm](https://arxiv.org/abs/1910.07467).
    """
    return keras.layers.RMSNormalization(epsilon=epsilon, name=name)


def offset_rms_norm(epsilon: float, name: str) -> Part:
    """Root mean square norm whose learned scale is an offset from one: norm(x) * (1 + scale).

    The scale stays as checkpoints store it: 1 + scale in bfloat16 would lose most of its digits.

    Reference:
        [gemma_pytorch](https://github.com/google/gemma_pytorch), `RMSNorm`.
    """
    scaled = rms_norm(epsilon, name)

    def norm(x: Any, inputs: dict[str, Any]) -> Any:
        return scaled(x) + ops.rms_normalization(x, epsilon=epsilon)

    return norm


def layer_norm(epsilon: float, name: str) -> keras.layers.Layer:
    """Layer norm with a learned scale and bias.

    Reference:
        [Layer Normalization](https://arxiv.org/abs/1607.06450).
    """
    return keras.layers.LayerNormalization(epsilon=epsilon, name=name)
