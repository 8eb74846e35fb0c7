"""LoRA: a product of two thin matrices is added to a matrix. With rsLoRA and PiSSA.

Shapes: R rank; A is (in, R), B is (R, out).
"""

import math
from typing import Any, Self

import keras
from keras import ops

from functional_llm.graph.placing import to_numpy
from functional_llm.graph.selection import Where
from functional_llm.graph.types import Layer, Tensor
from functional_llm.peft.adapter import Adapter, attach, origin_of, targets_for
from functional_llm.peft.initializers import PARTS, seed_for, uniform, zeros
from functional_llm.peft.linear import Linear, view


@keras.saving.register_keras_serializable("functional_llm")
class LoRA(Adapter):
    """`W + alpha / R * A B`, B zero at first. For the options see `lora`."""

    peft_type = "LORA"
    changes_experts = True

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    rslora: bool = False
    init: str = "zeros"
    seed: int | None = None

    def __init__(self, base: Layer, **kwargs: Any) -> None:
        super().__init__(base, **kwargs)
        rank = self.rank
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"Expected a rank of at least 1 for '{self.name}', received {rank!r}.")
        if self.init not in ("zeros", "pissa", "olora"):
            raise ValueError(f"Expected init 'zeros', 'pissa' or 'olora', received {self.init!r}.")
        if not self.alpha > 0:
            raise ValueError(f"Expected alpha above 0 for '{self.name}', received {self.alpha!r}.")
        rate = self.dropout
        if not 0 <= rate < 1:
            raise ValueError(f"Expected dropout from 0 to below 1, received {rate!r}.")
        self.dropout_layer = keras.layers.Dropout(rate, seed=self.seed) if rate else None

    @classmethod
    def for_layer(cls, layer: Layer, path: str, **kwargs: Any) -> Self:
        """Refuses a rank above the layer's size, and gives every layer a seed of its own."""
        rank, seed = kwargs.get("rank", cls.rank), kwargs.get("seed", cls.seed)
        linear = view(origin_of(layer), bool(kwargs.get("reverse")))
        limit = min(linear.in_size, linear.out_size)  # a file may have more
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= limit:
            raise ValueError(
                f"Expected a rank from 1 to {limit} for '{path}', a matrix {linear.in_size} x "
                f"{linear.out_size}. Received: {rank!r}."
            )
        if linear.stack and kwargs.get("init", cls.init) != "zeros":
            raise ValueError(
                f"Expected init 'zeros' for the experts at '{path}': other ways to begin decompose "
                f"one matrix. Received: {kwargs['init']!r}."
            )
        return cls(layer, **{**kwargs, "seed": seed_for(path, seed)})

    @property
    def scale(self) -> float:
        """Factor on the product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def make_weights(self, linear: Linear) -> None:
        start = uniform(linear.in_size**-0.5, self.seed)  # as in PEFT
        sizes = (
            (*linear.stack, linear.in_size, self.rank),
            (*linear.stack, self.rank, linear.out_size),
        )
        self.a = self.add_weight(sizes[0], start, name="lora_a")
        self.b = self.add_weight(sizes[1], zeros, name="lora_b")
        self.a0 = self.b0 = None
        if self.init != "zeros":
            matrix = to_numpy(linear.kernel())
            a, b = PARTS[self.init](matrix, self.rank, self.scale)
            self.a.assign(a)
            self.b.assign(b)
            self.a0 = self.add_constant(ops.copy(self.a), "initial_a")
            self.b0 = self.add_constant(ops.copy(self.b), "initial_b")

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns A and B of the plain LoRA that this amounts to; of rank 2 R with PiSSA."""
        if self.a0 is None or self.b0 is None:
            return self.a, self.b
        return ops.concatenate([self.a, self.a0], -1), ops.concatenate([self.b, -self.b0], -2)

    def kernel_change(self) -> Tensor:
        a, b = self.factors()
        return ops.matmul(a, b) * self.scale

    def change(self, x: Tensor, training: bool | None = None) -> Tensor:
        return self.low_rank_product(self.drop(x, training))

    def drop(self, x: Tensor, training: bool | None) -> Tensor:
        """Returns the inputs, some of them dropped in training; never those of an embedding."""
        if self.dropout_layer is None or self.linear.takes_integers:
            return x
        dropout = self.dropout_layer
        return self.linear.on_values(x, lambda v: dropout(v, training=training))

    def low_rank_product(self, x: Tensor) -> Tensor:
        """Returns `alpha / R * x A B`."""
        return self.linear.apply_factors(x, *self.factors()) * self.scale


def lora(
    model: keras.Model,
    rank: int | dict[str, int] = 8,
    alpha: float | dict[str, float] = 16,
    targets: Where | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    init: str = "zeros",
    adapter_name: str = "default",
    dtype: str = "float32",
    seed: int | None = None,
) -> keras.Model:
    """Returns a model with LoRA; nothing else trains in it.

    Args:
        model: A functional model. It stays as it is, and its weights are shared.
        rank: R, or one for each pattern of paths: `{"query": 16, "value": 4}`.
        alpha: The scale is alpha / R. Or one for each pattern.
        targets: Which layers, as for `flm.select`; `"all"` for every linear layer except the head.
            By default those that `rank` has patterns for, or the queries and values.
        dropout: Share of the inputs that A does not see in training.
        rslora: Whether the scale is alpha / sqrt(R).
        init: `"zeros"`; or A and B start as a part of the matrix, and their product at the start
            is subtracted: `"pissa"`, the R largest singular directions, or `"olora"`, the first R
            of a QR decomposition.
        adapter_name: Another name for each adapter in one model.
        dtype: Of the adapter's weights.
        seed: Of the random A.

    Raises:
        ValueError: At a rank below 1 or above a layer's size, or targets that match nothing.

    Reference:
        [LoRA](https://arxiv.org/abs/2106.09685), [rsLoRA](https://arxiv.org/abs/2312.03732),
        [PiSSA](https://arxiv.org/abs/2404.02948), [OLoRA](https://arxiv.org/abs/2406.01775).
    """
    return attach(
        model,
        LoRA,
        targets_for(targets, rank),
        adapter_name,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rslora=rslora,
        init=init,
        seed=seed,
        dtype=dtype,
    )
