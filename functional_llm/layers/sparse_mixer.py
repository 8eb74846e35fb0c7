"""Two experts for each token, chosen one after the other, as GRIN trains and Phi-3.5-MoE has them.

Shapes: B batch, T tokens, E experts.

Reference:
    [GRIN](https://arxiv.org/abs/2409.12136), section 2.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import JSON, Tensor

PACKAGE = "functional_llm"
_NONE = float("-inf")


@keras.saving.register_keras_serializable(PACKAGE)
class SparseMixer(CompositeLayer):
    """Chooses the best expert, then the best of the others: (B, T, E) to "experts" and "weights".

    The weight of each is its softmax among those that were open to the choice and nearly as good as
    the best. So the two weights do not sum to one.

    Args:
        noise: How near "nearly as good" is: within 2 * noise of the best score, times the larger of
            that score and the size of the expert's own.
        **kwargs: Of `keras.layers.Layer`.
    """

    def __init__(self, noise: float, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})
        self.noise = noise

    def functional_build(self, inputs: Tensor) -> dict[str, Tensor]:
        return _mix(inputs, self.noise, _best, lambda weight, is_best: weight)


@keras.saving.register_keras_serializable(PACKAGE)
class SampledMixer(keras.layers.Layer):
    """A `SparseMixer` that draws experts in training, by their weights.

    Of a drawn expert that is not the best, the weight counts a third in three cases of four. The
    gradient is that of the whole weight: both together make it an estimate of the gradient of the
    choice itself, by Heun's third-order method.

    Args:
        noise: As for `SparseMixer`.
        seed: Of the draws.
    """

    def __init__(self, noise: float, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", **kwargs})
        self.noise = noise
        self.seed = seed
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, scores_BTE: Tensor, training: bool | None = None) -> dict[str, Tensor]:
        """Chooses.

        Args:
            scores_BTE: Of each expert.
            training: Whether experts are drawn.

        Returns:
            `experts` (B, T, 2) int32 and their `weights` (B, T, 2).
        """
        if training:
            return _mix(scores_BTE, self.noise, self._draw, self._weigh)
        return _mix(scores_BTE, self.noise, _best, lambda weight, is_best: weight)

    def _draw(self, near_BTE: Tensor) -> Tensor:
        # The largest of scores with Gumbel noise is drawn by the softmax of the scores.
        uniform = keras.random.uniform(ops.shape(near_BTE), 1e-20, 1.0, seed=self.generator)
        return _best(near_BTE - ops.log(-ops.log(uniform)))

    def _weigh(self, weight_BT1: Tensor, is_best_BT1: Tensor) -> Tensor:
        uniform = keras.random.uniform(ops.shape(weight_BT1), seed=self.generator)
        is_whole = ops.logical_or(is_best_BT1, uniform > 0.75)
        counted = ops.where(is_whole, weight_BT1, weight_BT1 / 3)
        return weight_BT1 + ops.stop_gradient(counted - weight_BT1)

    def compute_output_spec(
        self, scores_BTE: keras.KerasTensor, training: bool | None = None
    ) -> dict[str, keras.KerasTensor]:
        shape = (*scores_BTE.shape[:-1], 2)
        dtypes = {"experts": "int32", "weights": self.compute_dtype}
        return {name: keras.KerasTensor(shape, dtype) for name, dtype in dtypes.items()}

    def get_config(self) -> JSON:
        return {**super().get_config(), "noise": self.noise, "seed": self.seed}


@keras.saving.register_keras_serializable(PACKAGE)
class UniformNoise(keras.layers.Layer):
    """Multiplies in training by numbers around one, and does nothing otherwise.

    Args:
        noise: How far from one they are at most.
        seed: Of the numbers.
    """

    def __init__(self, noise: float, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.noise = noise
        self.seed = seed
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, x: Tensor, training: bool | None = None) -> Tensor:
        """Returns the same shape; `training` says whether anything is multiplied."""
        if not training:
            return x
        bounds = (1 - self.noise, 1 + self.noise)
        return x * keras.random.uniform(ops.shape(x), *bounds, dtype=x.dtype, seed=self.generator)

    def compute_output_spec(
        self, x: keras.KerasTensor, training: bool | None = None
    ) -> keras.KerasTensor:
        return keras.KerasTensor(x.shape, x.dtype)

    def get_config(self) -> JSON:
        return {**super().get_config(), "noise": self.noise, "seed": self.seed}


def _best(scores_BTE: Tensor) -> Tensor:
    return ops.cast(ops.argmax(scores_BTE, axis=-1, keepdims=True), "int32")


def _mix(
    scores_BTE: Tensor,
    noise: float,
    pick: Callable[[Tensor], Tensor],
    weigh: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Returns two experts and their weights.

    Args:
        scores_BTE: Of each expert.
        noise: As for `SparseMixer`.
        pick: Scores, minus infinity for those that are not near the best -> an expert (B, T, 1).
        weigh: Weights, and whether each is that of the best -> weights.
    """

    def choose(open_BTE: Tensor) -> tuple[Tensor, Tensor]:
        best_BT1 = ops.max(open_BTE, axis=-1, keepdims=True)
        margin_BTE = 2 * noise * ops.maximum(ops.abs(scores_BTE), best_BT1)
        near_BTE = ops.where(best_BT1 - scores_BTE <= margin_BTE, open_BTE, _NONE)
        expert_BT1 = pick(near_BTE)
        weight_BT1 = ops.take_along_axis(ops.softmax(near_BTE, axis=-1), expert_BT1, axis=-1)
        return expert_BT1, weigh(weight_BT1, expert_BT1 == _best(near_BTE))

    first, first_weight = choose(scores_BTE)
    is_first_BTE = ops.one_hot(ops.squeeze(first, -1), scores_BTE.shape[-1]) > 0
    second, second_weight = choose(ops.where(is_first_BTE, _NONE, scores_BTE))
    return {
        "experts": ops.concatenate([first, second], axis=-1),
        "weights": ops.concatenate([first_weight, second_weight], axis=-1),
    }
