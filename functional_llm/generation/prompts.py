"""Prompts: a text, messages or ids, as token ids. The one way in for all that generates."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np

from functional_llm.generation.arguments import as_ids, encoded_rows, is_encoding
from functional_llm.tokenizers import TextTokenizer, is_record

Message: TypeAlias = Mapping[str, Any]
AnyPrompt: TypeAlias = str | Sequence[Message] | Sequence[int]


def split_prompts(prompts: Any) -> tuple[list[AnyPrompt], bool]:
    """Returns a list of prompts, and whether one was given instead of a list.

    Args:
        prompts: A text, messages (a list of dicts), ids; or a list of any of these, or what a
            tokenizer of Transformers returns.

    Raises:
        ValueError: If it is none of them.
    """
    if isinstance(prompts, (np.ndarray, np.generic)) and prompts.ndim == 0:
        prompts = prompts.item()
    if is_encoding(prompts):
        return list(encoded_rows(prompts)), np.ndim(next(iter(prompts["input_ids"]), 0)) == 0
    if isinstance(prompts, str) or is_record(prompts):
        return [prompts], True
    is_list = hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")
    if isinstance(prompts, bytes) or not is_list:
        raise ValueError(
            f"Expected a text or a list of texts, received {prompts!r:.100}. Messages (a list of "
            'dicts such as {"role": "user", "content": "Hello"}) and lists of ids are prompts too.'
        )
    given = list(prompts)
    if given and not is_encoding(given[0]) and (is_record(given[0]) or _is_number(given[0])):
        return [prompts], True
    return [only_prompt(x) if is_encoding(x) else x for x in given], False


def only_prompt(prompts: Any) -> AnyPrompt:
    """Returns the prompt of what may be a prompt, or a list of one."""
    given, _ = split_prompts(prompts)
    if len(given) != 1:
        raise ValueError(
            f"Expected one prompt, received {len(given)}: {prompts!r:.100}. `generate` takes "
            "several at once."
        )
    return given[0]


def encode_prompt(
    tokenizer: TextTokenizer, prompt: AnyPrompt, parse_special: bool = True
) -> list[int]:
    """Returns the ids of a prompt. They begin with one BOS if the model expects it.

    Args:
        tokenizer: The model's tokenizer.
        prompt: A text; messages, which the chat template writes, up to where the answer begins; or
            ids, which stay as they are.
        parse_special: Whether the names of special tokens in a text are these tokens.

    Raises:
        ValueError: If the prompt is empty or of another kind, or the chat template does not accept
            the messages.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"Expected a prompt of at least one character, received {prompt!r}.")
        return tokenizer.encode(prompt, tokenizer.add_bos, parse_special)
    if is_record(prompt) or (hasattr(prompt, "__len__") and len(prompt) and is_record(prompt[0])):
        return tokenizer.apply_chat_template(prompt, tokenize=True)
    return as_ids("The prompt", cast("Sequence[int]", prompt))


def _is_number(value: object) -> bool:
    # Elements of arrays have no dimensions.
    return isinstance(value, (int, float, np.number)) or (
        hasattr(value, "dtype") and not isinstance(value, (str, bytes)) and np.ndim(value) == 0  # type: ignore[arg-type]
    )
