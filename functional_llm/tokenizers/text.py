"""TextTokenizer: what every model needs of its tokenizer, with any engine."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, overload

from functional_llm.tokenizers.calling import CalledAsTransformers
from functional_llm.tokenizers.chat_template import (
    ChatTemplate,
    RenderedChat,
    compile_chat_template,
)
from functional_llm.tokenizers.directory_reader import read_directory
from functional_llm.tokenizers.engines import Engine, Offsets
from functional_llm.tokenizers.gguf_vocabulary import read_gguf_vocabulary
from functional_llm.tokenizers.keras_hub_vocabulary import read_keras_hub_tokenizer
from functional_llm.tokenizers.stream import StreamDecoder
from functional_llm.tokenizers.tool_schemas import tool_schemas


@dataclass(frozen=True, kw_only=True, eq=False)
class TextTokenizer(CalledAsTransformers):
    """Text <-> ids.

    Args:
        engine: The engine that cuts text into tokens.
        bos_token_id: The id that begins a text, if there is one.
        eos_token_id: The id that ends a text, if there is one.
        pad_token_id: The id that pads a batch, if there is one.
        add_bos: Whether the model was trained on texts that begin with `bos_token_id`.
        stop_token_ids: The ids that end generation.
        chat_template: The Jinja template that writes messages as text, if there is one; or several
            by their names, such as `"default"` and `"tool_use"`.
        special_tokens: The texts of special tokens by their names in chat templates, such as
            `"unk_token"`.
    """

    engine: Engine
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    add_bos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    chat_template: str | Mapping[str, str] | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_directory(cls, path: str | Path) -> Self:
        """Loads the tokenizer of a directory in Hugging Face layout.

        Args:
            path: A directory with tokenizer.json or tokenizer.model (sentencepiece). Read if
                present: tokenizer_config.json, special_tokens_map.json, added_tokens.json,
                generation_config.json, config.json, chat_template.jinja,
                additional_chat_templates/*.jinja.

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

    @classmethod
    def from_keras_hub_preset(cls, path: str | Path) -> Self:
        """Loads the tokenizer of a KerasHub preset directory, without KerasHub or TensorFlow.

        Args:
            path: A directory with KerasHub's tokenizer.json and the folder assets.

        Returns:
            The tokenizer; it cuts text as the model's authors do.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If one is malformed, or the tokenizer is of an unknown kind.
        """
        return cls(**read_keras_hub_tokenizer(Path(path)))

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id."""
        return self.engine.vocabulary_size

    def token_id(self, token: str) -> int | None:
        """Returns the id of the token with this text, or None."""
        return self.engine.token_id(token)

    def token_text(self, token_id: int | None) -> str | None:
        """Returns the text of the token with this id; None for None."""
        return None if token_id is None else self.engine.token_bytes(token_id).decode()

    def encode(self, text: str, add_bos: bool = False, parse_special: bool = False) -> list[int]:
        """Encodes a text.

        Args:
            text: Any text.
            add_bos: Whether to put `bos_token_id` first, unless the text begins with it already.
            parse_special: Whether to encode the names of special tokens in the text ("<|im_end|>")
                as these tokens. By default they are plain text, so that users cannot insert them.

        Returns:
            A list of ids.

        Raises:
            ValueError: If `text` is not a valid string, or there is no BOS token to add.
        """
        _check_text(text)
        ids = self.engine.encode(text, parse_special)
        return self._bos_before(ids) + ids if add_bos else ids

    def encode_with_offsets(
        self, text: str, add_bos: bool = False, parse_special: bool = False
    ) -> tuple[list[int], Offsets]:
        """Encodes a text, and says where in it each token stands.

        Args:
            text: As for `encode`.
            add_bos: As for `encode`.
            parse_special: As for `encode`.

        Returns:
            A list of ids, and start and end of each in the text, in characters. Several tokens may
            share a character. A BOS that is not in the text stands at (0, 0).

        Raises:
            ValueError: As `encode`.
        """
        _check_text(text)
        ids, offsets = self.engine.encode_with_offsets(text, parse_special)
        bos = self._bos_before(ids) if add_bos else []
        return bos + ids, [(0, 0) for _ in bos] + offsets

    def _bos_before(self, ids: list[int]) -> list[int]:
        if self.bos_token_id is None:
            raise ValueError(
                "There is no BOS token to add. Expected: a tokenizer with a `bos_token_id`. "
                "Received: `add_bos=True`. Pass `add_bos=tokenizer.add_bos` for the model's own "
                "convention."
            )
        return [] if ids[:1] == [self.bos_token_id] else [self.bos_token_id]

    def decode(
        self, ids: Iterable[int], skip_special_tokens: bool = True, continues: bool = False
    ) -> str:
        """Decodes ids. Bytes that are no valid UTF-8 become U+FFFD.

        Args:
            ids: Token ids. Those above the vocabulary, which a model with more rows than tokens may
                give, have no text.
            skip_special_tokens: Whether to leave out BOS, EOS and the like.
            continues: Whether the ids continue an earlier text. If not, the space that
                sentencepiece puts before a text is taken off.

        Returns:
            The text.

        Raises:
            ValueError: If an id is negative.
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

    def as_tf(self, add_bos: bool = False, parse_special: bool = False) -> Any:
        """Returns this tokenizer as TensorFlow operations, for `tf.data` and SavedModels.

        ```python
        in_graph = tokenizer.as_tf()
        dataset = tf.data.TextLineDataset("text.txt").map(in_graph.tokenize)
        ```

        Args:
            add_bos: As for `encode`.
            parse_special: As for `encode`.

        Returns:
            A `tf.Module`. Its `tokenize` takes a string or a vector of strings, and returns the ids
            of `encode`: int32, for a vector a ragged tensor. Its `detokenize` takes rows of ids,
            and returns the strings of `decode`. In a SavedModel of it is `tokenize_batch`.

        Raises:
            ImportError: If TensorFlow or tensorflow-text is not installed.
            ValueError: If operations of TensorFlow cannot give the same ids, with the reason; or
                there is no BOS token to add.
        """
        try:
            import tensorflow  # noqa: F401
            import tensorflow_text  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "A tokenizer in a TensorFlow graph needs TensorFlow and tensorflow-text. Received: "
                f"{error}. Install them with `pip install tensorflow-text`."
            ) from error
        from functional_llm.tokenizers.in_graph.tokenizer import InGraphTokenizer

        bos = self.bos_token_id if add_bos else None
        if add_bos:
            self._bos_before([])
        return InGraphTokenizer(self.engine, bos, parse_special)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Any],
        add_generation_prompt: bool | None = None,
        tokenize: Literal[False] = False,
        **variables: Any,
    ) -> str: ...
    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Any],
        add_generation_prompt: bool | None = None,
        *,
        tokenize: Literal[True],
        **variables: Any,
    ) -> list[int]: ...
    def apply_chat_template(
        self,
        messages: Sequence[Any],
        add_generation_prompt: bool | None = None,
        tokenize: bool = False,
        **variables: Any,
    ) -> str | list[int]:
        """Writes a conversation in the format of the model's training.

        Args:
            messages: Dicts with "role" and "content", the oldest first.
            add_generation_prompt: Whether to end with the text that begins the assistant's answer.
                By default it does, unless the final message is continued.
            tokenize: Whether to return ids. They begin with one BOS if the model expects it, even
                if the template writes none.
            variables: As for `render_chat`: `continue_final_message`, `chat_template`, `tools`,
                `documents`, and other variables of the template.

        Returns:
            The text, or its ids.

        Raises:
            ValueError: As `render_chat`.
        """
        text = self.render_chat(messages, add_generation_prompt, **variables).text
        return self.encode(text, self.add_bos, parse_special=True) if tokenize else text

    def render_chat(
        self,
        messages: Sequence[Any],
        add_generation_prompt: bool | None = None,
        *,
        continue_final_message: bool | str = False,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> RenderedChat:
        """Writes a conversation, and says which places are marked as the assistant's.

        Args:
            messages: As for `apply_chat_template`.
            add_generation_prompt: As for `apply_chat_template`.
            continue_final_message: Whether to end with the text of the final message, so that the
                model goes on with it; or the name of the field that holds this text.
            chat_template: The name of one of the tokenizer's templates, or a template, in Jinja. By
                default the template `"tool_use"` if there are tools and it is there, else the
                default.
            tools: Functions that the model may call, or their JSON schemas. Templates that do not
                know tools ignore them.
            documents: Dicts with "title" and "text" that the model may use. Templates that do not
                know them ignore them.
            variables: Other variables of the template, such as `enable_thinking`.

        Returns:
            The text, and the marked places.

        Raises:
            ValueError: If there is no template, it is malformed, it does not accept the messages,
                or it does not know a variable.
        """
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "Expected either `continue_final_message` or `add_generation_prompt`: an answer is "
                "continued or begun. Received: both."
            )
        if documents is not None and not all(isinstance(x, Mapping) for x in documents):
            raise ValueError(
                f"Expected `documents` as a list of dicts, received {documents!r:.100}."
            )
        template = self._find_chat_template(chat_template, tools is not None)
        if unknown := variables.keys() - template.variables:
            raise ValueError(
                f"The chat template does not know {', '.join(map(repr, sorted(unknown)))}. "
                f"Expected: one of its variables, {', '.join(sorted(template.variables))}; or "
                "`add_generation_prompt`, `continue_final_message`, `chat_template`, `tools`, "
                "`documents`, `tokenize`. Leave it out, or correct its name."
            )
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        values = {
            "bos_token": self.token_text(self.bos_token_id) or "",
            "eos_token": self.token_text(self.eos_token_id) or "",
            **self.special_tokens,
            "add_generation_prompt": add_generation_prompt,
            "tools": None if tools is None else tool_schemas(tools),
            "documents": documents,
            **variables,
        }
        return template.render_marked(messages, continue_final_message, **values)

    def _find_chat_template(self, given: str | None, has_tools: bool) -> ChatTemplate:
        own = self.chat_template
        named = own if isinstance(own, Mapping) else {} if own is None else {"default": own}
        if given is None:
            given = named.get("tool_use") if has_tools else None
            given = named.get("default") if given is None else given
            expected = "one named default, or `chat_template=` with the name of another"
        else:
            # A template without any of Jinja is a name that was mistyped.
            given = named.get(given, given if "{" in str(given) else None)
            expected = "the name of a template, or a template in Jinja"
        if given is not None:
            return compile_chat_template(given)
        if named:
            raise ValueError(
                f"There is no such chat template. Expected: {expected}. Received: a tokenizer with "
                f"the templates {sorted(named)}. Name one of them."
            )
        raise ValueError(
            "This tokenizer has no chat template. Expected: chat_template.jinja, "
            '"chat_template" in tokenizer_config.json, or "tokenizer.chat_template" in a GGUF '
            "file. Received: none of them. Use an instruction-tuned checkpoint, or write the "
            "prompt as plain text."
        )

    def _token_bytes(self, skipped: frozenset[int], token_id: int) -> bytes:
        if token_id < 0:
            raise ValueError(
                f"A token id is out of range. Expected: 0 to {self.vocabulary_size - 1}. "
                f"Received: {token_id}. Is this the tokenizer of the model that made the ids?"
            )
        if token_id in skipped or token_id >= self.vocabulary_size:
            return b""
        return self.engine.token_bytes(token_id)


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
