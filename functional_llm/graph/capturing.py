"""Activations: a model that also returns what goes through its layers."""

from typing import TypeVar

import keras

from functional_llm.graph.freezing import keep_frozen
from functional_llm.graph.rewiring import Rewiring
from functional_llm.graph.selection import Where, select

ModelT = TypeVar("ModelT", bound=keras.Model)


def capture(model: ModelT, where: Where, inputs: bool = False) -> ModelT:
    """Returns a model that also returns the outputs of the layers that match.

    ```python
    captured = capture(backbone, "decoder_*")
    result = captured(token_ids)          # {"logits": ..., "captured": {...}}
    result["captured"]["decoder_3"]["x"]  # (B, T, D)
    ```

    It shares the original's weights, and writes text like the original; with a cache, each call
    returns what the new tokens made.

    Args:
        model: A functional model. If its output is a dict, "captured" joins it; if not, it goes
            into such a dict as "outputs".
        where: Which layers, as for `select`.
        inputs: Whether to take what goes into the layers, not what comes out.

    Returns:
        A model of the same class. "captured" is a dict from paths to what each layer returns
        (nested, if that is). The second call of a layer is at "path#2".

    Raises:
        TypeError: If the model has no graph.
        ValueError: If it has none yet, or `where` matches nothing.
    """
    new_model = Rewiring(model, captured=select(model, where), of_inputs=inputs).result()
    keep_frozen(model, new_model, None)
    return new_model
