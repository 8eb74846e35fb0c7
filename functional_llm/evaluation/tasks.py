"""Records -> what a model scores: pairs, questions with choices, texts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from functional_llm.evaluation.perplexity import perplexity
from functional_llm.evaluation.scorer import Score, Scorer
from functional_llm.generation.text_generator import TextGenerator
from functional_llm.graph.types import JSON
from functional_llm.tokenizers import TextTokenizer
from functional_llm.training.conversations import column_text
from functional_llm.training.records import Record

TEMPLATE = "Question: {question}\nAnswer:"
_COLUMNS = (("context", "continuation"), ("question", "choices", "answer"), ("text",))


@dataclass(frozen=True)
class Evaluation:
    """What a model made of records.

    Args:
        summary: Name -> number, over all records. `acc` and `acc_norm` are those of
            lm-evaluation-harness: the choice with the highest log-probability, and with the highest
            one for each of its characters.
        records: Of each record, in their order, its columns and its numbers.
    """

    summary: dict[str, float]
    records: list[JSON]


def evaluate_records(
    model: keras.Model | TextGenerator | Scorer,
    records: Sequence[Record],
    tokenizer: TextTokenizer | None = None,
    template: str | None = TEMPLATE,
    batch_size: int | None = None,
    window: int | None = None,
    stride: int | None = None,
) -> Evaluation:
    """Scores records, all with the same one of these sets of columns.

    - `context` and `continuation`: texts.
    - `question`, `choices` (a list of texts) and `answer` (the right one, or its place, from 0).
      A choice is scored behind the question, with a space between.
    - `text`: perplexity. So is a `.txt` file.

    Args:
        model: As for `Scorer`.
        records: From `training.read_records`.
        tokenizer: As for `Scorer`.
        template: What a question is asked with, `{question}` in it. `None` to ask as a user, by the
            chat template.
        batch_size: As for `Scorer.score`.
        window: As for `perplexity`.
        stride: As for `perplexity`.

    Returns:
        The numbers.

    Raises:
        ValueError: If a record lacks columns or one has another type, naming its place; else as
            `Scorer.score` and `perplexity`.
    """
    scorer = Scorer.of(model, tokenizer)
    columns = _columns(records)
    if columns == ("text",):
        return _rate_texts(scorer, records, batch_size, window, stride)
    if columns == ("context", "continuation"):
        rows = [tuple(column_text(record, name) for name in columns) for record in records]
        scores = scorer.score(rows, batch_size, names=[record.where for record in records])
        return _rate_pairs(records, scores)
    return _rate_choices(scorer, records, template, batch_size)


def _columns(records: Sequence[Record]) -> tuple[str, ...]:
    """Returns the columns that all records have."""
    if not records:
        raise ValueError("Expected at least one record, received an empty list.")
    running = "running_text" in records[0].fields
    found = ("text",) if running else _columns_of(records[0])
    for record in records:
        if not running and not set(found) <= set(record.fields):
            raise ValueError(
                f"{record.where}: expected the columns {', '.join(found)}, as in the first record. "
                f"Received: {', '.join(map(str, record.fields))}."
            )
    return found


def _columns_of(record: Record) -> tuple[str, ...]:
    for columns in _COLUMNS:
        if set(columns) <= set(record.fields):
            return columns
    expected = "; ".join(", ".join(columns) for columns in _COLUMNS)
    raise ValueError(
        f"{record.where}: expected one of these sets of columns: {expected}. Received: "
        f"{', '.join(map(str, record.fields)) or 'none'}."
    )


def _rate_pairs(records: Sequence[Record], scores: Sequence[Score]) -> Evaluation:
    results = [
        {**record.fields, **_numbers(score)} for record, score in zip(records, scores, strict=True)
    ]
    tokens = sum(score.num_tokens for score in scores)
    total = sum(score.log_probability for score in scores)
    summary = {
        "log_probability": total / len(scores),
        "perplexity": math.exp(-total / tokens),
        "greedy": float(np.mean([score.is_greedy for score in scores])),
    }
    return Evaluation(summary, results)


def _rate_choices(
    scorer: Scorer, records: Sequence[Record], template: str | None, batch_size: int | None
) -> Evaluation:
    if template is not None and "{question}" not in template:
        raise ValueError(f"Expected a template with {{question}} in it, received {template!r}.")
    rows, names, answers = [], [], []
    for record in records:
        question, choices = column_text(record, "question"), _choices(record)
        answers.append(_answer(record, choices))
        context: Any = [{"role": "user", "content": question}]
        if template is not None:
            context = template.replace("{question}", question)
        space = "" if template is None else " "  # a chat template ends where the answer begins
        rows += [(context, space + choice) for choice in choices]
        names += [f"{record.where}, choice {i}" for i in range(len(choices))]
    scores = iter(scorer.score(rows, batch_size, names=names))
    results, right, right_norm = [], [], []
    for record, answer in zip(records, answers, strict=True):
        choices = _choices(record)
        logs = np.array([next(scores).log_probability for _ in choices])
        chosen = int(np.argmax(logs))
        chosen_norm = int(np.argmax(logs / np.array([len(choice) for choice in choices])))
        right.append(chosen == answer)
        right_norm.append(chosen_norm == answer)
        places = {"right": answer, "chosen": chosen, "chosen_norm": chosen_norm}
        results.append({**record.fields, "log_probabilities": logs.tolist(), **places})
    summary = {
        "acc": float(np.mean(right)),
        "acc_stderr": _stderr(right),
        "acc_norm": float(np.mean(right_norm)),
        "acc_norm_stderr": _stderr(right_norm),
    }
    return Evaluation(summary, results)


def _rate_texts(
    scorer: Scorer,
    records: Sequence[Record],
    batch_size: int | None,
    window: int | None,
    stride: int | None,
) -> Evaluation:
    column = "running_text" if "running_text" in records[0].fields else "text"
    texts = [column_text(record, column) for record in records]
    for record, text in zip(records, texts, strict=True):
        if not text:
            raise ValueError(f"{record.where}: the text is empty. Expected at least one character.")
    found = perplexity(scorer, texts, None, window, stride, batch_size)
    results = [
        {"text": text, "log_probability": float(log)}
        for text, log in zip(texts, found.log_probabilities, strict=True)
    ]
    summary = {
        "log_probability": found.log_probability / len(texts),
        "perplexity": found.per_token,
        "word_perplexity": found.per_word or math.nan,
        "byte_perplexity": found.per_byte or math.nan,
        "bits_per_byte": found.bits_per_byte or math.nan,
    }
    return Evaluation(summary, results)


def _choices(record: Record) -> list[str]:
    choices = record.fields["choices"]
    # ARC's files have the texts and their letters.
    choices = choices.get("text", choices) if isinstance(choices, Mapping) else choices
    is_right = isinstance(choices, (list, tuple, np.ndarray)) and len(choices) > 1
    if not is_right or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError(
            f"{record.where}: expected two or more texts as `choices`, received {choices!r:.100}."
        )
    return list(choices)


def _answer(record: Record, choices: list[str]) -> int:
    """Returns the place of the right choice."""
    answer = record.fields["answer"]
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    is_place = isinstance(answer, (int, np.integer)) and not isinstance(answer, bool)
    if not is_place or not 0 <= answer < len(choices):
        raise ValueError(
            f"{record.where}: expected as `answer` one of the choices, or its place from 0 to "
            f"{len(choices) - 1}. Received: {answer!r:.100}."
        )
    return int(answer)


def _numbers(score: Score) -> JSON:
    return {
        "log_probability": score.log_probability,
        "num_tokens": score.num_tokens,
        "is_greedy": score.is_greedy,
        "token_ids": score.token_ids,
        "token_log_probabilities": score.token_log_probabilities.tolist(),
    }


def _stderr(values: Sequence[bool]) -> float:
    """The standard error of a mean, as lm-evaluation-harness has it."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
