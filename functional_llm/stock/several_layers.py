"""Stock layers that stand for one of the library's, where one stock layer cannot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import keras

from functional_llm.graph.types import Layer, Nested, Tensor

Copies: TypeAlias = list[tuple[keras.Variable, keras.Variable]]  # the layer's, and a stock layer's


class InStockLayers(Protocol):
    """Stock layers that stand for one: called as it is, with the bias that it has."""

    @property
    def bias(self) -> keras.Variable | None:
        """The bias."""

    @property
    def layers(self) -> Sequence[Layer]:
        """The stock layers."""

    @property
    def copies(self) -> Copies:
        """Each variable of the layer, and the one that holds its value."""

    def __call__(self, x: Tensor, **kwargs: Nested) -> Tensor:
        """Returns the outputs for symbolic inputs."""


@dataclass(frozen=True)
class StockLayers:
    """A lowering to stock layers that hold the weights in another way than the layer.

    Args:
        make: `make(layer, name)` returns them; names of layers begin with `name`.
    """

    make: Callable[[Any, str], InStockLayers]
