"""One generation: a prefill, the decode loop, and a prefill anew where a text becomes long.

Shapes: B rows, T tokens of a padded prompt, C new tokens of one run, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from functional_llm.generation.arguments import padded_masks
from functional_llm.generation.not_finite import not_finite_error
from functional_llm.generation.programs import (
    NOT_FINITE,
    TOKENS_PER_RUN,
    CompiledPrograms,
    DecodeState,
    Prompt,
)
from functional_llm.generation.prompt_cache import PromptCache
from functional_llm.generation.results import NewTokens
from functional_llm.generation.samplers import Sampler, needs_keys
from functional_llm.graph.placing import to_numpy
from functional_llm.layers.cache import Cache, capped_num_slots, num_slots
from functional_llm.layers.long_texts import turning_lengths

_SMALLEST_PROMPT = 32
_SMALLEST_CACHE = 256
_SLOTS_AHEAD = 256  # slots that a cache has for new tokens from the beginning


@dataclass(frozen=True)
class Request:
    """What is to be written.

    Args:
        rows: The ids of each prompt.
        max_new_tokens: Most tokens to write.
        sampler: A sampler whose numbers are arrays.
        stop_ids: Ids that end a row, padded with -1.
        keys: (B,) random keys.
        masks: For each row, which of its prompt's tokens see which; `None` for all.
        seconds: How long a run of the decode loop is to take, judged by the one before.
        most: Most tokens of a run.
    """

    rows: Sequence[Sequence[int]]
    max_new_tokens: int
    sampler: Sampler
    stop_ids: np.ndarray
    keys: jax.Array
    masks: Sequence[np.ndarray] | None = None
    seconds: float = math.inf
    most: int = TOKENS_PER_RUN


class Run:
    """Writes what is requested.

    Some models read a whole text in another way once it is long (LongRoPE): what their cache holds
    of it is of no use then. Where a row gets there, all rows are read again, so that the text goes
    on as if it had been a prompt.

    Args:
        programs: The model's.
        request: What is to be written.
        prompt_cache: The cache of earlier turns of the one row, reused and updated; or `None`.
    """

    def __init__(
        self, programs: CompiledPrograms, request: Request, prompt_cache: PromptCache | None = None
    ) -> None:
        self._programs = programs
        self._request = request
        self._prompt_cache = prompt_cache
        self._weights = programs.weights()
        self._turns = turning_lengths(programs.backbone)
        self._rows = [list(row) for row in request.rows]  # with what is written
        self._written = 0
        self._done_B = np.zeros(len(self._rows), bool)
        self._state: DecodeState  # after the prefill
        # A stream's first token after the prefill comes alone.
        self._token_seconds = request.seconds if math.isfinite(request.seconds) else 1.0

    def new_tokens(self) -> Iterator[NewTokens]:
        """Yields what is new, until every row has ended."""
        request, prompt_cache, done_B = self._request, self._prompt_cache, self._done_B
        new_BC = self._prefill(*self._known())
        try:
            while True:
                if (new_BC == NOT_FINITE).any():
                    if prompt_cache is not None:
                        prompt_cache.ids = []  # nor is what it holds
                    raise not_finite_error(self._programs.backbone)
                self._written += new_BC.shape[1]
                done_B |= np.isin(new_BC, request.stop_ids[request.stop_ids >= 0]).any(axis=1)
                new = [[int(i) for i in ids if i >= 0] for ids in new_BC]
                for row, ids in zip(self._rows, new, strict=True):
                    row.extend(ids)
                yield NewTokens(new, done_B)
                if prompt_cache is not None:
                    prompt_cache.ids += new[0]
                if self._written >= request.max_new_tokens or done_B.all():
                    break
                new_BC = self._go_on()
        finally:
            if prompt_cache is not None:
                prompt_cache.keep(self._state.cache)

    def _known(self) -> tuple[int, Cache | None]:
        """Returns how many tokens of the prompt an earlier turn's cache holds, and that cache."""
        if self._prompt_cache is None:
            return 0, None
        return self._prompt_cache.reuse(self._rows[0], self._turns)

    def _go_on(self) -> np.ndarray:
        """Returns the next tokens (B, C), -1 in rows that are done."""
        # The last token written is stored by the next step.
        positions = [
            len(row) - 1 for row, done in zip(self._rows, self._done_B, strict=True) if not done
        ]
        if set(positions) & set(self._turns):
            slots = num_slots(self._state.cache)
            jax.tree.map(lambda x: x.delete(), self._state.cache)  # makes room for the new one
            new_B1 = np.where(self._done_B[:, None], -1, self._prefill(at_least=slots))
            self._programs.stats.decode_tokens += int((new_B1 >= 0).sum())
            return new_B1
        return self._decode(positions)

    def _prefill(self, known: int = 0, cache: Cache | None = None, at_least: int = 0) -> np.ndarray:
        """Reads the rows; returns a new token for each, (B, 1).

        Args:
            known: How many tokens of the row `cache` holds.
            cache: Of an earlier turn.
            at_least: How many slots the cache shall have.
        """
        request, left = self._request, self._request.max_new_tokens - self._written
        rows = [
            row[:1] if done else row for row, done in zip(self._rows, self._done_B, strict=True)
        ]
        slots = max(map(len, rows)) + min(left, _SLOTS_AHEAD)
        slots = max(self._num_slots(slots), at_least)
        if cache is not None:
            cache = self._grown(cache, slots)
            slots = num_slots(cache)
        prompt = make_prompt(rows, slots, request.sampler, request.keys, known, cache)
        prompt = prompt._replace(step=np.int32(self._written))
        if request.masks is not None:
            masks = [
                _with_new(mask, len(row)) for mask, row in zip(request.masks, rows, strict=True)
            ]
            prompt = prompt._replace(mask=padded_masks(masks, prompt.tokens.shape[1]))
        if self._written == 0:
            self._programs.stats.prefill_tokens = int((prompt.positions >= 0).sum())
        token_B, self._state = self._programs.prefill(
            slots, self._weights, prompt, request.sampler, request.stop_ids if left > 1 else None
        )
        if self._prompt_cache is not None:
            self._prompt_cache.keep_states(self._state.cache)
        return to_numpy(token_B)[:, None]

    def _decode(self, positions: Sequence[int]) -> np.ndarray:
        """Runs the decode loop once.

        Args:
            positions: Of the last token of each row that is not done.
        """
        request, state = self._request, self._state
        fitting = max(1, int(min(request.seconds / self._token_seconds, request.most)))
        limit = min(fitting, request.max_new_tokens - self._written)
        # A cache grows when it is full, and is doubled then, unless all of it are full rings.
        taken, slots = max(positions), num_slots(state.cache)
        if self._num_slots(slots + 1) > slots:
            limit = min(limit, slots - taken if taken < slots else slots)
        until_long = [turn - p for p in positions for turn in self._turns if p < turn]
        limit = min([limit, *until_long])
        self._state = state = state._replace(cache=self._grown(state.cache, taken + limit))
        before = self._programs.stats.decode_seconds
        new_BC, self._state = self._programs.decode(
            self._weights, state, request.sampler, self._done_B, request.stop_ids, limit
        )
        self._token_seconds = (self._programs.stats.decode_seconds - before) / new_BC.shape[1]
        return new_BC

    def _num_slots(self, needed: int) -> int:
        return capped_num_slots(self._programs.backbone, _power_of_two(needed, _SMALLEST_CACHE))

    def _grown(self, cache: Cache, needed: int) -> Cache:
        """Returns a cache in which so many positions fit, before a ring that may grow wraps."""
        slots = self._num_slots(needed)
        return cache if slots <= num_slots(cache) else self._programs.grow(cache, slots)


def make_prompt(
    rows: Sequence[Sequence[int]],
    slots: int,
    sampler: Sampler,
    keys_B: jax.Array,
    known: int = 0,
    cache: Cache | None = None,
) -> Prompt:
    """Returns what a prefill reads, padded to few shapes.

    Args:
        rows: Token ids.
        slots: Of the cache that the prefill will fill.
        sampler: What chooses the next token.
        keys_B: (B,) random keys.
        known: How many tokens of the one row are in the cache already.
        cache: The cache of an earlier turn, or `None`.
    """
    lengths = [len(row) - known for row in rows]
    length = _power_of_two(max(lengths), _SMALLEST_PROMPT)
    tokens_BT = np.zeros((len(rows), length), "int32")
    positions_BT = np.full((len(rows), length), -1, "int32")
    # No fewer than the slots, so that few shapes serve all lengths.
    longest = _power_of_two(max(map(len, rows)), 1)
    ids_BL = np.full((len(rows), max(slots, longest)), -1, "int32")
    for i, row in enumerate(rows):
        tokens_BT[i, : lengths[i]] = row[known:]
        positions_BT[i, : lengths[i]] = np.arange(known, len(row))
        ids_BL[i, : len(row)] = row
    last_B = np.array(lengths, "int32") - 1
    row_ids = ids_BL if sampler.needs_seen else None
    return Prompt(
        tokens_BT, positions_BT, last_B, row_ids, keys_B if needs_keys(sampler) else None, cache
    )


def _with_new(mask_TT: np.ndarray, length: int) -> np.ndarray:
    """Returns a prompt's mask for its first `length` tokens, or with new ones behind it.

    A new token sees what the prompt's last one sees, and new ones.
    """
    new = max(0, length - len(mask_TT))
    wider = np.pad(mask_TT, ((0, new), (0, 0)), mode="edge")
    return np.pad(wider, ((0, 0), (0, new)), constant_values=True)[:length, :length]


def _power_of_two(number: int, smallest: int) -> int:
    return max(smallest, 1 << (number - 1).bit_length())
