"""LoRA: a product of two thin matrices is added to a matrix. With rsLoRA and PiSSA.

Shapes: R rank; A is (in, R), B is (R, out).
"""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from functional_llm.graph.selection import Where
from functional_llm.peft.adapter import Adapter, attach, rank_for, seed_for, targets_for, value_for
from functional_llm.peft.initializers import uniform, zeros
from functional_llm.peft.linear import Linear


@keras.saving.register_keras_serializable("functional_llm")
class LoRA(Adapter):
    """`W + alpha / R * A B`, B zero at first.

    Args:
        base: As for `Adapter`.
        rank: R.
        alpha: Numerator of the scale.
        dropout: Share of the inputs that A does not see in training.
        rslora: Whether the scale is alpha / sqrt(R).
        init: `"zeros"`, or `"pissa"`: A and B are the R largest singular directions, and what they
            were at first is subtracted.
        seed: Of the random A.
    """

    peft_type = "LORA"

    def __init__(
        self,
        base: Any,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str = "zeros",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(base, **kwargs)
        if not isinstance(rank, int) or rank < 1:  # a file may have more than `lora` allows
            raise ValueError(f"Expected a rank of at least 1 for '{self.name}', received {rank!r}.")
        if init not in ("zeros", "pissa"):
            raise ValueError(f"Expected init 'zeros' or 'pissa', received {init!r}.")
        if not alpha > 0:
            raise ValueError(f"Expected alpha above 0 for '{self.name}', received {alpha!r}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"Expected dropout from 0 to below 1, received {dropout!r}.")
        self.rank, self.alpha, self.rslora, self.init = rank, alpha, rslora, init
        self.dropout_rate, self.seed = dropout, seed
        self.dropout = keras.layers.Dropout(dropout, seed=seed) if dropout else None

    @property
    def scale(self) -> float:
        """Factor on the product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def make_weights(self, linear: Linear) -> None:
        start = uniform(linear.in_size**-0.5, self.seed)  # as in PEFT
        self.a = self.add_weight((linear.in_size, self.rank), start, name="lora_a")
        self.b = self.add_weight((self.rank, linear.out_size), zeros, name="lora_b")
        self.a0 = self.b0 = None
        if self.init == "pissa":
            u, s, vt = np.linalg.svd(ops.convert_to_numpy(linear.kernel()), full_matrices=False)
            root = np.sqrt(s[: self.rank] / self.scale)
            self.a.assign(u[:, : self.rank] * root)
            self.b.assign(root[:, None] * vt[: self.rank])
            self.a0 = self.add_constant(ops.copy(self.a), "initial_a")
            self.b0 = self.add_constant(ops.copy(self.b), "initial_b")

    def factors(self) -> tuple[Any, Any]:
        """Returns A and B of the plain LoRA that this amounts to; of rank 2 R with PiSSA."""
        if self.a0 is None or self.b0 is None:
            return self.a, self.b
        return ops.concatenate([self.a, self.a0], 1), ops.concatenate([self.b, -self.b0], 0)

    def kernel_change(self) -> Any:
        a, b = self.factors()
        return ops.matmul(a, b) * self.scale

    def change(self, x: Any, training: bool | None = None) -> Any:
        if self.dropout is not None:
            x = self.dropout(x, training=training)
        if not isinstance(self.linear.layer, keras.layers.Dense):
            return self.linear.apply(x, self.kernel_change())
        a, b = self.factors()
        return ops.matmul(ops.matmul(x, a), b) * self.scale

    def get_options(self) -> dict[str, Any]:
        options = {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout_rate}
        return {**options, "rslora": self.rslora, "init": self.init, "seed": self.seed}


def lora(
    model: Any,
    rank: int | dict[str, int] = 8,
    alpha: float | dict[str, float] = 16,
    targets: Where | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    init: str = "zeros",
    adapter_name: str = "default",
    dtype: str = "float32",
    seed: int | None = None,
) -> Any:
    """Returns a model with LoRA; nothing else trains in it.

    Args:
        model: A functional model. It stays as it is, and its weights are shared.
        rank: R, or one for each pattern of paths: `{"query": 16, "value": 4}`.
        alpha: The scale is alpha / R. Or one for each pattern.
        targets: Which layers, as for `flm.select`; `"all"` for every linear layer but the head. By
            default those that `rank` has patterns for, or the queries and values.
        dropout: Share of the inputs that are dropped in training.
        rslora: Whether the scale is alpha / sqrt(R).
        init: `"zeros"`, or `"pissa"` to begin with the largest singular directions.
        adapter_name: Another name for each adapter in one model.
        dtype: Of the adapter's weights.
        seed: Of the random numbers at first.

    Raises:
        ValueError: At a rank below 1 or above a layer's size, or targets that match nothing.

    Reference:
        [LoRA](https://arxiv.org/abs/2106.09685), [rsLoRA](https://arxiv.org/abs/2312.03732),
        [PiSSA](https://arxiv.org/abs/2404.02948).
    """

    def make(layer: Any, path: str, **kwargs: Any) -> Any:
        return LoRA(
            layer,
            rank=rank_for(path, rank, layer),
            alpha=value_for(path, alpha, "alpha"),
            dropout=dropout,
            rslora=rslora,
            init=init,
            seed=seed_for(path, seed),
            dtype=dtype,
            **kwargs,
        )

    return attach(model, make, targets_for(targets, rank), adapter_name)
