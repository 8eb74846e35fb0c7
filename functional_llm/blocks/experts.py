"""Experts as parts in order: a router chooses some MLPs of many for each token.

Shapes: B batch, T tokens, D model, F width of an expert, E experts, k experts chosen for a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
from keras import ops

from functional_llm.blocks.attention import BesideX, Inputs
from functional_llm.blocks.mlp import ACTIVATIONS
from functional_llm.graph.composite import CompositeLayer
from functional_llm.graph.types import Tensor
from functional_llm.layers.experts import (
    ExpertCombine,
    ExpertDense,
    ExpertDispatch,
    ExpertScores,
)
from functional_llm.layers.sparse_mixer import SparseMixer

Scores: TypeAlias = Callable[[Tensor], Tensor]  # a part of a router, from scores to scores
Gate: TypeAlias = Callable[..., Tensor]  # what joins the outputs of gate and up


@dataclass(frozen=True, kw_only=True)
class Router:
    """How experts are chosen: parts, each in the order written, all in float32.

    Args:
        num_experts: E.
        num_chosen: k.
        scores: Parts from logits (B, T, E) to the scores, of which the weights are those chosen.
        choice: Parts from the scores to others, of which the k largest are chosen.
        weights: Parts on the weights (B, T, k).
        use_bias: Whether the Dense that makes the logits has a bias.
        inputs: Parts before that Dense.
        rescaling: Layer from `{"weights", "experts"}` to weights, behind those parts on them.
    """

    num_experts: int
    num_chosen: int
    scores: Sequence[Scores] = ()
    choice: Sequence[Scores] = ()
    weights: Sequence[Scores] = ()
    use_bias: bool = False
    inputs: Sequence[Scores] = ()
    rescaling: keras.layers.Layer | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_chosen <= self.num_experts:
            raise ValueError(
                f"Expected from 1 to {self.num_experts} chosen experts, as many as there are. "
                f"Received: {self.num_chosen}."
            )

    def __call__(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """Returns `experts` (B, T, k) int32 and their `weights` (B, T, k)."""
        dense = ExpertScores(self.num_experts, use_bias=self.use_bias, name="router")
        scores = _apply(self.scores, dense(_apply(self.inputs, x_BTD)))
        _, experts = ops.top_k(_apply(self.choice, scores), self.num_chosen)
        weights = _apply(self.weights, ops.take_along_axis(scores, experts, axis=-1))
        if self.rescaling is not None:
            weights = self.rescaling({"weights": weights, "experts": experts})
        return {"experts": experts, "weights": weights}


@dataclass(frozen=True, kw_only=True)
class MixingRouter:
    """A router that chooses two experts, one after the other.

    Args:
        num_experts: E, at least 2.
        noise: As for `SparseMixer`.
    """

    num_experts: int
    noise: float

    def __call__(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """Returns `experts` (B, T, 2) int32 and their `weights` (B, T, 2)."""
        scores = ExpertScores(self.num_experts, use_bias=False, name="router")(x_BTD)
        chosen: dict[str, Tensor] = SparseMixer(self.noise, name="mixer")(scores)
        return chosen


def _apply(parts: Sequence[Scores], x: Tensor) -> Tensor:
    for part in parts:
        x = part(x)
    return x


def normalized(epsilon: float = 0.0, minimum: float = 0.0) -> Scores:
    """Part that divides the weights by their sum.

    Args:
        epsilon: Added to the sum.
        minimum: The least sum that is divided by.
    """

    def divide(weights: Tensor) -> Tensor:
        total = ops.sum(weights, axis=-1, keepdims=True)
        total = total + epsilon if epsilon else total
        return weights / (ops.maximum(total, minimum) if minimum else total)

    return divide


def scaled(factor: float) -> Scores:
    """Part that multiplies by a number."""
    return lambda x: x * factor


def softmax(x: Tensor) -> Tensor:
    """Part: softmax over the last axis, of all experts or of those chosen."""
    # Of one, which Keras takes for a mistake.
    return ops.ones_like(x) if x.shape[-1] == 1 else ops.softmax(x, axis=-1)


def within_groups(
    num_groups: int, num_kept: int, num_best: int, otherwise: float = float("-inf")
) -> Scores:
    """Part that keeps the scores of some groups of experts.

    Args:
        num_groups: Groups of as many neighbouring experts each.
        num_kept: How many groups are kept.
        num_best: A group's own score is the sum of so many of its best.
        otherwise: The score of all experts in the other groups.

    Reference:
        [DeepSeek-V2](https://arxiv.org/abs/2405.04434), section 2.2.2, with the best one;
        [DeepSeek-V3](https://arxiv.org/abs/2412.19437), section 2.1.2, with the best two.
    """

    def keep(scores_BTE: Tensor) -> Tensor:
        size = scores_BTE.shape[-1] // num_groups
        grouped = keras.layers.Reshape((-1, num_groups, size), dtype="float32")(scores_BTE)
        best, _ = ops.top_k(grouped, num_best)
        _, kept = ops.top_k(ops.sum(best, axis=-1), num_kept)
        is_kept_BTG = ops.sum(ops.one_hot(kept, num_groups, dtype="float32"), axis=2)
        return ops.where(ops.repeat(is_kept_BTG, size, axis=-1) > 0, scores_BTE, otherwise)

    return keep


@keras.saving.register_keras_serializable("functional_llm")
class ScoreCorrection(CompositeLayer):
    """Adds to each expert's score what balances the choices; training finds it, by no gradient.

    Args:
        **kwargs: Of `keras.layers.Layer`.

    Reference:
        [Auxiliary-Loss-Free Load Balancing](https://arxiv.org/abs/2408.15664).
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", "name": "correction", **kwargs})

    def functional_build(self, inputs: Tensor) -> Tensor:
        self.bias = self.add_weight(inputs.shape[-1:], "zeros", trainable=False, name="bias")
        return inputs + self.bias


@keras.saving.register_keras_serializable("functional_llm")
class ExpertScale(CompositeLayer):
    """Multiplies the weight of each chosen expert by a learned number of the expert.

    From `{"weights": (B, T, k), "experts": (B, T, k)}` to (B, T, k).

    Args:
        num_experts: E.
        **kwargs: Of `keras.layers.Layer`.
    """

    def __init__(self, num_experts: int, **kwargs: Any) -> None:
        super().__init__(**{"dtype": "float32", "name": "expert_scale", **kwargs})
        self.num_experts = num_experts

    def functional_build(self, inputs: dict[str, Tensor]) -> Tensor:
        self.scale = self.add_weight((self.num_experts,), "ones", name="scale")
        one_hot_BTkE = ops.one_hot(inputs["experts"], self.num_experts, dtype="float32")
        return inputs["weights"] * ops.sum(one_hot_BTkE * self.scale, axis=-1)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "num_experts": self.num_experts}


def activated(activation: str) -> Gate:
    """Joins them as activation(gate) * up, for a key of `ACTIVATIONS`."""
    return lambda gate, up: ACTIVATIONS[activation](gate) * up


def clamped(alpha: float, limit: float) -> Gate:
    """Joins them as gate * sigmoid(alpha * gate) * (up + 1), both within the limit.

    Reference:
        [gpt-oss](https://arxiv.org/abs/2508.10925), section 2.2.
    """

    def join(gate: Tensor, up: Tensor) -> Tensor:
        gate = ops.minimum(gate, limit)
        up = ops.clip(up, -limit, limit)
        return gate * ops.sigmoid(alpha * gate) * (up + 1.0)

    return join


def expert_mlp(
    router: Router | MixingRouter,
    intermediate_dim: int,
    hidden_dim: int,
    gate: Gate,
    *,
    inner: Sequence[str] = ("gate", "up"),
    use_bias: bool = False,
    weighs_inputs: bool = False,
    shared: Callable[[Tensor], Tensor] | None = None,
    before: Sequence[Scores] = (),
    behind: Sequence[Scores] = (),
) -> BesideX:
    """down(gate(gate(x), up(x))) of the experts chosen, weighted and summed.

    Args:
        router: What chooses.
        intermediate_dim: F.
        hidden_dim: D.
        gate: What joins the outputs of gate and up: `activated`, `clamped`, or your own.
        inner: The experts' layers whose outputs `gate` joins: with `("up",)`, it is a function of
            one, an activation.
        use_bias: Whether the experts' layers have biases.
        weighs_inputs: Whether the weights are factors on the experts' inputs, not on their outputs.
        shared: A branch that all tokens take: a layer, or a function of `x`. Its result is added.
        before: Parts before the experts, which the router and the shared branch do not see.
        behind: Parts behind their sum, before the shared branch is added.

    Returns:
        A part named "mlp" that also takes the block's positions: padding goes to no expert.

    Reference:
        [Outrageously Large Neural Networks](https://arxiv.org/abs/1701.06538).
    """

    def dense(units: int, name: str) -> ExpertDense:
        return ExpertDense(router.num_experts, units, use_bias=use_bias, name=f"experts_{name}")

    def body(inputs: Inputs) -> Tensor:
        x = inputs["x"]
        dispatch = ExpertDispatch(router.num_experts, name="dispatch")
        into_experts = _apply(before, x)
        sent = dispatch({"x": into_experts, "positions": inputs["positions"], **router(x)})
        weights, routing = sent["weights"], sent["routing"]
        rows = sent["x"] * weights if weighs_inputs else sent["x"]
        into = {"x": rows, "routing": routing}
        joined = gate(*(dense(intermediate_dim, name)(into) for name in inner))
        rows = dense(hidden_dim, "down")({"x": joined, "routing": routing})
        rows = rows if weighs_inputs else rows * weights
        y = _apply(behind, ExpertCombine(name="combine")({"x": rows, "routing": routing}))
        return y if shared is None else y + shared(x)

    return BesideX(CompositeLayer(body, name="mlp"), ("positions",))


def gated(mlp: CompositeLayer) -> Callable[[Tensor], Tensor]:
    """A shared branch whose result is multiplied by the sigmoid of one number for each token.

    Args:
        mlp: The branch.

    Reference:
        [Qwen2](https://arxiv.org/abs/2407.10671), section 2.2.2.
    """
    gate = keras.layers.Dense(1, use_bias=False, name="shared_gate")
    return lambda x: ops.sigmoid(gate(x)) * mlp(x)
