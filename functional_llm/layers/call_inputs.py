"""The inputs that a language model is called with: checked and completed.

Shapes: B batch, T tokens.
"""

from collections.abc import Mapping

import keras
import numpy as np
from keras import ops, tree

from functional_llm.graph.types import Nested, Tensor
from functional_llm.layers.cache import Cache, latest_position


def as_tensors(inputs: Nested) -> Nested:
    """Returns nested inputs without NumPy arrays: Keras refuses a mixture of those and tensors."""

    def convert(x: Tensor) -> Tensor:
        return x if x is None or isinstance(x, keras.KerasTensor) else ops.convert_to_tensor(x)

    return tree.map_structure(convert, inputs)


def complete_inputs(
    specs: Mapping[str, Nested], vocabulary_size: int, inputs: Nested
) -> dict[str, Nested]:
    """Returns the full dict of inputs: positions filled in, `None` for what is absent.

    Args:
        specs: The symbolic inputs of the graph.
        vocabulary_size: Token ids must be below it.
        inputs: Token ids (B, T), or a dict with `token_ids` and any optional inputs.

    Raises:
        ValueError: If a key is unknown, a shape is wrong, token ids are not integers or out of
            range, or a cache comes together with segment ids.
    """
    given = dict(inputs) if isinstance(inputs, dict) else {"token_ids": inputs}
    unknown = sorted(set(given) - set(specs))
    if unknown or given.get("token_ids") is None:
        raise ValueError(f"Expected token_ids and any of {list(specs)}, received {sorted(given)}.")
    token_ids = _checked_token_ids(given["token_ids"], vocabulary_size)
    cache, positions = given.get("cache"), given.get("positions")
    if cache is not None and given.get("segment_ids") is not None:
        raise ValueError(
            "Expected `segment_ids` or `cache`, received both: a cache does not keep the segments "
            "of its tokens. Pack examples for training, without a cache."
        )
    _check_positions(positions, token_ids)
    _check_cache(cache, specs["cache"], token_ids.shape[0])
    if positions is None:
        positions = _default_positions(token_ids, cache)
    empty = tree.map_structure(lambda _: None, specs["cache"])
    return {
        "token_ids": token_ids,
        "positions": positions,
        "segment_ids": given.get("segment_ids"),
        "cache": empty if cache is None else cache,
    }


def _checked_token_ids(token_ids: Tensor, vocabulary_size: int) -> Tensor:
    """Returns the token ids as int32."""
    shape, dtype = getattr(token_ids, "shape", ()), getattr(token_ids, "dtype", None)
    if len(shape) != 2 or not keras.backend.is_int_dtype(dtype):
        raise ValueError(
            "Expected token_ids, an array of shape (batch, tokens) and an integer dtype, received "
            f"a {type(token_ids).__name__} of shape {tuple(shape)}, dtype {dtype}."
        )
    ids = _values(token_ids)
    if ids is not None and ids.size:
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= vocabulary_size:
            raise ValueError(
                f"Expected token ids from 0 to {vocabulary_size - 1}, received ids from {lowest} "
                f"to {highest}."
            )
    return ops.cast(token_ids, "int32")


def _check_positions(positions: Tensor | None, token_ids: Tensor) -> None:
    shape = tuple(token_ids.shape)
    if positions is not None and tuple(positions.shape) != shape:
        raise ValueError(
            f"Expected positions of the shape of token_ids, {shape}, received "
            f"{tuple(positions.shape)}."
        )


def _check_cache(cache: Cache | None, spec: Nested, batch: int | None) -> None:
    if cache is None:
        return
    same = isinstance(cache, dict) and set(cache) == set(spec)
    rows = next(iter(cache.values()))["positions"].shape[0] if same else None
    if rows is None or None not in (rows, batch) and rows != batch:
        raise ValueError(
            f"Expected a cache of `make_cache` or of an earlier call, for {batch} rows, "
            f"received one for {rows} with the keys {sorted(cache)}."
        )


def _values(x: Tensor) -> np.ndarray | None:
    """Returns the values of an array; `None` while only its shape is known."""
    if isinstance(x, keras.KerasTensor):
        return None
    try:
        return ops.convert_to_numpy(x)
    except (TypeError, NotImplementedError, RuntimeError):  # while a compiler traces
        return None


def _default_positions(token_ids: Tensor, cache: Cache | None) -> Tensor:
    batch, length = ops.shape(token_ids)
    positions_1T = ops.expand_dims(ops.arange(length, dtype="int32"), 0)
    if cache is None:
        return ops.broadcast_to(positions_1T, (batch, length))
    return ops.expand_dims(latest_position(cache), 1) + 1 + positions_1T
