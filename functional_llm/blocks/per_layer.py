"""Embeddings of each token for each decoder layer, which come in by a branch of their own.

Shapes: B batch, T tokens, D model, L layers, P width of such an embedding.

Reference:
    [Gemma 3n](https://ai.google.dev/gemma/docs/gemma-3n), per-layer embeddings.
"""

import keras
from keras import ops

from functional_llm.blocks.attention import BesideX, Inputs
from functional_llm.blocks.language_model import OwnInputs
from functional_llm.blocks.mlp import ACTIVATIONS
from functional_llm.blocks.norm import rms_norm
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import Tensor


def per_layer_embeddings(
    vocabulary_size: int, num_layers: int, width: int, hidden_dim: int, epsilon: float
) -> OwnInputs:
    """Returns what gives each layer its embedding of the tokens as "layer_embedding", (B, T, P).

    It is the sum of a learned vector for each token, and of a projection of the token's embedding.

    Args:
        vocabulary_size: Of the table; tokens beyond it take the vector of token 0.
        num_layers: L.
        width: P.
        hidden_dim: D.
        epsilon: Of the norm of the projection.
    """
    total = num_layers * width
    table = keras.layers.Embedding(vocabulary_size, total, name="per_layer_embedding")
    project = keras.layers.Dense(total, use_bias=False, name="per_layer_projection")
    norm = rms_norm(epsilon, "per_layer_norm")
    split = keras.layers.Reshape((-1, num_layers, width), name="per_layer_split")

    def make(x_BTD: Tensor, inputs: Inputs) -> list[Inputs]:
        ids = inputs["token_ids"]
        learned = split(table(ops.where(ids < vocabulary_size, ids, 0)) * width**0.5)
        projected = norm(split(project(x_BTD) * hidden_dim**-0.5))
        per_layer_BTLP = (projected + learned) * 2.0**-0.5
        return [{"layer_embedding": per_layer_BTLP[:, :, i]} for i in range(num_layers)]

    return make


def per_layer_branch(width: int, hidden_dim: int, activation: str) -> BesideX:
    """projection(activation(gate(x)) * the block's input "layer_embedding").

    Args:
        width: P.
        hidden_dim: D.
        activation: A key of `ACTIVATIONS`.

    Returns:
        A part named "per_layer".
    """
    gate = keras.layers.Dense(width, use_bias=False, name="gate")
    project = keras.layers.Dense(hidden_dim, use_bias=False, name="projection")

    def body(inputs: Inputs) -> Tensor:
        return project(ACTIVATIONS[activation](gate(inputs["x"])) * inputs["layer_embedding"])

    return BesideX(CompositeLayer(body, name="per_layer"), ("layer_embedding",))


@keras.saving.register_keras_serializable("functional_llm")
class LayerScale(CompositeLayer):
    """Multiplies what a decoder layer returns by one number, which no gradient changes."""

    def functional_build(self, inputs: Tensor) -> Tensor:
        self.scale = self.add_weight((1,), "ones", trainable=False, name="scale")
        return inputs * self.scale
