"""Prompts: a text, messages or ids, as token ids. The one way in for all that generates."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np

from functional_llm.generation.arguments import as_ids
from functional_llm.tokenizers import TextTokenizer, is_record

Message: TypeAlias = Mapping[str, Any]
AnyPrompt: TypeAlias = str | Sequence[Message] | Sequence[int]


def split_prompts(prompts: Any) -> tuple[list[AnyPrompt], bool]:
    """Returns a list of prompts, and whether one was given instead of a list.

    Args:
        prompts: A text, messages (a list of dicts), ids; or a list of any of these.

    Raises:
        ValueError: If it is none of them.
    """
    is_single = isinstance(prompts, (str, bytes)) or is_record(prompts)
    if not is_single and not (hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")):
        raise ValueError(
            f"Expected a text or a list of texts, received {prompts!r:.100}. Messages (a list of "
            'dicts such as {"role": "user", "content": "Hello"}) and lists of ids are prompts too.'
        )
    if is_single or (len(prompts) and (is_record(prompts[0]) or _is_number(prompts[0]))):
        return [prompts], True
    return list(prompts), False


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
    # Elements of arrays have no dimensions, and are no words.
    return isinstance(value, (int, float, np.number)) or (
        hasattr(value, "dtype") and np.ndim(value) == 0  # type: ignore[arg-type]
    )
