"""Generation: prompts in, text or ids out, by the compiled programs.

Shapes: B rows, T tokens of a padded prompt, C new tokens of one run, V vocabulary.
"""

import math
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias, Unpack, overload

import jax
import keras
import numpy as np

from functional_llm.generation import samplers
from functional_llm.generation.arguments import (
    as_ids,
    check_ids,
    check_request,
    make_keys,
    padded_stop_ids,
    without_padding,
)
from functional_llm.generation.compilation_cache import use_compilation_cache
from functional_llm.generation.programs import TOKENS_PER_RUN, Announce, CompiledPrograms
from functional_llm.generation.prompt_cache import PromptCache
from functional_llm.generation.prompts import (
    AnyPrompt,
    Message,
    encode_prompt,
    only_prompt,
    split_prompts,
)
from functional_llm.generation.results import NewTokens, Stats
from functional_llm.generation.run import Request, Run
from functional_llm.generation.samplers import SamplerNumbers
from functional_llm.generation.stop_strings import StoppingDecoder
from functional_llm.graph.backend import require_jax
from functional_llm.tokenizers import TextTokenizer

_TOKENS_UNSEEN = 32  # that are written before a stop string among them is noticed
_SECONDS_PER_PIECE = 0.1  # of a stream; a piece has at least one token

SamplerOrName: TypeAlias = samplers.Sampler | str
Seeds: TypeAlias = int | Sequence[int] | None


class TextGenerator:
    """Writes text with a language model; holds the compiled programs.

    ```python
    generator = TextGenerator(backbone, tokenizer)
    generator.generate("The capital of France is", max_new_tokens=32)
    generator.generate([{"role": "user", "content": "What is the capital of France?"}])
    ```

    A prefill is compiled for a number of rows, a padded prompt length and a cache size, a decode
    loop for a number of rows and a cache size, both for the kind of sampler; lengths and sizes are
    powers of two. The sampler's numbers, the seed, the stop ids and the number of tokens are
    arguments: other values compile nothing. New values of the backbone's weights are used at the
    next call.

    A cache begins with slots for the prompts and 256 new tokens (fewer if fewer are asked for), and
    at least 256. It is doubled when it is full. The first doubling to a size compiles two programs,
    one that copies the cache and the decode loop of the new size. So up to 256 new tokens compile
    no more than a prefill and a decode loop (and a copy, if they outgrow the cache of an earlier
    turn), and those before the first token. If all layers see a window, a cache stops growing at
    the largest window.

    A model may read a whole text in another way once it is long (LongRoPE: Phi 3). A text that
    becomes long while it is written is read again at that token, as Transformers does.

    Args:
        backbone: A Backbone, or any functional model with its inputs and outputs.
        tokenizer: A tokenizer, or `None` to work with ids only.
        announce: Called with a few words before programs are compiled, which may take half a
            minute; the context that it returns is left when they are. By default nothing is said.

    Raises:
        RuntimeError: With another backend than JAX; when it generates, if the model's logits are
            not finite: numbers of float16 end at 65504.
    """

    def __init__(
        self,
        backbone: keras.Model,
        tokenizer: TextTokenizer | None = None,
        announce: Announce = nullcontext,
    ) -> None:
        require_jax("flm.TextGenerator")
        self.backbone = backbone
        self.tokenizer = tokenizer
        self._programs = CompiledPrograms(backbone, announce)
        use_compilation_cache()

    def __reduce__(self) -> tuple[Any, ...]:
        # Compiled programs cannot be copied.
        return type(self), (self.backbone, self.tokenizer, self._programs.announce)

    @property
    def stats(self) -> Stats:
        """Where the time of the last generation went."""
        return self._programs.stats

    @property
    def num_compilations(self) -> int:
        """How many programs have been compiled so far."""
        return len(self._programs.compiled)

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt and its text together; `None` if the model has no limit."""
        config = getattr(self.backbone, "config", None)
        return getattr(config, "max_sequence_length", None)

    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        prompts: str | Sequence[Message] | Sequence[int],
        max_new_tokens: int = ...,
        sampler: SamplerOrName | None = ...,
        stop: str | Sequence[str] = ...,
        seed: Seeds = ...,
        parse_special: bool = ...,
        **numbers: Unpack[SamplerNumbers],
    ) -> str: ...

    @overload
    def generate(
        self,
        prompts: Sequence[AnyPrompt],
        max_new_tokens: int = ...,
        sampler: SamplerOrName | None = ...,
        stop: str | Sequence[str] = ...,
        seed: Seeds = ...,
        parse_special: bool = ...,
        **numbers: Unpack[SamplerNumbers],
    ) -> list[str]: ...

    def generate(
        self,
        prompts: Any,
        max_new_tokens: int = 64,
        sampler: SamplerOrName | None = None,
        stop: str | Sequence[str] = (),
        seed: Seeds = None,
        parse_special: bool = True,
        **numbers: Unpack[SamplerNumbers],
    ) -> str | list[str]:
        """Returns the new text of each prompt, up to a stop string or the model's own end.

        Args:
            prompts: A prompt, or a list of them. A prompt is a text, which the model goes on with;
                messages (a list of dicts with "role" and "content"), which it answers by its chat
                template; or ids, also as a tokenizer of Transformers returns them. A BOS that the
                model expects is put first, once.
            max_new_tokens: Most tokens to write, at least 1.
            sampler: A sampler, or its name (`samplers.get`). Greedy unless told.
            stop: Texts that end a row; they are left out of the result. Special tokens are not
                part of the result either, but their names can be part of these texts.
            seed: Of the random numbers; row i draws with `seed + i`, or give one a row. `None`
                for other numbers at every call. A row's text depends on no other row.
            parse_special: Whether the names of special tokens in a text ("<|im_end|>") are these
                tokens. `False` for a text from strangers.
            **numbers: Of the sampler, unless it is an object: `temperature`, `top_k`, `top_p`,
                `min_p`, `repetition_penalty`. Without a name they make it random.

        Returns:
            A string for one prompt, else a list of strings.

        Raises:
            ValueError: If a prompt is empty or longer than the context, a number is out of range,
                or sampler and numbers do not go together.
        """
        sampler = samplers.choose(sampler, numbers)
        given, is_single = split_prompts(prompts)
        tokenizer = self._need_tokenizer()
        decoders = [StoppingDecoder(tokenizer, stop, isinstance(x, str)) for x in given]
        rows = [encode_prompt(tokenizer, prompt, parse_special) for prompt in given]
        pieces = [""] * len(given)
        ends, most = tokenizer.stop_token_ids, _TOKENS_UNSEEN if stop else TOKENS_PER_RUN
        for new in self._run(rows, max_new_tokens, sampler, ends, seed, most=most):
            for i, ids in enumerate(new.ids):
                pieces[i] += decoders[i].push(ids)
                if decoders[i].stopped:
                    new.finish_row(i)
        pairs = zip(pieces, decoders, strict=True)
        pieces = [piece + decoder.finish() for piece, decoder in pairs]
        return pieces[0] if is_single else pieces

    def stream(
        self,
        prompt: AnyPrompt,
        max_new_tokens: int = 64,
        sampler: SamplerOrName | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        past: PromptCache | None = None,
        parse_special: bool = True,
        **numbers: Unpack[SamplerNumbers],
    ) -> Generator[str]:
        """Yields the new text of one prompt, as it is written: never half a character.

        A piece is a token, or as many as take a tenth of a second.

        Args:
            prompt: A text, messages or ids, as for `generate`.
            max_new_tokens: As for `generate`.
            sampler: As for `generate`.
            stop: As for `generate`.
            seed: As for `generate`.
            past: The cache of earlier calls, reused as far as the tokens agree, and updated.
            parse_special: As for `generate`.
            **numbers: As for `generate`.
        """
        sampler = samplers.choose(sampler, numbers)
        tokenizer = self._need_tokenizer()
        prompt = only_prompt(prompt)
        ids = encode_prompt(tokenizer, prompt, parse_special)
        decoder = StoppingDecoder(tokenizer, stop, isinstance(prompt, str))
        run = self._run(
            [ids],
            max_new_tokens,
            sampler,
            tokenizer.stop_token_ids,
            seed,
            past,
            _SECONDS_PER_PIECE,
            most=_TOKENS_UNSEEN,
        )
        for new in run:
            piece = decoder.push(new.ids[0])
            if piece:
                yield piece
            if decoder.stopped:
                new.finish_row(0)
        piece = decoder.finish()
        if piece:
            yield piece

    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]] | np.ndarray,
        max_new_tokens: int = 64,
        sampler: SamplerOrName | None = None,
        stop_token_ids: Collection[int] = (),
        seed: Seeds = None,
        attention_mask: Any = None,
        mask: Any = None,
        **numbers: Unpack[SamplerNumbers],
    ) -> list[list[int]]:
        """Returns the new ids of each row of ids, its stop id included.

        Args:
            prompts: Rows of token ids, of any lengths.
            max_new_tokens: How many to write; fewer only after a stop id.
            sampler: As for `generate`.
            stop_token_ids: Ids that end a row.
            seed: As for `generate`.
            attention_mask: (B, T), 0 for padding, if the prompts are an array (B, T) with padding.
            mask: (B, T, T) boolean, T of the longest prompt: False where a token of a prompt must
                not see another. A new token sees what the last token of its prompt sees, and the
                new ones before it.
            **numbers: As for `generate`.
        """
        sampler = samplers.choose(sampler, numbers)
        rows, masks = without_padding(prompts, attention_mask, mask)
        check_ids("stop_token_ids", as_ids("stop_token_ids", stop_token_ids), self._vocabulary_size)
        results: list[list[int]] = [[] for _ in rows]
        for new in self._run(rows, max_new_tokens, sampler, stop_token_ids, seed, masks=masks):
            for result, ids in zip(results, new.ids, strict=True):
                result.extend(ids)
        return results

    @property
    def _vocabulary_size(self) -> int:
        return self.backbone.output["logits"].shape[-1]

    def _need_tokenizer(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise ValueError("This TextGenerator has no tokenizer: use generate_ids, or give one.")
        return self.tokenizer

    def _run(
        self,
        rows: list[list[int]],
        max_new_tokens: int,
        sampler: SamplerOrName,
        stop_token_ids: Collection[int],
        seed: Seeds,
        prompt_cache: PromptCache | None = None,
        seconds: float = math.inf,
        masks: list[np.ndarray] | None = None,
        most: int = TOKENS_PER_RUN,
    ) -> Iterator[NewTokens]:
        """Prefills, then decodes until every row has ended; yields what is new.

        After the prefill, a yield has as many tokens as take `seconds`, judged by the one before,
        and `most` at most.
        """
        check_request(rows, max_new_tokens, self._vocabulary_size, self.context)
        self._programs.stats = Stats()
        request = Request(
            rows=rows,
            max_new_tokens=int(max_new_tokens),
            sampler=jax.tree.map(_as_array, samplers.get(sampler)),
            stop_ids=padded_stop_ids(sorted(stop_token_ids)),
            keys=make_keys(seed, len(rows)),
            masks=masks,
            seconds=seconds,
            most=most,
        )
        return Run(self._programs, request, prompt_cache).new_tokens()


def _as_array(number: float) -> np.ndarray:
    return np.asarray(number, "int32" if isinstance(number, int) else "float32")
