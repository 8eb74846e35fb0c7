"""The arguments of a generation: checked, and turned into lists and arrays.

Shapes: B rows.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from functional_llm.files.processes import place_among_processes

_STOP_IDS = 8  # stop ids are padded to a multiple of this, so that few programs serve all numbers


def check_request(
    rows: Sequence[Sequence[int]], max_new_tokens: int, vocabulary_size: int, context: int | None
) -> None:
    """Checks prompts and the number of new tokens.

    Args:
        rows: Token ids of each prompt.
        max_new_tokens: Most tokens to write.
        vocabulary_size: Token ids must be below it.
        context: Most tokens of prompt and text together; `None` for no limit.

    Raises:
        ValueError: If there is no prompt, one is empty, has other ids or is too long, or the number
            is not a whole number above 0.
    """
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(f"Expected max_new_tokens of at least 1, received {max_new_tokens!r}.")
    if not rows:
        raise ValueError("Expected at least one prompt, received an empty list.")
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"Prompt {i} is empty. Expected at least one token.")
        check_ids(f"Prompt {i}", row, vocabulary_size)
        if context is not None and len(row) + max_new_tokens > context:
            raise ValueError(
                f"Prompt {i} has {len(row)} tokens, {max_new_tokens} more are asked for; the "
                f"model's context holds {context}. Shorten the prompt or ask for fewer."
            )


def check_ids(name: str, ids: Sequence[int], vocabulary_size: int) -> None:
    """Checks that ids are in the vocabulary; `name` begins the message."""
    wrong = [x for x in ids if not (is_whole(x) and 0 <= x < vocabulary_size)]
    if wrong:
        raise ValueError(
            f"{name}: expected token ids from 0 to {vocabulary_size - 1}, received {wrong[:5]}."
        )


def as_rows(prompts: Iterable[Iterable[int]]) -> list[list[int]]:
    """Returns rows of ids as lists, whatever arrays or sequences they were."""
    rows: Iterable[Any] = prompts if hasattr(prompts, "__iter__") else [prompts]
    return [as_ids(f"Prompt {i}", row) for i, row in enumerate(rows)]


def is_encoding(value: object) -> bool:
    """Whether a value is what a tokenizer of Transformers returns."""
    return isinstance(value, Mapping) and "input_ids" in value


def encoded_rows(encoding: Mapping[str, Any]) -> list[list[int]]:
    """Returns the ids of each prompt that a tokenizer of Transformers has encoded, unpadded."""
    ids, mask = encoding["input_ids"], encoding.get("attention_mask")
    is_single = np.ndim(next(iter(ids), 0)) == 0
    rows, masks = (as_rows([x] if is_single else x) for x in (ids, ids if mask is None else mask))
    if [len(row) for row in rows] != [len(row) for row in masks]:
        raise ValueError(
            f"Expected input_ids and attention_mask of one shape, received {encoding!r:.200}."
        )
    if mask is None:
        return rows
    pairs = zip(rows, masks, strict=True)
    return [[i for i, keep in zip(row, kept, strict=True) if keep] for row, kept in pairs]


def without_padding(
    prompts: Iterable[Iterable[int]], attention_mask: Any, mask: Any
) -> tuple[list[list[int]], list[np.ndarray] | None]:
    """Returns rows of ids without padding, and which of their tokens see which.

    Args:
        prompts: Rows of token ids, or what a tokenizer of Transformers returns.
        attention_mask: (B, T), 0 for padding, or `None`: then there is none.
        mask: (B, T, T) boolean, T of the longest row, or `None`.

    Raises:
        ValueError: If a mask has another shape or dtype.
    """
    if isinstance(prompts, Mapping) and is_encoding(prompts):
        if attention_mask is None and mask is None:
            return encoded_rows(prompts), None
        prompts = prompts["input_ids"]
    rows = as_rows(prompts)
    lengths = [len(row) for row in rows]
    keep = [np.ones(n, bool) for n in lengths]
    if attention_mask is not None:
        given = np.asarray(attention_mask, None if _is_regular(attention_mask) else object)
        shape = (len(rows), max(lengths, default=0))
        if given.shape != shape or min(lengths) < shape[1] or not np.isin(given, (0, 1)).all():
            raise ValueError(
                "Expected attention_mask of the shape of the prompts, rows of one length, 1 for a "
                f"token and 0 for padding. Received: {given.dtype} of shape {given.shape}, prompts "
                f"of {lengths[:5]} tokens."
            )
        keep = list(given == 1)
    masks = None
    if mask is not None:
        seen = np.asarray(mask)
        shape_of_all = (len(rows), max(lengths, default=0), max(lengths, default=0))
        if seen.dtype != bool or seen.shape != shape_of_all:
            raise ValueError(
                f"Expected mask, booleans of shape {shape_of_all}: True where a token may see "
                f"another. Received: {seen.dtype} of shape {seen.shape}."
            )
        masks = [x[: len(k), : len(k)][k][:, k] for x, k in zip(seen, keep, strict=True)]
    chosen = [
        [i for i, k in zip(row, ks, strict=True) if k] for row, ks in zip(rows, keep, strict=True)
    ]
    return chosen, masks


def _is_regular(rows: Any) -> bool:
    return hasattr(rows, "shape") or len({np.size(row) for row in rows}) <= 1


def as_ids(name: str, ids: Iterable[int]) -> list[int]:
    """Returns ids as a list; `name` begins the message if they are not one row."""
    given: Any = list(ids) if isinstance(ids, (set, frozenset)) else ids
    is_row = not isinstance(given, str)
    try:
        is_row = is_row and np.ndim(given) == 1
    except ValueError:  # of lists in it that differ in length
        is_row = False
    if not is_row:
        raise ValueError(
            f"{name}: expected a list of token ids, received {ids!r:.100}. Prompts are a list of "
            "such lists, also where there is only one."
        )
    return np.asarray(given).tolist()


def padded_masks(masks: list[np.ndarray], length: int) -> np.ndarray:
    """Returns masks as (B, T, T); nothing is said of what comes behind a prompt."""
    mask_BTT = np.ones((len(masks), length, length), bool)
    for row, mask in zip(mask_BTT, masks, strict=True):
        row[: len(mask), : len(mask)] = mask
    return mask_BTT


def padded_stop_ids(ids: Sequence[int]) -> np.ndarray:
    """Returns stop ids as int32, padded with -1."""
    return np.array([*ids, *[-1] * (_STOP_IDS - len(ids) % _STOP_IDS)], "int32")


def make_keys(seed: int | Sequence[int] | None, num_rows: int) -> jax.Array:
    """Returns a random key for each row, (B,): of `seed + i`, or of its own seed."""
    seeds: Any = _any_seed() if seed is None else seed
    if is_whole(seeds):
        seeds = [int(seeds) + i for i in range(num_rows)]
    if np.ndim(seeds) != 1 or len(seeds) != num_rows or not all(map(is_whole, seeds)):
        raise ValueError(
            f"Expected an integer seed, or one for each of {num_rows} rows, received {seed!r}."
        )
    return jax.vmap(jax.random.key)(np.array([int(s) % 2**32 for s in seeds], "uint32"))


def _any_seed() -> int:
    """Returns another number at every call, the same in all processes."""
    seed = np.frombuffer(os.urandom(4), "uint32")[0]
    if place_among_processes()[1] > 1:
        seed = multihost_utils.broadcast_one_to_all(seed)
    return int(seed)


def is_whole(x: object) -> bool:
    """Whether x is an integer of any type; True and False are not."""
    return isinstance(x, Integral) and not isinstance(x, bool)
