"""A conversation with a language model."""

import json
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Unpack

from functional_llm.files.replacing import replaced_file
from functional_llm.generation import samplers
from functional_llm.generation.prompt_cache import PromptCache
from functional_llm.generation.samplers import SamplerNumbers
from functional_llm.generation.text_generator import SamplerOrName, TextGenerator


class Chat:
    """Holds the messages of a conversation, and the cache that its next turn reuses.

    ```python
    chat = Chat(generator, system="Answer in one sentence.")
    for piece in chat.say("Why is the sky blue?"):
        print(piece, end="")
    ```

    When the context is full, the oldest turns are left out of what the model reads, until the rest
    fills half of it. A system message stays. `messages` keeps them all.

    Args:
        generator: A generator with a tokenizer that has a chat template.
        system: What the model is told before the conversation.
        max_new_tokens: Most tokens of an answer; fewer where the context ends before.
        sampler: As for `TextGenerator.generate`.
        stop: As for `TextGenerator.generate`.
        seed: As for `TextGenerator.generate`.
        **numbers: As for `TextGenerator.generate`.

    Attributes:
        messages: Dicts with "role" and "content", the oldest first.
        num_left_out: How many of the oldest, after a system message, the model does not read any
            more.

    Raises:
        ValueError: If the generator has no tokenizer, or sampler and numbers do not go together.
    """

    def __init__(
        self,
        generator: TextGenerator,
        system: str | None = None,
        *,
        max_new_tokens: int = 256,
        sampler: SamplerOrName | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        **numbers: Unpack[SamplerNumbers],
    ) -> None:
        if generator.tokenizer is None:
            raise ValueError("Expected a generator with a tokenizer, received one without.")
        self.generator = generator
        self.sampler = samplers.choose(sampler, numbers)
        self.max_new_tokens, self.stop, self.seed = max_new_tokens, stop, seed
        self._tokenizer = generator.tokenizer
        self._system = [{"role": "system", "content": system}] if system else []
        self.clear()

    def clear(self) -> None:
        """Forgets the conversation; a system message stays."""
        self.messages = list(self._system)
        self.num_left_out = 0
        self._cache = PromptCache()

    def say(self, text: str) -> Generator[str]:
        """Says something; returns the answer as a stream.

        An answer that is not read to its end counts as far as it was read; if nothing of it was
        read, nothing was said.

        Args:
            text: What the user says.

        Returns:
            The pieces of the answer, as of `TextGenerator.stream`.

        Raises:
            ValueError: If the message alone fills the context, or the template does not accept the
                conversation. Nothing was said then.
        """
        message = {"role": "user", "content": text}
        num_left_out, ids = self._fit([*self.messages, message])
        self.num_left_out = num_left_out
        return self._answer(message, ids)

    def save(self, path: str | Path) -> None:
        """Writes the conversation as a dataset of one example, which `read_records` reads.

        Args:
            path: A `.json` file; replaced when the new one is complete.

        Raises:
            OSError: If it cannot be written.
        """
        with replaced_file(Path(path)) as part:
            text = json.dumps([{"messages": self.messages}], indent=2, ensure_ascii=False)
            part.write_text(text + "\n", encoding="utf-8")

    def _answer(self, message: dict[str, str], ids: list[int]) -> Generator[str]:
        answer, is_whole = "", False
        pieces = self.generator.stream(
            ids,
            max_new_tokens=min(self.max_new_tokens, self._context - len(ids)),
            sampler=self.sampler,
            stop=self.stop,
            seed=self.seed,
            past=self._cache,
        )
        try:
            for piece in pieces:
                answer += piece
                yield piece
            is_whole = True
        finally:
            pieces.close()
            if answer or is_whole:
                self.messages += [message, {"role": "assistant", "content": answer}]

    def _fit(self, messages: list[dict[str, str]]) -> tuple[int, list[int]]:
        """Returns how many of the oldest messages to leave out, and the ids of the others."""
        head = [m for m in messages[:1] if m["role"] == "system"]
        body, first = messages[len(head) :], self.num_left_out
        turns = [i for i, m in enumerate(body) if m["role"] == "user" and i > first]
        most = self._context - min(self.max_new_tokens, self._context // 2)
        for start in [first, *turns]:
            ids = self._tokenizer.apply_chat_template([*head, *body[start:]], tokenize=True)
            if len(ids) <= most:
                return start, ids
            # Half of it shall be free then: to leave out a turn is to read all others anew.
            most = min(most, self._context // 2)
        if len(ids) < self._context:
            return start, ids
        raise ValueError(
            f"The message, with what the template adds, has {len(ids)} tokens; the model's context "
            f"holds {self._context}, the answer included. Say less at once."
        )

    @property
    def _context(self) -> int:
        return self.generator.context or sys.maxsize
