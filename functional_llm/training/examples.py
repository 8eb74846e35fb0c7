"""Records -> examples: token ids, and which of them are targets."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from functional_llm.tokenizers import TextTokenizer
from functional_llm.training.records import Record


@dataclass(frozen=True)
class Example:
    """A tokenised example.

    Args:
        token_ids: (n,) int32.
        is_target: (n,) bool: the model learns to predict this token. Never the first one, which
            follows nothing.
    """

    token_ids: np.ndarray
    is_target: np.ndarray


@dataclass(frozen=True)
class Examples:
    """Tokenised examples, and how many were truncated or dropped.

    Args:
        items: The examples.
        num_truncated: Number of examples that were longer than the context and lost their end.
        num_dropped: Number of examples without a target, which are not in `items`: most often
            because truncation cut off the whole answer.
    """

    items: list[Example]
    num_truncated: int
    num_dropped: int

    def describe(self, length: int) -> str:
        """Returns a sentence about truncated and dropped examples; `""` if there are none."""
        parts = []
        if self.num_truncated:
            parts.append(f"{self.num_truncated} were cut off after {length} tokens")
        if self.num_dropped:
            parts.append(f"{self.num_dropped} left out, with no token of an answer")
        total = len(self.items) + self.num_dropped
        return f"Of {total} examples, {' and '.join(parts)}." if parts else ""


def split_examples(
    examples: Sequence[Example], fraction: float, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Splits examples at random into those to train on and those to hold out.

    Args:
        examples: All examples.
        fraction: Share to hold out, at least one example; 0 holds out none.
        seed: Seed of the choice.

    Returns:
        The examples to train on, and those to evaluate on.

    Raises:
        ValueError: If no example would be left to train on.
    """
    if fraction == 0:
        return list(examples), []
    count = max(1, round(fraction * len(examples)))
    if not 0 < fraction < 1 or count >= len(examples):
        raise ValueError(
            f"Expected to hold out a share between 0 and 1 that leaves something to train on, "
            f"received {fraction} of {len(examples)} examples. Hold out 0 to evaluate on nothing."
        )
    order = np.random.default_rng(seed).permutation(len(examples))
    held = set(order[:count].tolist())
    kept = [example for i, example in enumerate(examples) if i not in held]
    return kept, [examples[i] for i in sorted(held)]


def check_length(length: int, limit: int | None) -> int:
    """Returns `length` if a model can use it.

    Args:
        length: Tokens of a row.
        limit: The model's longest context, if it is known.

    Raises:
        ValueError: If `length` is below 1 or above `limit`.
    """
    if length < 1 or (limit is not None and length > limit):
        raise ValueError(
            f"Expected a length from 1 to {limit or 'what fits'} tokens, the model's context, "
            f"received {length}."
        )
    return length


def make_examples(records: Iterable[Record], tokenizer: TextTokenizer, length: int) -> Examples:
    """Tokenises records.

    A record has one of these sets of columns:

    - `messages`: a list of `{"role", "content"}`; the assistant's messages are targets.
    - `prompt` and `completion`; or `instruction`, optionally `input` and `system`, and `output`:
      a user's message and the answer, which is the target.
    - `text`: plain text, all of it a target, followed by the tokenizer's end-of-text token.

    All but the last go through the tokenizer's chat template. A `.txt` file is one running text,
    cut into examples of `length` tokens; any other example is truncated to `length`.

    Args:
        records: From `read_records`.
        tokenizer: The model's tokenizer.
        length: Largest number of tokens that the model reads of an example. The last token of an
            example is only predicted, so an example has up to `length + 1`.

    Returns:
        Examples with at least one item.

    Raises:
        ValueError: If the length is below 1, a record lacks columns, a value has another type, the
            chat template does not accept a conversation, or no example is left.
    """
    check_length(length, None)
    items, truncated, dropped = [], 0, 0
    for record in records:
        for example in _tokenise(record, tokenizer, length):
            truncated += len(example.token_ids) > length + 1
            cut = Example(example.token_ids[: length + 1], example.is_target[: length + 1])
            if cut.is_target.any():
                items.append(cut)
            else:
                dropped += 1
    if not items:
        raise ValueError(
            f"None of {dropped} examples has a token to learn within {length} tokens. Expected "
            "answers that are not empty; a longer context keeps more of each example."
        )
    return Examples(items, truncated, dropped)


def _tokenise(record: Record, tokenizer: TextTokenizer, length: int) -> Iterator[Example]:
    fields = record.fields
    if "running_text" in fields:
        ids = _encode_text(fields["running_text"], tokenizer)
        for start in range(0, max(len(ids) - 1, 1), length):  # the last id of one begins the next
            yield _all_targets(ids[start : start + length + 1])
    elif "text" in fields and not any(set(needed) <= fields.keys() for needed in _CHATS):
        yield _all_targets(_encode_text(_string(record, "text"), tokenizer))
    else:
        yield _chat_example(_messages(record), tokenizer, record.where)


def _encode_text(text: str, tokenizer: TextTokenizer) -> list[int]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tokenizer.encode(text, add_bos=tokenizer.add_bos) + end


def _all_targets(ids: list[int]) -> Example:
    return Example(np.asarray(ids, "int32"), np.arange(len(ids)) > 0)


_CHATS = (("messages",), ("prompt", "completion"), ("instruction", "output"))


def _messages(record: Record) -> list[dict[str, Any]]:
    """Returns a record as a conversation with an answer of the assistant."""
    fields = record.fields
    if "messages" in fields:
        messages = fields["messages"]
        roles = [m.get("role") for m in messages] if _is_list_of_dicts(messages) else []
        if "assistant" not in roles:
            raise ValueError(
                f"{record.where}: expected `messages` to be a list of objects with `role` and "
                f"`content`, one of the role `assistant`. Received: {messages!r:.200}"
            )
        return messages
    if {"prompt", "completion"} <= fields.keys():
        question, answer = _string(record, "prompt"), _string(record, "completion")
    elif {"instruction", "output"} <= fields.keys():
        question, answer = _string(record, "instruction"), _string(record, "output")
        if fields.get("input"):
            question = f"{question}\n{_string(record, 'input')}"
    else:
        raise ValueError(
            f"{record.where} lacks columns. Expected: `messages`; or `prompt` and `completion`; or "
            "`instruction` and `output` (`input` and `system` if there are any); or `text`. "
            f"Received: {sorted(fields)}. Rename the columns."
        )
    system = [{"role": "system", "content": fields["system"]}] if fields.get("system") else []
    return [
        *system,
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def _is_list_of_dicts(messages: object) -> bool:
    return isinstance(messages, list) and all(isinstance(m, dict) for m in messages)


def _string(record: Record, column: str) -> str:
    value = record.fields[column]
    if not isinstance(value, str):
        raise ValueError(
            f"{record.where}: expected a string in column `{column}`, received "
            f"{type(value).__name__}: {value!r:.80}"
        )
    return value


def _chat_example(
    messages: Sequence[dict[str, Any]], tokenizer: TextTokenizer, where: str
) -> Example:
    """Tokenises a conversation; targets are the assistant's messages and their end tokens."""
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=True)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [_answer_span(messages, i, ids, tokenizer) for i in turns]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{where}: {error}") from error
    if spans[-1] is None:
        raise ValueError(
            f"{where}: the chat template does not show where the answer begins. Expected: a "
            "conversation begins with the text of its question and generation prompt. Received: a "
            "template that writes the question in another way once it is answered. Use a `text` "
            "column that holds the conversation as the model is to see it."
        )
    is_target = np.zeros(len(ids), bool)
    for span in spans:
        if span is not None:  # some templates drop parts of earlier turns
            is_target[slice(*span)] = True
    is_target[0] = False
    return Example(np.asarray(ids, "int32"), is_target)


def _answer_span(
    messages: Sequence[dict[str, Any]], turn: int, ids: list[int], tokenizer: TextTokenizer
) -> tuple[int, int] | None:
    """Returns start and end of a turn's answer in the ids of the whole conversation."""
    before, through = messages[:turn], messages[: turn + 1]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    question = tokenizer.apply_chat_template(before) if before else ""
    answered = tokenizer.apply_chat_template(through, add_generation_prompt=False)
    if not (text.startswith(answered) and answered.startswith(question)):
        return None
    # By common prefixes: a token may reach over the border between question and answer.
    question_ids = tokenizer.apply_chat_template(before, tokenize=True) if before else []
    start = _common_prefix(ids, question_ids)
    end = _common_prefix(
        ids, tokenizer.apply_chat_template(through, add_generation_prompt=False, tokenize=True)
    )
    stops = [i for i in range(start, end) if ids[i] in tokenizer.stop_token_ids]
    # A model never generates what a template writes after the end of a turn.
    return start, (stops[-1] + 1 if stops else end)


def _common_prefix(first: list[int], second: list[int]) -> int:
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
