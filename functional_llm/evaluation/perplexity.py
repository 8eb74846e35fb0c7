"""Perplexity of texts of any length, in rolling windows."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from functional_llm.evaluation.rows import Row, prefix_token_id
from functional_llm.evaluation.scorer import Scorer
from functional_llm.generation.arguments import as_ids
from functional_llm.generation.prompts import split_prompts
from functional_llm.generation.text_generator import TextGenerator
from functional_llm.tokenizers import TextTokenizer

DEFAULT_WINDOW = 2048  # of a model without a longest context


@dataclass(frozen=True, eq=False)
class Perplexity:
    """How well a model predicts texts.

    Args:
        log_probabilities: Of each text, (number of texts,), natural logarithms.
        num_tokens: Tokens of all texts that were predicted, each once.
        num_words: What stands between white space, of all texts; `None` for ids.
        num_bytes: Bytes in UTF-8, of all texts; `None` for ids.
    """

    log_probabilities: np.ndarray
    num_tokens: int
    num_words: int | None = None
    num_bytes: int | None = None

    @property
    def log_probability(self) -> float:
        """The sum of all."""
        return float(self.log_probabilities.sum())

    @property
    def per_token(self) -> float:
        """Of a token: exp of its mean loss; what Transformers' documentation calls perplexity.

        It depends on the tokenizer: compare those of models with the same one.
        """
        return math.exp(-self.log_probability / self.num_tokens)

    @property
    def per_word(self) -> float | None:
        """lm-evaluation-harness's `word_perplexity`; `None` for ids."""
        return _exp(self.log_probability, self.num_words)

    @property
    def per_byte(self) -> float | None:
        """lm-evaluation-harness's `byte_perplexity`; `None` for ids."""
        return _exp(self.log_probability, self.num_bytes)

    @property
    def bits_per_byte(self) -> float | None:
        """lm-evaluation-harness's `bits_per_byte`; `None` for ids."""
        return None if self.per_byte is None else math.log2(self.per_byte)


def perplexity(
    model: keras.Model | TextGenerator | Scorer,
    texts: Any,
    tokenizer: TextTokenizer | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    parse_special: bool = True,
) -> Perplexity:
    """Returns how well a model predicts texts, each on its own.

    A text that is longer than the window is read in several. Each token is predicted once: the
    first window predicts all its tokens, every other one `stride` new ones, with what comes before
    them in it as context. The last window is full, too.

    Before a text stands a BOS, or an EOS if the tokenizer has no BOS; it is not predicted. Nothing
    stands before ids: their first is not predicted.

    Args:
        model: As for `Scorer`.
        texts: A text or ids, or a list of either.
        tokenizer: As for `Scorer`.
        window: Most tokens that the model reads at once. By default its context, or 2048.
        stride: New tokens of a window. By default `window`: the least work, as
            lm-evaluation-harness does it. A smaller one gives each token more context, takes more
            time, and finds a lower perplexity.
        batch_size: As for `Scorer.score`.
        parse_special: As for `Scorer.score`.

    Returns:
        The perplexity, a token, a word and a byte.

    Raises:
        ValueError: If there is no text, or one has no tokens to predict, or a number is out of
            range.
        RuntimeError: As `Scorer` and `Scorer.score`.

    Reference:
        [Perplexity of fixed-length models](https://huggingface.co/docs/transformers/perplexity).
    """
    scorer = Scorer.of(model, tokenizer)
    window = scorer.context or DEFAULT_WINDOW if window is None else window
    stride = window if stride is None else stride
    if not 1 <= stride <= window <= (scorer.context or window):
        raise ValueError(
            f"Expected 1 <= stride <= window <= {scorer.context or 'any number'}, the model's "
            f"context. Received: stride {stride}, window {window}."
        )
    given, _ = split_prompts(texts)
    if not given:
        raise ValueError("Expected at least one text, received an empty list.")
    encoded = [_encode(f"Text {i}", x, scorer, parse_special) for i, x in enumerate(given)]
    logs = sum_windows(scorer, encoded, window, stride, batch_size)
    plain = [text for text in given if isinstance(text, str)]
    is_text = len(plain) == len(given)
    return Perplexity(
        logs,
        num_tokens=sum(len(ids) - 1 for ids in encoded),
        num_words=sum(map(count_words, plain)) if is_text else None,
        num_bytes=sum(len(text.encode()) for text in plain) if is_text else None,
    )


def sum_windows(
    scorer: Scorer,
    texts: Sequence[Sequence[int]],
    window: int,
    stride: int,
    batch_size: int | None,
) -> np.ndarray:
    """Returns the log-probability of each text, (number of texts,), without its first id."""
    windows = [(i, x) for i, ids in enumerate(texts) for x in rolling_windows(ids, window, stride)]
    scores = scorer.score_ids([row for _, row in windows], batch_size)
    logs = np.zeros(len(texts))
    for (i, _), score in zip(windows, scores, strict=True):
        logs[i] += score.log_probability
    return logs


def rolling_windows(ids: Sequence[int], window: int, stride: int) -> Iterator[Row]:
    """Yields windows that predict each id but the first once.

    Args:
        ids: Token ids.
        window: Most tokens of the inputs of a window.
        stride: Tokens that a window predicts; the first one predicts `window`.
    """
    done = 1
    while done < len(ids):
        end = min(len(ids), done + (window if done == 1 else stride))
        begin = max(0, end - 1 - window)
        yield Row(list(ids[begin:done]), list(ids[done:end]))
        done = end


def count_words(text: str) -> int:
    """Returns the number of words as lm-evaluation-harness counts them."""
    return len(re.split(r"\s+", text))


def _encode(where: str, text: Any, scorer: Scorer, parse_special: bool) -> list[int]:
    if isinstance(text, str):
        first = prefix_token_id(scorer.tokenizer)
        ids = scorer.tokenizer.encode(text, False, parse_special)
        ids = ids if ids[:1] == [first] else [first, *ids]
    else:
        ids = as_ids(where, text)
    if len(ids) < 2:
        raise ValueError(
            f"{where} has no tokens to predict. Expected a text that is not empty, or two ids. "
            f"Received: {text!r:.50}."
        )
    return ids


def _exp(log_probability: float, count: int | None) -> float | None:
    return None if count is None else math.exp(-log_probability / count)
