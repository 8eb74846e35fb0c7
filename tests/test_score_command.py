"""Records in files, scored by the command: accuracy, pairs, texts, and what is wrong there."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import functional_llm as flm
from functional_llm.commands.main import main
from tiny import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def backbone(folder: Path) -> flm.Backbone:
    return flm.Backbone.from_preset(folder)


def score_file(folder: Path, data: Path, *options: str) -> int:
    return main(["score", "--preset", str(folder), "--data", str(data), *options])


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_accuracy_is_that_of_the_harness(
    folder: Path,
    backbone: flm.Backbone,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`acc` takes the likeliest choice, `acc_norm` the likeliest for each character."""
    questions: list[tuple[str, list[str], Any]] = [
        ("Who?", ["the quick fox", "nobody", "you"], 0),
        ("What?", ["a dog", "the lazy dog and the quick brown fox"], "a dog"),
        ("Where?", ["here", "there"], 1),
    ]
    keys = ("question", "choices", "answer")
    records = [dict(zip(keys, question, strict=True)) for question in questions]
    data, output = write_lines(tmp_path / "data.jsonl", records), tmp_path / "new" / "out.jsonl"
    score_file(folder, data, "--output", str(output))
    right, right_norm = [], []
    results = [json.loads(line) for line in output.read_text().splitlines()]
    for (question, choices, answer), result in zip(questions, results, strict=True):
        rows = [(f"Question: {question}\nAnswer:", f" {choice}") for choice in choices]
        logs = [score.log_probability for score in flm.score(backbone, rows)]
        np.testing.assert_allclose(result["log_probabilities"], logs, atol=1e-4)
        place = answer if isinstance(answer, int) else choices.index(answer)
        right.append(int(np.argmax(logs)) == place)
        norms = [x / len(choice) for x, choice in zip(logs, choices, strict=True)]
        right_norm.append(int(np.argmax(norms)) == place)
        assert (result["answer"], result["right"]) == (answer, place)
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines()[-4:])
    assert printed["acc"] == f"{np.mean(right):.4f}"
    assert printed["acc_norm"] == f"{np.mean(right_norm):.4f}"
    # statistics.stdev(right) / sqrt(3), as lm-evaluation-harness's mean_stderr.
    assert printed["acc_stderr"] == f"{np.std(right, ddof=1) / 3**0.5:.4f}"


def test_pairs_and_texts_in_files(
    folder: Path,
    backbone: flm.Backbone,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pairs = [("The quick", " brown fox"), ("The lazy", " dog")]
    records = [{"context": x, "continuation": y} for x, y in pairs]
    output = tmp_path / "out.jsonl"
    score_file(folder, write_lines(tmp_path / "pairs.jsonl", records), "--output", str(output))
    scores = flm.score(backbone, pairs)
    lines = output.read_text().splitlines()
    for line, record, found in zip(lines, records, scores, strict=True):
        result = json.loads(line)
        assert record.items() <= result.items()
        assert result["log_probability"] == pytest.approx(found.log_probability, abs=1e-4)
        assert result["token_ids"] == found.token_ids
    total, tokens = sum(s.log_probability for s in scores), sum(s.num_tokens for s in scores)
    printed = capsys.readouterr().out
    assert f"perplexity  {np.exp(-total / tokens):.4f}" in printed and "' dog'" in printed
    text = "The quick brown fox jumps over the lazy dog. " * 3
    (tmp_path / "text.txt").write_text(text)
    expected = flm.perplexity(backbone, text, window=20, stride=10)
    for data in (tmp_path / "text.txt", write_lines(tmp_path / "text.jsonl", [{"text": text}])):
        score_file(folder, data, "--window", "20", "--stride", "10")
        printed = capsys.readouterr().out
        assert f"word_perplexity  {expected.per_word:.4f}" in printed
        assert f"bits_per_byte  {expected.bits_per_byte:.4f}" in printed


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (None, "Expected a dataset at .*data.jsonl: there is no such file"),
        ([], "data.jsonl is an empty file"),
        ([{"prompt": "a"}], "line 1: expected one of these sets of columns: context, continuation"),
        ([{"text": "a"}, {"context": "a"}], "line 2: expected the columns text, as in the first"),
        ([{"text": 5}], "line 1: expected a string in column `text`"),
        ([{"text": "ab"}, {"text": ""}], "line 2: the text is empty"),
        ([{"context": "a", "continuation": ""}], "line 1: the continuation is empty"),
        ([{"context": "th", "continuation": "e"}], "line 1: the continuation 'e' has no tokens"),
        ([{"context": "a " * 600, "continuation": "b"}], "line 1: .* The model reads 512"),
        ([{"question": "a", "choices": ["b"], "answer": 0}], "line 1: expected two or more texts"),
        ([{"question": "a", "choices": ["b", "c"], "answer": 2}], "line 1: expected as `answer`"),
        ([{"question": "a", "choices": ["b", "c"], "answer": "d"}], "place from 0 to 1. Received"),
    ],
)
def test_bad_files(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    records: Sequence[Any] | None,
    message: str,
) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    if records is not None:
        write_lines(data, records)
    assert score_file(folder, data, "--output", str(output)) == 2
    error = capsys.readouterr().err
    assert error.startswith("functional-llm score: ") and re.search(message, error)
    assert not output.exists()
