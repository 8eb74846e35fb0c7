"""Rows of an embedding that train, as a part of an adapter: PEFT's `trainable_token_indices`."""

from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from functional_llm.graph.placing import to_numpy
from functional_llm.graph.types import Tensor
from functional_llm.peft.adapter import Adapter, join
from functional_llm.peft.linear import Linear


@keras.saving.register_keras_serializable("functional_llm")
class TrainedTokens(Adapter):
    """The embedding, or the head, with other vectors for some tokens; the base's at first."""

    token_ids: Sequence[int] = ()

    def make_weights(self, linear: Linear) -> None:
        matrix = to_numpy(linear.kernel())
        self._by_token = linear.takes_integers
        table = matrix if self._by_token else matrix.T
        ids = np.asarray(self.token_ids, "int64")
        if not 0 < len(ids) == len(set(ids)) or ids.min() < 0 or ids.max() >= len(table):
            raise ValueError(
                f"Expected different token ids from 0 to {len(table) - 1}, at least one. Received: "
                f"{list(self.token_ids)!r:.200}."
            )
        self.rows = self.add_weight((len(ids), table.shape[1]), "zeros", name="rows")
        self.rows.assign(table[ids])
        places = np.full(len(table), -1, "float32")
        places[ids] = np.arange(len(ids))
        self.places = self.add_constant(places, "places")

    def call(self, x: Tensor, training: bool | None = None, reverse: bool = False) -> Tensor:
        y = self.call_base(x, reverse)
        if not self.changes(reverse):
            return y
        if self._by_token and not reverse:
            places = ops.expand_dims(ops.take(self.places, x, axis=0), -1)
            new = ops.take(self.rows, _row(places[..., 0]), axis=0)
        else:
            places = self.places
            products = ops.matmul(ops.cast(x, self.compute_dtype), ops.transpose(self.rows))
            new = ops.take(products, _row(places), axis=-1)
        new = ops.cast(new, y.dtype)
        if self.is_stacked:  # what is under it changes these tokens, too
            origin = self.linear.layer
            new = new + y - (origin(x, reverse=True) if reverse else origin(x))
        weight = ops.cast(self.gate, y.dtype)
        mixed = new * weight + y * (1 - weight)  # in this order also in a stock graph
        return self.activation(ops.where(places >= 0, mixed, y))

    def kernel_change(self) -> Tensor:
        kernel = self.linear.kernel()
        table = kernel if self._by_token else ops.transpose(kernel)
        new = ops.take(self.rows, _row(self.places), axis=0)
        change = ops.where(ops.expand_dims(self.places, 1) >= 0, new - table, 0.0)
        return change if self._by_token else ops.transpose(change)


def _row(places: Tensor) -> Tensor:
    return ops.cast(ops.maximum(places, 0), "int32")


def train_tokens(
    model: keras.Model,
    token_ids: Sequence[int],
    adapter_name: str = "default",
    target: str = "token_embedding",
    dtype: str = "float32",
) -> keras.Model:
    """Returns a model in which the vectors of some tokens train; those of the head too, if tied.

    Args:
        model: A functional model. It stays as it is, and its weights are shared.
        token_ids: Of the tokens: those that were added for the task, say.
        adapter_name: Of the adapter that they become a part of, or of a new one.
        target: Path of the embedding.
        dtype: Of the vectors.

    Raises:
        ValueError: If a token id is not in the vocabulary, or twice in the list.
    """
    options = {"token_ids": [int(x) for x in token_ids], "reverse": None, "dtype": dtype}
    return join(model, TrainedTokens, [target], adapter_name, **options)
