"""Records -> examples: token ids, and which of them are targets."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from functional_llm.tokenizers import TextTokenizer
from functional_llm.training.answers import find_answers
from functional_llm.training.conversations import (
    column_text,
    is_conversation,
    read_conversation,
)
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

    def cut(self, length: int) -> "Example":
        """Returns the example with `length` tokens and one that is only predicted, at most."""
        return Example(self.token_ids[: length + 1], self.is_target[: length + 1])


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


def make_examples(
    records: Iterable[Record | Mapping[str, Any]], tokenizer: TextTokenizer, length: int
) -> Examples:
    """Tokenises records.

    A record has one of these sets of columns:

    - `messages` or ShareGPT's `conversations`: a list of `{"role", "content"}` or `{"from",
      "value"}`; the assistant's messages are targets.
    - `prompt` and `completion`: lists of messages, of which those of the assistant in the
      completion are targets; or texts, a user's message and the answer.
    - `instruction`, optionally `input`, and `output`: a user's message and the answer.
    - `text`: a text, all of it a target, followed by the tokenizer's end-of-text token unless it
      ends a turn itself. It may be what a chat template wrote: the names of special tokens in it
      are these tokens.

    All but the last go through the tokenizer's chat template, with the columns `system`, `tools`
    (JSON schemas) and `chat_template_kwargs` if they are there. A `.txt` file is one running text,
    cut into examples of `length` tokens; any other example is truncated to `length`.

    Of a template with `{% generation %}` marks, what it marks is learnt. Of another one, an answer
    is learnt if it is certain where it begins and ends; a warning names the records with others.

    Args:
        records: From `read_records`; or dicts with these columns.
        tokenizer: The model's tokenizer.
        length: Largest number of tokens that the model reads of an example. The last token of an
            example is only predicted, so an example has up to `length + 1`.

    Returns:
        Examples with at least one item.

    Raises:
        ValueError: If the length is below 1, a record lacks columns, a value has another type, the
            chat template does not accept a conversation or shows of none of its answers where they
            are, or no example is left.
    """
    check_length(length, None)
    items, truncated, dropped = [], 0, 0
    doubts: dict[str, str] = {}
    for number, record in enumerate(records, 1):
        if not isinstance(record, Record):
            record = Record(f"record {number}", dict(record))
        for example in tokenise(record, tokenizer, length, doubts):
            truncated += len(example.token_ids) > length + 1
            cut = example.cut(length)
            if cut.is_target.any():
                items.append(cut)
            else:
                dropped += 1
    warn_of_doubts(doubts)
    if not items:
        raise nothing_to_learn(dropped, length)
    return Examples(items, truncated, dropped)


def nothing_to_learn(count: int, length: int) -> ValueError:
    """Returns the error of so many examples without a target."""
    return ValueError(
        f"None of {count} examples has a token to learn within {length} tokens. Expected "
        "answers that are not empty; a longer context keeps more of each example."
    )


def tokenise(
    record: Record, tokenizer: TextTokenizer, length: int, doubts: dict[str, str]
) -> Iterator[Example]:
    """Yields a record's examples, not cut yet; notes why answers of it are not learnt.

    Args:
        record: As for `make_examples`.
        tokenizer: The model's tokenizer.
        length: Tokens of an example of a running text.
        doubts: Receives place -> reason.

    Raises:
        ValueError: As for `make_examples`.
    """
    fields = record.fields
    if "running_text" in fields:
        ids = _encode_text(
            fields["running_text"],
            tokenizer,
            begins="continues" not in fields,
            ends="is_continued" not in fields,
        )
        for start in range(0, max(len(ids) - 1, 1), length):  # the last id of one begins the next
            yield _all_targets(ids[start : start + length + 1])
    elif "text" in fields and not is_conversation(record):
        yield _all_targets(_encode_text(column_text(record, "text"), tokenizer))
    else:
        ids, is_target, doubt = find_answers(read_conversation(record), tokenizer)
        if doubt:
            doubts[record.where] = doubt
        yield Example(np.asarray(ids, "int32"), is_target)


def _encode_text(
    text: str, tokenizer: TextTokenizer, begins: bool = True, ends: bool = True
) -> list[int]:
    ids = tokenizer.encode(text, tokenizer.add_bos and begins, parse_special=True)
    if not ends:
        return ids
    # Templates write a line end after the token that ends a turn.
    written = (i for i in reversed(ids) if tokenizer.engine.token_bytes(i).strip())
    is_ended = next(written, None) in {*tokenizer.stop_token_ids, tokenizer.eos_token_id}
    return ids if is_ended or tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def _all_targets(ids: list[int]) -> Example:
    return Example(np.asarray(ids, "int32"), np.arange(len(ids)) > 0)


def warn_of_doubts(doubts: dict[str, str]) -> None:
    """Warns of answers that are not learnt, if there are any."""
    if doubts:
        where, reason = next(iter(doubts.items()))
        names = ", ".join(list(doubts)[:5]) + (", ..." if len(doubts) > 5 else "")
        warnings.warn(
            f"Of {len(doubts)} conversations only a part of the answers is learnt, of which the "
            f"chat template shows where they begin and end: {names}. In {where}, {reason}. A "
            "template with {% generation %} marks lets all be learnt.",
            stacklevel=3,
        )
