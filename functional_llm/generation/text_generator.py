"""Generation: prompts in, text or ids out, around the compiled programs of `decoding`.

Shapes: B rows, T tokens of a padded prompt, C new tokens since the last look, V vocabulary.
"""

import math
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from functional_llm.formats.download import cache_directory
from functional_llm.generation import samplers
from functional_llm.generation.programs import CHUNK, Programs, Stats
from functional_llm.generation.stop_strings import StoppingDecoder
from functional_llm.layers.cache import fitting_slots, holds, num_slots, truncate_cache
from functional_llm.tokenizers import TextTokenizer

_SMALLEST_PROMPT = 32
_SMALLEST_CACHE = 256
_ROOM = 256  # new tokens that a cache has slots for from the beginning
_PAUSE = 0.1  # seconds between two pieces of a stream, or the time of one token
_CACHE_FOLDER = "jax_compilation_cache_dir"
_LEAST_SECONDS = "jax_persistent_cache_min_compile_time_secs"
_STOP_IDS = 8  # stop ids are padded to a multiple of this: few programs serve all


@dataclass
class PromptCache:
    """What a conversation keeps between turns: one row's tokens and their cache."""

    ids: list[int] = field(default_factory=list)
    cache: Any = None

    def reuse(self, row: list[int]) -> tuple[int, Any]:
        """Takes what agrees with a new row.

        Args:
            row: The ids of the new turn, history included.

        Returns:
            How many of the row's tokens are in the cache, fewer than all (one must be fed, to
            have logits), and the cache; `None` if no token is.
        """
        pairs = zip(self.ids, row[:-1], strict=False)
        known = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        cache, self.ids, self.cache = self.cache, list(row), None
        if cache is None or known == 0 or not holds(cache, known):
            return 0, None
        return known, truncate_cache(cache, known)


class TextGenerator:
    """Writes text with a language model; holds the compiled programs.

    ```python
    generator = TextGenerator(backbone, tokenizer)
    generator.generate("The capital of France is", max_new_tokens=32)
    ```

    A prefill is compiled for a number of rows, a padded prompt length and a cache size, a decode
    loop for a number of rows and a cache size, both for the kind of sampler; lengths and sizes are
    powers of two. Nothing is compiled for the sampler's numbers, the seed, the stop ids or the
    number of tokens. New values of the backbone's weights are seen at the next call.

    A cache begins with slots for the prompts and 256 new tokens (fewer if fewer are asked for), and
    at least 256. It is doubled when what is written comes to its end, not before: each doubling
    compiles, at first sight, a program that copies the cache and the decode loop of the new size.
    So up to 256 new tokens compile no more than a prefill and a decode loop (and a copy, if they
    outgrow the cache of an earlier turn). Where all layers see a window, a cache stops growing at
    the largest of them.

    Args:
        backbone: A Backbone, or any functional model with its inputs and outputs.
        tokenizer: A tokenizer, or `None` to work with ids only.
    """

    def __init__(self, backbone: keras.Model, tokenizer: TextTokenizer | None = None) -> None:
        self.backbone = backbone
        self.tokenizer = tokenizer
        self._programs = Programs(backbone)
        _use_compilation_cache()

    @property
    def stats(self) -> Stats:
        """Where the time of the last generation went."""
        return self._programs.stats

    @property
    def num_compilations(self) -> int:
        """How many programs have been compiled so far."""
        return len(self._programs.compiled)

    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 64,
        sampler: str | samplers.Sampler = "greedy",
        stop: str | Sequence[str] = (),
        seed: int | Sequence[int] | None = None,
    ) -> Any:
        """Returns the new text of each prompt, up to a stop string or the model's own end.

        Args:
            prompts: One text, or a list of them.
            max_new_tokens: Most tokens to write, at least 1.
            sampler: A sampler, or its name (`samplers.get`).
            stop: Texts that end a row; they are left out of the result.
            seed: Of the random numbers; row i draws with `seed + i`, or give one a row. `None`
                for other numbers at every call. A row's text depends on no other row.

        Returns:
            A string for a string, else a list of strings.

        Raises:
            ValueError: At an empty prompt, one longer than the context, or a bad number.
        """
        single = isinstance(prompts, str)
        if not isinstance(prompts, (str, list, tuple)):
            raise ValueError(f"Expected a text or a list of texts, received {prompts!r:.100}.")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        writers = [StoppingDecoder(self._tokenizer(), stop, continues=True) for _ in texts]
        rows = [self._encode(text) for text in texts]
        stop_ids = self._tokenizer().stop_token_ids
        pieces = [""] * len(texts)
        for chunk in self._run(rows, max_new_tokens, sampler, stop_ids, seed):
            for i, ids in enumerate(chunk.new_ids):
                pieces[i] += writers[i].push(ids)
                if writers[i].stopped:
                    chunk.finish_row(i)
        pieces = [piece + writer.finish() for piece, writer in zip(pieces, writers, strict=True)]
        return pieces[0] if single else pieces

    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 64,
        sampler: str | samplers.Sampler = "greedy",
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        past: PromptCache | None = None,
    ) -> Generator[str]:
        """Yields the new text of one prompt, as it is written: never half a character.

        A piece is a token, or as many as take a tenth of a second.

        Args:
            prompt: A text, or ids (of a chat template, say).
            max_new_tokens: As for `generate`.
            sampler: As for `generate`.
            stop: As for `generate`.
            seed: As for `generate`.
            past: Of an earlier call, to reuse its cache as far as the tokens agree; updated.
        """
        continues = isinstance(prompt, str)
        ids = self._encode(prompt) if isinstance(prompt, str) else _as_ids("The prompt", prompt)
        writer = StoppingDecoder(self._tokenizer(), stop, continues)
        stop_ids = self._tokenizer().stop_token_ids
        for chunk in self._run([ids], max_new_tokens, sampler, stop_ids, seed, past, _PAUSE):
            piece = writer.push(chunk.new_ids[0])
            if piece:
                yield piece
            if writer.stopped:
                chunk.finish_row(0)
        piece = writer.finish()
        if piece:
            yield piece

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        sampler: str | samplers.Sampler = "greedy",
        stop_token_ids: Sequence[int] = (),
        seed: int | Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Returns the new ids of each row of ids, its stop id included.

        Args:
            prompts: Rows of token ids, of any lengths.
            max_new_tokens: How many to write; fewer only after a stop id.
            sampler: As for `generate`.
            stop_token_ids: Ids that end a row.
            seed: As for `generate`.
        """
        rows = _as_rows(prompts)
        self._check_ids("stop_token_ids", _as_ids("stop_token_ids", stop_token_ids))
        results: list[list[int]] = [[] for _ in rows]
        for chunk in self._run(rows, max_new_tokens, sampler, stop_token_ids, seed):
            for result, ids in zip(results, chunk.new_ids, strict=True):
                result.extend(ids)
        return results

    def _tokenizer(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise ValueError("This TextGenerator has no tokenizer: use generate_ids, or give one.")
        return self.tokenizer

    def _encode(self, text: str) -> list[int]:
        tokenizer = self._tokenizer()
        if not isinstance(text, str) or not text:
            raise ValueError(f"Expected a prompt of at least one character, received {text!r}.")
        return tokenizer.encode(text, add_bos=tokenizer.add_bos)

    def _run(
        self,
        rows: list[list[int]],
        max_new_tokens: int,
        sampler: str | samplers.Sampler,
        stop_ids: Any,
        seed: Any,
        past: PromptCache | None = None,
        pause: float = math.inf,
    ) -> Iterator["_Chunk"]:
        """Prefills, then decodes until every row has ended; yields what is new.

        What comes next is as many tokens as take `pause` seconds, judged by those before.
        """
        self._check(rows, max_new_tokens)
        max_new_tokens = int(max_new_tokens)
        self._programs.stats = Stats()
        sampler = jax.tree.map(_as_array, samplers.get(sampler))
        stop_ids = sorted(stop_ids)
        stops = np.array(stop_ids + [-1] * (_STOP_IDS - len(stop_ids) % _STOP_IDS), "int32")
        values = self._programs.values()
        arguments, slots = self._prompt(rows, max_new_tokens, past)
        arguments["keys"] = _make_keys(seed, len(rows))
        token_B, state = self._programs.prefill(slots, values, arguments, sampler)
        del arguments  # and with them the cache of an earlier turn
        lengths_B = np.array([len(row) for row in rows])
        new_BC, written = np.asarray(token_B)[:, None], 1
        # The first one that is decoded for a stream comes alone.
        token_seconds = pause if math.isfinite(pause) else 1.0
        done_B = np.zeros(len(rows), bool)
        try:
            while True:
                done_B |= np.isin(new_BC, stop_ids).any(axis=1)
                yield _Chunk([[int(i) for i in ids if i >= 0] for ids in new_BC], done_B)
                if past is not None:  # the last one written is not in the cache yet
                    past.ids += [int(i) for i in new_BC[0] if i >= 0]
                if written >= max_new_tokens or done_B.all():
                    break
                fitting = max(1, int(min(pause / token_seconds, CHUNK)))
                limit = np.int32(min(fitting, max_new_tokens - written))
                # The last token written is stored by the next step: one slot fewer than tokens.
                needed = int(lengths_B[~done_B].max()) + written + int(limit) - 1
                state["cache"] = self._grow(state["cache"], needed)
                before = self.stats.decode_seconds
                new_BC, state = self._programs.decode(values, state, sampler, done_B, stops, limit)
                token_seconds = (self.stats.decode_seconds - before) / new_BC.shape[1]
                written += new_BC.shape[1]
        finally:
            if past is not None:
                past.cache, past.ids = state["cache"], past.ids[:-1]

    def _check(self, rows: list[list[Any]], max_new_tokens: Any) -> None:
        if not _is_whole(max_new_tokens) or max_new_tokens < 1:
            raise ValueError(f"Expected max_new_tokens of at least 1, received {max_new_tokens!r}.")
        if not rows:
            raise ValueError("Expected at least one prompt, received an empty list.")
        context = getattr(getattr(self.backbone, "config", None), "max_sequence_length", None)
        for i, row in enumerate(rows):
            if not row:
                raise ValueError(f"Prompt {i} is empty. Expected at least one token.")
            self._check_ids(f"Prompt {i}", row)
            if context is not None and len(row) + max_new_tokens > context:
                raise ValueError(
                    f"Prompt {i} has {len(row)} tokens, {max_new_tokens} more are asked for; the "
                    f"model's context holds {context}. Shorten the prompt or ask for fewer."
                )

    def _check_ids(self, name: str, ids: list[Any]) -> None:
        size = self.backbone.output["logits"].shape[-1]
        wrong = [x for x in ids if not (_is_whole(x) and 0 <= x < size)]
        if wrong:
            raise ValueError(
                f"{name}: expected token ids from 0 to {size - 1}, received {wrong[:5]}."
            )

    def _prompt(
        self, rows: list[list[int]], max_new_tokens: int, past: PromptCache | None
    ) -> tuple[dict[str, Any], int]:
        """Returns the arguments of the prefill, padded to few shapes, and the number of slots."""
        slots = self._slots(max(map(len, rows)) + min(max_new_tokens, _ROOM))
        known, cache = 0, None
        if past is not None:
            known, cache = past.reuse(rows[0])
        if cache is not None:
            cache = self._grow(cache, slots)
            slots = num_slots(cache)
        lengths = [len(row) - known for row in rows]
        length = _power_of_two(max(lengths), _SMALLEST_PROMPT)
        tokens_BT = np.zeros((len(rows), length), "int32")
        positions_BT = np.full((len(rows), length), -1, "int32")
        for i, row in enumerate(rows):
            tokens_BT[i, : lengths[i]] = row[known:]
            positions_BT[i, : lengths[i]] = np.arange(known, len(row))
        last_B = np.array(lengths, "int32") - 1
        seen_BV = np.zeros((len(rows), self.backbone.output["logits"].shape[-1]), bool)
        for i, row in enumerate(rows):
            seen_BV[i, row] = True
        self.stats.prefill_tokens = sum(lengths)
        arguments = {"tokens": tokens_BT, "positions": positions_BT, "last": last_B}
        return arguments | {"cache": cache, "seen": seen_BV}, slots

    def _slots(self, needed: int) -> int:
        return fitting_slots(self.backbone, _power_of_two(needed, _SMALLEST_CACHE))

    def _grow(self, cache: Any, needed: int) -> Any:
        """Returns a cache in which so many positions fit, before a ring that may grow wraps."""
        slots = self._slots(needed)
        return cache if slots <= num_slots(cache) else self._programs.grow(cache, slots)


class _Chunk:
    """New ids a row, since the last look."""

    def __init__(self, new_ids: list[list[int]], done_B: np.ndarray) -> None:
        self.new_ids = new_ids
        self._done_B = done_B

    def finish_row(self, row: int) -> None:
        """Ends a row from outside: a stop string was found in it."""
        self._done_B[row] = True


def _is_whole(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def _as_rows(prompts: Any) -> list[list[Any]]:
    """Rows of ids as lists, of whatever arrays or sequences they were."""
    rows = prompts if hasattr(prompts, "__iter__") else [prompts]
    return [_as_ids(f"Prompt {i}", row) for i, row in enumerate(rows)]


def _as_ids(name: str, ids: Any) -> list[Any]:
    ids = list(ids) if isinstance(ids, (set, frozenset)) else ids
    if isinstance(ids, str) or np.ndim(ids) != 1:
        raise ValueError(
            f"{name}: expected a list of token ids, received {ids!r:.100}. Prompts are a list of "
            "such lists, also where there is only one."
        )
    return np.asarray(ids).tolist()


def _power_of_two(number: int, smallest: int) -> int:
    return max(smallest, 1 << (number - 1).bit_length())


def _make_keys(seed: Any, num_rows: int) -> Any:
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    seeds = [int(seed) + i for i in range(num_rows)] if _is_whole(seed) else seed
    if np.ndim(seeds) != 1 or len(seeds) != num_rows or not all(map(_is_whole, seeds)):
        raise ValueError(
            f"Expected an integer seed, or one for each of {num_rows} rows, received {seed!r}."
        )
    return jax.vmap(jax.random.key)(np.array([int(s) % 2**32 for s in seeds], "uint32"))


def _as_array(number: Any) -> Any:
    return jnp.asarray(number, "int32" if isinstance(number, int) else "float32")


def _use_compilation_cache() -> None:
    """Keeps compiled programs across processes, unless the user has set a place already.

    JAX keeps what took a second or more to compile. The prefill of a small model takes about as
    long, and would be kept on one machine and made in each process on another.
    """
    if getattr(jax.config, _CACHE_FOLDER) is None:
        jax.config.update(_CACHE_FOLDER, str(cache_directory() / "xla"))
    if getattr(jax.config, _LEAST_SECONDS) == 1.0:
        jax.config.update(_LEAST_SECONDS, 0.1)
