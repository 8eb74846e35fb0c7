"""Ids of a batch are checked before a compiled step reads them, which cannot raise an error.

Shapes: B batch, T tokens.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import keras
import numpy as np

from functional_llm.graph.types import Nested, Tensor


class ChecksData:
    """A mixin for language models: ids that are not in the vocabulary are an error.

    A compiled step would make them NaN, and then all weights. Put this class before `keras.Model`,
    which calls these methods.
    """

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""
        raise NotImplementedError

    @property
    def takes_token_labels(self) -> bool:
        """Whether labels are ids."""
        return True

    def make_train_function(self, force: bool = False) -> None:
        """Makes the step of `fit`."""
        self._make_checked("train", force)

    def make_test_function(self, force: bool = False) -> None:
        """Makes the step of `evaluate`."""
        self._make_checked("test", force)

    def make_predict_function(self, force: bool = False) -> None:
        """Makes the step of `predict`."""
        self._make_checked("predict", force)

    def _make_checked(self, kind: str, force: bool) -> None:
        name = f"{kind}_function"
        if getattr(self, name) is None or force:
            getattr(super(), f"make_{name}")(force)
            setattr(self, name, self._checked(getattr(self, name)))

    def _checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(state: Nested, batches: Iterable[Nested]) -> Any:
            return function(state, map(self._checked_batch, batches))

        return call

    def _checked_batch(self, data: Nested) -> Nested:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        token_ids = x.get("token_ids") if isinstance(x, Mapping) else x
        labels = y if self.takes_token_labels else None
        check_batch(token_ids, labels, self.vocabulary_size)
        return data


def check_batch(token_ids: Tensor | None, labels: Tensor | None, vocabulary_size: int) -> None:
    """Checks that ids and labels are in the vocabulary, as far as this process holds them.

    Args:
        token_ids: (B, T) integers.
        labels: (B, T) integers, negative for none; or `None`.
        vocabulary_size: What they must be below.

    Raises:
        ValueError: If one is not.
    """
    for name, ids, lowest in (("token ids", token_ids, 0), ("labels", labels, None)):
        values = _integers(ids)
        if values is None or not values.size:
            continue
        low, high = int(values.min()), int(values.max())
        if high >= vocabulary_size or (lowest is not None and low < lowest):
            negative = ", or negative for a token without one" if lowest is None else ""
            raise ValueError(
                f"Expected {name} from 0 to {vocabulary_size - 1}{negative}, received {name} from "
                f"{low} to {high}. They are those of a tokenizer with more tokens than the model."
            )


def _integers(x: Tensor | None) -> np.ndarray | None:
    if isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return None
    values = np.asarray(x)
    return values if values.dtype.kind in "iu" else None
