"""The inputs that a language model is called with: checked and completed.

Shapes: B batch, T tokens.
"""

from collections.abc import Collection, Mapping

import keras
import numpy as np
from keras import ops, tree

from functional_llm.graph.types import Nested, Tensor
from functional_llm.layers.attention import look_up
from functional_llm.layers.cache import Cache, latest_position

_PADDING_MASKS = ("attention_mask", "padding_mask")  # Transformers's name, KerasHub's name


def as_tensors(inputs: Nested) -> Nested:
    """Returns inputs without NumPy arrays: Keras refuses a mixture of those and tensors.

    Transformers's name of the token ids becomes ours.
    """

    def convert(x: Tensor) -> Tensor:
        return x if x is None or isinstance(x, keras.KerasTensor) else ops.convert_to_tensor(x)

    if isinstance(inputs, Mapping):  # a tokenizer of Transformers returns more than a dict
        names = {"input_ids": "token_ids"} if "token_ids" not in inputs else {}
        inputs = {names.get(name, name): x for name, x in inputs.items()}
    return tree.map_structure(convert, inputs)


def with_mask(inputs: Nested, mask: Nested) -> Nested:
    """Returns a model's inputs with the argument `mask` of its call among them.

    Args:
        inputs: Token ids (B, T), or a dict with `token_ids`.
        mask: (B, T) boolean, True for a token: an attention mask, which is what Keras's masking
            layers make; or (B, T, S) boolean; or `None`. Keras gives it the structure of `inputs`.

    Raises:
        ValueError: If `inputs` has such a mask already.
    """
    mask = np.asarray(mask) if isinstance(mask, list) else mask
    given = [x for x in tree.flatten(mask) if x is not None]
    if not given:
        return inputs
    complete = dict(inputs) if isinstance(inputs, dict) else {"token_ids": inputs}
    name = "attention_mask" if len(_shape(given[0])) == 2 else "mask"
    if len(given) > 1 or complete.get(name) is not None:
        raise ValueError(f"Expected one {name}, received several.")
    return {**complete, name: given[0]}


def complete_inputs(
    specs: Mapping[str, Nested], vocabulary_size: int, inputs: Nested
) -> dict[str, Nested]:
    """Returns the full dict of inputs: positions filled in, `None` for what is absent.

    Args:
        specs: The symbolic inputs of the graph.
        vocabulary_size: Token ids must be below it.
        inputs: Token ids (B, T), or a dict with `token_ids` and any optional inputs: those of the
            graph, and `attention_mask` (B, T), 0 for padding, as Transformers means it.
            `padding_mask`, KerasHub's name, is the same. `in_order` is `True` if the caller knows
            that the positions given are 0, 1, 2 ... in each row, padding only behind them: some
            kernels of attention need to know. In the result it is the tensor of positions.

    Raises:
        ValueError: If a key is unknown, a shape or a dtype is wrong, token ids are out of range,
            positions are not in order though `in_order` says so, a cache comes together with
            segment ids or is another model's, or layers with a state get what they cannot follow: a
            mask of one's own, or positions that go back.
    """
    given = dict(inputs) if isinstance(inputs, dict) else {"token_ids": inputs}
    expected = [*specs, *_PADDING_MASKS]
    unknown = sorted(set(given) - set(expected))
    if unknown or given.get("token_ids") is None:
        raise ValueError(f"Expected token_ids and any of {expected}, received {sorted(given)}.")
    token_ids = _checked_token_ids(given["token_ids"], vocabulary_size)
    cache, segment_ids = given.get("cache"), given.get("segment_ids")
    if cache is not None and segment_ids is not None:
        raise ValueError(
            "Expected `segment_ids` or `cache`, received both: a cache does not keep the segments "
            "of its tokens. Pack examples for training, without a cache."
        )
    for name in ("positions", "segment_ids"):
        _check_numbers(name, given.get(name), token_ids)
    attends = specs.get("mask", specs["cache"])  # layers that keep a state have no mask
    _check_cache(cache, specs["cache"], attends, token_ids.shape[0])
    positions = _positions(token_ids, cache, given.get("positions"), _padding_mask(given))
    for kind in set(specs["cache"]) - set(attends):
        _check_states(kind, given, positions)
    complete = {
        "token_ids": token_ids,
        "positions": positions,
        "segment_ids": segment_ids,
        "mask": None if "mask" not in specs else _masks(specs["mask"], given, positions),
        "in_order": positions if _are_in_order(given, positions) else None,
        "cache": tree.map_structure(lambda _: None, specs["cache"]) if cache is None else cache,
    }
    return {name: complete[name] for name in specs}


def _are_in_order(given: Mapping[str, Nested], positions_BT: Tensor) -> bool:
    """Whether positions are known to be 0, 1, 2 ... in each row, padding only behind them."""
    known = given.get("in_order")
    if known not in (None, True, False):
        raise ValueError(f"Expected in_order to be True, False or None, received {known!r}.")
    if known is None:
        names = ("positions", "cache", "segment_ids", *_PADDING_MASKS)
        return all(given.get(name) is None for name in names)
    values = _values(positions_BT) if known else None
    if values is not None:
        places = np.arange(values.shape[1])
        is_token = places < (values >= 0).sum(axis=1, keepdims=True)
        wrong_B = (values != np.where(is_token, places, -1)).any(axis=1)
        if wrong_B.any():
            raise ValueError(
                "Expected positions 0, 1, 2 ... in each row, -1 only behind them, for in_order is "
                f"True. Received a row of {values[wrong_B.argmax()]}. Leave in_order out."
            )
    return bool(known)


def _padding_mask(given: Mapping[str, Nested]) -> Tensor | None:
    """Returns the attention mask (B, T) as booleans, if there is one."""
    names = [name for name in _PADDING_MASKS if given.get(name) is not None]
    if not names:
        return None
    if len(names) > 1:
        raise ValueError(f"Expected one of {' and '.join(names)}, received both.")
    mask, shape = given[names[0]], tuple(given["token_ids"].shape)
    fits = _shape(mask) == shape
    values = _values(mask) if fits else None
    if not fits or (values is not None and not np.isin(values, (0, 1)).all()):
        received = "other numbers" if fits else f"{_described(mask)}"
        raise ValueError(
            f"Expected {names[0]} of the shape of token_ids, {shape}, 1 for a token and 0 for "
            f"padding. Received: {received}. Which tokens see which others is said by `mask`, "
            "booleans of shape (batch, tokens, tokens)."
        )
    return ops.cast(mask, "bool")


def _masks(specs: Nested, given: Mapping[str, Nested], positions_BT: Tensor) -> Nested:
    """Returns the user's mask for the slots of each type of layers, `None` if there is none."""
    mask, cache = given.get("mask"), given.get("cache")
    if mask is None:
        return dict.fromkeys(specs)
    batch, length = positions_BT.shape
    is_bool = str(getattr(mask, "dtype", None)) == "bool"
    fits = len(_shape(mask)) == 3 and _shape(mask)[:2] == (batch, length)
    if not is_bool or not fits or (cache is None and mask.shape[2] != length):
        columns = length if cache is None else "positions"
        raise ValueError(
            f"Expected mask, booleans of shape ({batch}, {length}, {columns}): True where a token "
            f"may see another. Received: {_described(mask)}."
        )
    if cache is None:
        return dict.fromkeys(specs, mask)
    highest = _values(positions_BT)
    if highest is not None and highest.max(initial=-1) >= mask.shape[2]:
        raise ValueError(
            f"Expected mask to have a column for each position, up to {highest.max()}, received "
            f"{mask.shape[2]} columns."
        )

    def of_slots(cached_BS: Tensor) -> Tensor:
        slots_BS = look_up(positions_BT, cached_BS, positions_BT)[0]
        columns = ops.clip(slots_BS, 0, mask.shape[2] - 1)
        seen = ops.take_along_axis(mask, ops.expand_dims(columns, 1), axis=2)
        # While text is written, tokens come for which the mask has no column.
        return ops.logical_or(seen, ops.expand_dims(slots_BS >= mask.shape[2], 1))

    return {name: of_slots(cache[name]["positions"]) for name in specs}


def _checked_token_ids(token_ids: Tensor, vocabulary_size: int) -> Tensor:
    """Returns the token ids as int32."""
    shape, dtype = getattr(token_ids, "shape", ()), getattr(token_ids, "dtype", None)
    if len(shape) != 2 or not keras.backend.is_int_dtype(dtype):
        raise ValueError(
            "Expected token_ids, an array of shape (batch, tokens) and an integer dtype, received "
            f"a {type(token_ids).__name__} of shape {tuple(shape)}, dtype {dtype}."
        )
    if 0 in shape[1:]:
        raise ValueError(
            f"Expected token_ids of at least one token, received shape {tuple(shape)}."
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


def _check_numbers(name: str, x: Tensor | None, token_ids: Tensor) -> None:
    shape = tuple(token_ids.shape)
    if x is None:
        return
    if _shape(x) != shape or not keras.backend.is_int_dtype(x.dtype):
        raise ValueError(
            f"Expected {name}, integers of the shape of token_ids, {shape}, received "
            f"{_described(x)}."
        )


def _check_cache(
    cache: Cache | None, spec: Nested, attends: Collection[str], batch: int | None
) -> None:
    if cache is None:
        return
    groups = list(cache.values()) if isinstance(cache, Mapping) else [None]
    is_made = all(isinstance(group, Mapping) and "positions" in group for group in groups)
    if not is_made or set(cache) != set(spec):
        keys = sorted(map(str, cache)) if isinstance(cache, Mapping) else type(cache).__name__
        raise ValueError(
            f"Expected a cache of this model, of `make_cache` or of an earlier call: for each of "
            f"{sorted(spec)} a dict with positions and what each layer keeps. Received one with "
            f"the keys {keys}{'' if is_made else ', in part without positions'}."
        )
    rows = _shape(groups[0]["positions"])[0]
    if None not in (rows, batch) and rows != batch:
        raise ValueError(
            f"Expected a cache for {batch} rows, as many as token_ids has, received one for {rows}."
        )
    expected = {path: _shape(x) for path, x in tree.flatten_with_path(spec)}
    received = {path: _shape(x) for path, x in tree.flatten_with_path(cache)}
    for path in sorted({*expected, *received}, key=str):
        shape, own = expected.get(path), received.get(path)
        if shape is None or own is None or not _fits(own, rows, shape):
            raise ValueError(
                f"Expected a cache of this model, received another one's: for {'/'.join(path)} the "
                f"shape {own} in the place of {shape}."
            )
    for kind in set(spec) - set(attends):
        wrong = {x.dtype for x in tree.flatten(cache[kind]) if x.dtype not in ("int32", "float32")}
        if wrong:
            raise ValueError(
                f"Expected states in float32 for layers of the type '{kind}', whatever the model "
                f"computes in, received {sorted(map(str, wrong))}. Leave their dtype as it is."
            )


def _fits(shape: tuple[int | None, ...], rows: int | None, spec: tuple[int | None, ...]) -> bool:
    """Whether a leaf of a cache is one that `make_cache` makes."""
    if (len(shape), shape[0], shape[2:]) != (len(spec), rows, spec[2:]):
        return False
    slots, most = shape[1], spec[1]  # a ring may have fewer slots than its window
    return slots is None or most is None or 0 < slots <= most


def _check_states(kind: str, given: Mapping[str, Nested], positions_BT: Tensor) -> None:
    """Checks what layers that keep a state of all tokens cannot follow."""
    if given.get("mask") is not None:
        raise ValueError(
            f"Expected no mask: layers of the type '{kind}' keep a state of all tokens before, and "
            "cannot leave some out. Say what is padding by `attention_mask`, and which tokens are "
            "texts of their own by `segment_ids`."
        )
    values, cache, segments = _values(positions_BT), given.get("cache"), given.get("segment_ids")
    if values is None or values.shape[0] is None:
        return
    tags = np.full(len(values), -1)
    if cache is not None:
        tag_B1 = _values(cache[kind]["positions"])
        tags = tags if tag_B1 is None else tag_B1[:, 0]
        _check_same_time(kind, tag_B1, cache)
    segments = None if segments is None else _values(segments)
    for i, row in enumerate(values):
        is_token = row >= 0
        texts = np.zeros(is_token.sum()) if segments is None else segments[i][is_token]
        steps, same = np.diff(row[is_token]), np.diff(texts) == 0
        goes_back = is_token.any() and row[is_token][0] <= tags[i]
        if goes_back or (steps[same] <= 0).any():
            begin = tags[i] + 1
            raise ValueError(
                f"Expected positions that rise in each row, from {begin} on, for the states of "
                f"the type '{kind}' have absorbed the tokens before: they cannot go back. Received "
                f"{row} in row {i}. Read the text again, or keep the cache of an earlier "
                "call."
            )


def _check_same_time(kind: str, tag_B1: np.ndarray | None, cache: Cache) -> None:
    """Checks that a state has absorbed the tokens whose keys and values are beside it."""
    for other, group in cache.items():
        positions_BS = _values(group["positions"])
        if tag_B1 is None or positions_BS is None:
            continue
        latest_B = positions_BS.max(axis=1, initial=-1)
        if (latest_B != tag_B1[:, 0]).any():
            row = int((latest_B != tag_B1[:, 0]).argmax())
            raise ValueError(
                f"Expected a cache of one time, received the states of the type '{kind}' after "
                f"{tag_B1[row, 0] + 1} tokens beside '{other}' after {latest_B[row] + 1}, in row "
                f"{row}. A state cannot be cut or put together: keep the whole cache of a call."
            )


def _shape(x: Nested) -> tuple[int | None, ...]:
    return tuple(getattr(x, "shape", ()))


def _described(x: Nested) -> str:
    return f"{getattr(x, 'dtype', type(x).__name__)} of shape {_shape(x)}"


def _values(x: Tensor) -> np.ndarray | None:
    """Returns the values of an array; `None` while only its shape is known."""
    if isinstance(x, keras.KerasTensor):
        return None
    try:
        return ops.convert_to_numpy(x)
    except (TypeError, NotImplementedError, RuntimeError):  # while a compiler traces
        return None


def _positions(
    token_ids: Tensor, cache: Cache | None, given: Tensor | None, is_token: Tensor | None
) -> Tensor:
    """Returns the positions (B, T), -1 for padding."""
    batch, length = ops.shape(token_ids)
    if given is not None:
        positions_BT = ops.cast(given, "int32")
    elif is_token is not None:
        positions_BT = ops.cumsum(ops.cast(is_token, "int32"), axis=1) - 1
    else:
        positions_BT = ops.expand_dims(ops.arange(length, dtype="int32"), 0)
    if given is None and cache is not None:
        positions_BT = ops.expand_dims(latest_position(cache), 1) + 1 + positions_BT
    if is_token is not None:
        positions_BT = ops.where(is_token, positions_BT, -1)
    return ops.broadcast_to(positions_BT, (batch, length))
