"""TextTokenizer: what every model needs of its tokenizer, with any engine."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Self, overload

from functional_llm.tokenizers.chat_template import ChatTemplate
from functional_llm.tokenizers.directory_reader import read_directory
from functional_llm.tokenizers.engines import Engine
from functional_llm.tokenizers.gguf_vocabulary import read_gguf_vocabulary
from functional_llm.tokenizers.stream import StreamDecoder


@dataclass(frozen=True, kw_only=True, eq=False)
class TextTokenizer:
    """Text <-> ids.

    Args:
        engine: The engine that cuts text into tokens.
        bos_token_id: The id that begins a text, if there is one.
        eos_token_id: The id that ends a text, if there is one.
        pad_token_id: The id that pads a batch, if there is one.
        add_bos: Whether the model was trained on texts that begin with `bos_token_id`.
        stop_token_ids: The ids that end generation.
        chat_template: The Jinja template that writes messages as text, if there is one.
    """

    engine: Engine
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    add_bos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    chat_template: str | None = None

    @classmethod
    def from_directory(cls, path: str | Path) -> Self:
        """Loads the tokenizer of a directory in Hugging Face layout.

        Args:
            path: A directory with tokenizer.json or tokenizer.model (sentencepiece). Read if
                present: tokenizer_config.json, special_tokens_map.json, added_tokens.json,
                generation_config.json, config.json, chat_template.jinja.

        Returns:
            The tokenizer.

        Raises:
            ValueError: If there is no tokenizer, or one of the files is malformed.
        """
        return cls(**read_directory(Path(path)))

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any]) -> Self:
        """Loads the tokenizer of a GGUF file.

        Args:
            metadata: The key-value pairs of the file's header, as plain Python values.

        Returns:
            The tokenizer; it cuts text as llama.cpp does.

        Raises:
            ValueError: If a key is missing, or the tokenizer or its pre-tokenizer is unknown.
        """
        return cls(**read_gguf_vocabulary(metadata))

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id."""
        return self.engine.vocabulary_size

    def token_id(self, token: str) -> int | None:
        """Returns the id of the token with this text, or None."""
        return self.engine.token_id(token)

    def encode(self, text: str, add_bos: bool = False, parse_special: bool = False) -> list[int]:
        """Encodes a text.

        Args:
            text: Any text.
            add_bos: Whether to put `bos_token_id` first.
            parse_special: Whether to encode the names of special tokens in the text ("<|im_end|>")
                as these tokens. By default they are plain text, so that users cannot insert them.

        Returns:
            A list of ids.

        Raises:
            ValueError: If `text` is not a valid string, or there is no BOS token to add.
        """
        _check_text(text)
        if not add_bos:
            return self.engine.encode(text, parse_special)
        if self.bos_token_id is None:
            raise ValueError(
                "There is no BOS token to add. Expected: a tokenizer with a `bos_token_id`. "
                "Received: `add_bos=True`. Pass `add_bos=tokenizer.add_bos` for the model's own "
                "convention."
            )
        return [self.bos_token_id, *self.engine.encode(text, parse_special)]

    def decode(
        self, ids: Iterable[int], skip_special_tokens: bool = True, continues: bool = False
    ) -> str:
        """Decodes ids. Bytes that are no valid UTF-8 become U+FFFD.

        Args:
            ids: Token ids.
            skip_special_tokens: Whether to leave out BOS, EOS and the like.
            continues: Whether the ids continue an earlier text. If not, the space that
                sentencepiece puts before a text is taken off.

        Returns:
            The text.

        Raises:
            ValueError: If an id is not in the vocabulary.
        """
        stream = self.stream_decoder(skip_special_tokens, continues)
        return stream.push(ids) + stream.finish()

    def stream_decoder(
        self, skip_special_tokens: bool = True, continues: bool = False
    ) -> StreamDecoder:
        """Returns a decoder for ids that come one after the other.

        Args:
            skip_special_tokens: As in `decode`.
            continues: As in `decode`.

        Returns:
            A decoder. Its pieces, joined, are the text that `decode` returns for all ids.
        """
        skipped = self.engine.special_ids if skip_special_tokens else frozenset()
        return StreamDecoder(
            partial(self._token_bytes, skipped), self.engine.adds_space and not continues
        )

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tokenize: Literal[False] = False,
        **variables: Any,
    ) -> str: ...
    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tokenize: Literal[True],
        **variables: Any,
    ) -> list[int]: ...
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tokenize: bool = False,
        **variables: Any,
    ) -> str | list[int]:
        """Writes a conversation in the format of the model's training.

        Args:
            messages: Dicts with "role" and "content", the oldest first.
            add_generation_prompt: Whether to end with the text that begins the assistant's answer.
            tokenize: Whether to return ids. They begin with one BOS if the model expects it, even
                if the template writes none.
            variables: Other variables of the template, such as `tools`.

        Returns:
            The text, or its ids.

        Raises:
            ValueError: If there is no template, it is malformed, or it does not accept the
                messages.
        """
        text = self._compiled_chat_template.render(
            messages,
            **{
                "add_generation_prompt": add_generation_prompt,
                "bos_token": self._token_text(self.bos_token_id),
                "eos_token": self._token_text(self.eos_token_id),
                **variables,
            },
        )
        if not tokenize:
            return text
        ids = self.encode(text, parse_special=True)
        return self.encode("", add_bos=self.add_bos and ids[:1] != [self.bos_token_id]) + ids

    @cached_property
    def _compiled_chat_template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise ValueError(
                "This tokenizer has no chat template. Expected: chat_template.jinja, "
                '"chat_template" in tokenizer_config.json, or "tokenizer.chat_template" in a GGUF '
                "file. Received: none of them. Use an instruction-tuned checkpoint, or write the "
                "prompt as plain text."
            )
        return ChatTemplate(self.chat_template)

    def _token_text(self, token_id: int | None) -> str:
        return "" if token_id is None else self.engine.token_bytes(token_id).decode()

    def _token_bytes(self, skipped: frozenset[int], token_id: int) -> bytes:
        if not 0 <= token_id < self.vocabulary_size:
            raise ValueError(
                f"A token id is out of range. Expected: 0 to {self.vocabulary_size - 1}. "
                f"Received: {token_id}. Is this the tokenizer of the model that made the ids?"
            )
        return b"" if token_id in skipped else self.engine.token_bytes(token_id)


def _check_text(text: object) -> None:
    problem = ""
    if not isinstance(text, str):
        problem = f"{type(text).__name__}: {text!r:.100}"
    elif not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = f"a string with half a surrogate pair at position {error.start}"
    if problem:
        raise ValueError(
            "`text` cannot be encoded. Expected: a string of Unicode characters. Received: "
            f"{problem}. Decode bytes first; encode a list one text at a time."
        )
