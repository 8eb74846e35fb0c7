"""Contexts and continuations, as token ids."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from functional_llm.generation.arguments import as_ids, check_ids
from functional_llm.tokenizers import TextTokenizer, is_record


class Row(NamedTuple):
    """What a model reads, and what it is to find probable.

    Args:
        context: Token ids, at least one.
        continuation: Token ids, at least one.
    """

    context: list[int]
    continuation: list[int]

    @property
    def inputs(self) -> list[int]:
        """The tokens that the model is called with: the last one is only predicted."""
        return [*self.context, *self.continuation[:-1]]


def encode_rows(
    rows: Sequence[Any],
    find_tokenizer: Callable[[], TextTokenizer],
    parse_special: bool,
    names: Sequence[str] | None,
) -> list[Row]:
    """Returns pairs of texts, or of ids, as ids.

    Args:
        rows: Pairs (context, continuation).
        find_tokenizer: Returns the model's tokenizer; called if a row is text.
        parse_special: Whether the names of special tokens in a text are these tokens.
        names: What messages call each row; "Row 0" and so on by default.

    Raises:
        ValueError: If a row is no such pair, or one of its parts has no tokens.
    """
    if isinstance(rows, (str, Mapping)) or not hasattr(rows, "__len__"):
        raise ValueError(
            f"Expected a list of pairs (context, continuation), received {rows!r:.100}."
        )
    named = zip(row_names(names, len(rows)), rows, strict=True)
    return [_encode_row(name, row, find_tokenizer, parse_special) for name, row in named]


def row_names(names: Sequence[str] | None, count: int) -> Sequence[str]:
    """Returns what messages call each row."""
    return [f"Row {i}" for i in range(count)] if names is None else names


def check_rows(
    rows: Sequence[Row], names: Sequence[str] | None, vocabulary_size: int, context: int | None
) -> None:
    """Checks that a model can read rows.

    Args:
        rows: Rows of ids.
        names: As for `encode_rows`.
        vocabulary_size: Ids must be below it.
        context: Most tokens that the model reads; `None` for no limit.

    Raises:
        ValueError: If an id is out of range, or a row is too long. The row is named.
    """
    for name, row in zip(row_names(names, len(rows)), rows, strict=True):
        check_ids(name, [*row.context, *row.continuation], vocabulary_size)
        if context is not None and len(row.inputs) > context:
            raise ValueError(
                f"{name}: {len(row.context)} tokens of context and {len(row.continuation)} of "
                f"continuation. The model reads {context}; the last one is only predicted. "
                "Shorten the context from the left; `perplexity` takes texts of any length."
            )


def encode_pair(
    tokenizer: TextTokenizer, context: str, continuation: str, parse_special: bool = True
) -> Row:
    """Returns a pair of texts as ids, as lm-evaluation-harness encodes them.

    White space at the end of the context goes to the continuation. Both are encoded as one text;
    the continuation's tokens are those behind as many as the context has on its own. A BOS that the
    model expects is put first. An empty context is a BOS, or an EOS if there is none.

    Args:
        tokenizer: The model's tokenizer.
        context: What comes first; may be empty.
        continuation: What comes then.
        parse_special: Whether the names of special tokens in a text are these tokens.

    Raises:
        ValueError: If the continuation is empty or has no tokens of its own.

    Reference:
        [TemplateLM](https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/api/model.py),
        `_encode_pair` and `loglikelihood`.
    """
    if not continuation:
        raise ValueError("the continuation is empty. Expected at least one character.")
    text, context = context + continuation, context.rstrip()
    if not context:
        ids = tokenizer.encode(text, False, parse_special)
        first = prefix_token_id(tokenizer)
        row = Row([first], ids[1:] if ids[:1] == [first] else ids)
    else:
        ids = tokenizer.encode(text, tokenizer.add_bos, parse_special)
        count = len(tokenizer.encode(context, tokenizer.add_bos, parse_special))
        row = Row(ids[:count], ids[count:])
    if not row.continuation:
        raise ValueError(
            f"the continuation {continuation!r:.50} has no tokens of its own: in one text with "
            f"{context[-20:]!r}, which comes before, there are no more tokens than without it. "
            "Begin it where a token begins, as with a space, or give token ids."
        )
    return row


def prefix_token_id(tokenizer: TextTokenizer) -> int:
    """Returns what stands before a text without a context: BOS, or EOS if there is none.

    Raises:
        ValueError: If the tokenizer has neither.
    """
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    known = [token_id for token_id in ids if token_id is not None]
    if not known:
        raise ValueError(
            "the context is empty, and the tokenizer has neither BOS nor EOS to stand there. Give "
            "at least one character of context."
        )
    return known[0]


def _encode_row(
    where: str, row: Any, find_tokenizer: Callable[[], TextTokenizer], parse_special: bool
) -> Row:
    if isinstance(row, (str, Mapping)) or not hasattr(row, "__len__") or len(row) != 2:
        raise ValueError(f"{where}: expected (context, continuation), received {row!r:.100}.")
    context, continuation = row
    if not isinstance(continuation, str):
        if isinstance(context, str):
            raise ValueError(
                f"{where}: expected two texts or two lists of ids, received {row!r:.100}."
            )
        pair = Row(*(as_ids(f"{where}", part) for part in row))
        if not pair.context or not pair.continuation:
            empty = "continuation" if pair.context else "context"
            raise ValueError(f"{where}: the {empty} is empty. Expected at least one token id.")
        return pair
    tokenizer = find_tokenizer()
    try:
        if not isinstance(context, str):
            if not hasattr(context, "__len__") or not all(map(is_record, context)):
                raise ValueError(f"expected a text or messages as context, received {context!r}.")
            context = tokenizer.apply_chat_template(context)
        return encode_pair(tokenizer, context, continuation, parse_special)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
