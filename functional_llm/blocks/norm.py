"""Normalisation layers under the names that configs use."""

import keras


def rms_norm(epsilon: float, name: str) -> keras.layers.Layer:
    """Root mean square norm with a learned scale, computed in float32.

    Reference:
        [RMSNorm](https://arxiv.org/abs/1910.07467).
    """
    return keras.layers.RMSNormalization(epsilon=epsilon, name=name)
