"""Datasets, tokenised examples, packed rows, batches."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from functional_llm.presets import Tokenizer
from functional_llm.training import (
    Batches,
    Example,
    Record,
    make_examples,
    pack,
    read_records,
    split_examples,
)
from tiny import save_tiny

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}, Zwölf 🙂"} for i in range(5)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_preset(save_tiny(tmp_path_factory.mktemp("tiny")))


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows in the format of the path's ending."""
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pytest.importorskip("datasets")
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import datasets
    except ImportError:
        return
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_formats_hold_the_same(tmp_path: Path, ending: str) -> None:
    if ending == "csv":
        pytest.importorskip("datasets")
    path = _write(tmp_path / f"data.{ending}", ROWS)
    assert [record.fields for record in read_records(path)] == ROWS


def test_cells_of_a_csv_file_are_text(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = [{"prompt": f"{i} + {i}?", "completion": str(2 * i), "system": "NA"} for i in range(3)]
    path = _write(tmp_path / "numbers.csv", rows)
    assert [record.fields for record in read_records(path)] == rows
    rows = [{"prompt": "a", "completion": "None"}, {"prompt": "b", "completion": ""}]
    path = _write(tmp_path / "words.csv", rows)
    assert [record.fields for record in read_records(path)] == [rows[0], {"prompt": "b"}]


def test_a_folder_goes_through_datasets(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    _write(tmp_path / "set" / "train.jsonl", ROWS)
    assert [record.fields for record in read_records(tmp_path / "set")] == ROWS


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    path = _write(tmp_path / "data.jsonl", ROWS).rename(tmp_path / "data.json")
    assert [record.fields for record in read_records(path)] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is an empty file"),
        ("a.jsonl", b"\n  \n", "holds no example"),
        ("a.json", b"[]", "holds no example"),
        ("a.txt", b" \n", "holds no example"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"line 3 is no valid JSON.*Received: {\"text"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2: expected a JSON object, received list"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is no valid UTF-8"),
        ("a.json", b'[{"text": "a"},\n]', "is no valid JSON.*line 2"),
        ("a.json", b'[{"text": "a"}, 3]', "example 2: expected a JSON object, received int"),
        ("a.xml", b"<a/>", r"expected a dataset file ending in .json.*received '.xml'"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / name)


def test_a_missing_file_is_no_hub_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_records(tmp_path / "none.jsonl")


def test_a_damaged_table(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no, it is not")
    with pytest.raises(ValueError, match="could not load .*a.parquet"):
        read_records(tmp_path / "a.parquet")


def _example(fields: dict[str, Any], tokenizer: Tokenizer, length: int = 500) -> Example:
    return make_examples([Record("here", fields)], tokenizer, length).items[0]


def _texts(example: Example, tokenizer: Tokenizer) -> tuple[str, str]:
    """Returns the text of the whole, and of what is learnt."""
    learnt = example.token_ids[example.is_target].tolist()
    whole = tokenizer.decode(example.token_ids.tolist(), skip_special_tokens=False)
    return whole, tokenizer.decode(learnt, skip_special_tokens=False)


ANSWERS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "completion": "b c"}, "b c<|im_end|>"),
    ({"instruction": "a", "input": "x", "output": "b c", "system": "s"}, "b c<|im_end|>"),
    ({"instruction": "a", "input": "", "output": "b c", "text": "all"}, "b c<|im_end|>"),
    (
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "first"},
                {"role": "user", "content": "<|im_end|>?"},
                {"role": "assistant", "content": "second"},
            ]
        },
        "first<|im_end|>second<|im_end|>",
    ),
]


@pytest.mark.parametrize(("fields", "expected"), ANSWERS)
def test_only_answers_are_learnt(
    tokenizer: Tokenizer, fields: dict[str, Any], expected: str
) -> None:
    whole, learnt = _texts(_example(fields, tokenizer), tokenizer)
    assert learnt == expected
    assert whole.startswith("<s><|im_start|>")
    assert whole.endswith("<|im_end|>\n")


def test_alpaca_input_follows_the_instruction(tokenizer: Tokenizer) -> None:
    fields = {"instruction": "Add.", "input": "1, 2", "output": "3", "system": "Count."}
    whole, _ = _texts(_example(fields, tokenizer), tokenizer)
    assert "system\nCount.<|im_end|>" in whole
    assert "user\nAdd.\n1, 2<|im_end|>" in whole


def test_plain_text_is_learnt_whole(tokenizer: Tokenizer) -> None:
    example = _example({"text": "The quick brown fox"}, tokenizer)
    whole, learnt = _texts(example, tokenizer)
    assert whole == "The quick brown fox<|im_end|>"
    assert whole.endswith(learnt)
    assert not example.is_target[0] and example.is_target[1:].all()


def test_a_running_text_is_cut_and_every_token_learnt_once(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    examples = make_examples(read_records(tmp_path / "a.txt"), tokenizer, 32)
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert len(examples.items) > 3 and examples.num_truncated == 0
    learnt = np.concatenate([x.token_ids[x.is_target] for x in examples.items])
    assert learnt.tolist() == ids[1:]


def test_what_is_too_long_is_cut_and_counted(tokenizer: Tokenizer) -> None:
    records = [
        Record("1", {"prompt": "a", "completion": "b " * 200}),
        Record("2", {"prompt": "a " * 200, "completion": "b"}),
        Record("3", {"prompt": "a", "completion": "b"}),
    ]
    examples = make_examples(records, tokenizer, 64)
    assert [len(x.token_ids) for x in examples.items][0] == 65
    assert (len(examples.items), examples.num_truncated, examples.num_dropped) == (2, 2, 1)
    assert examples.describe(64) == (
        "Of 3 examples, 2 were cut off after 64 tokens and 1 left out, with no token of an answer."
    )
    assert make_examples(records[2:], tokenizer, 64).describe(64) == ""
    plain = make_examples([record.fields for record in records], tokenizer, 64)
    assert [list(x.token_ids) for x in plain.items] == [list(x.token_ids) for x in examples.items]
    with pytest.raises(ValueError, match="record 1.*text"):
        make_examples([{"words": "a"}], tokenizer, 64)
    with pytest.raises(ValueError, match="None of 1 examples has a token to learn within 64"):
        make_examples(records[1:2], tokenizer, 64)
    for record in (records[2], Record("a.txt", {"running_text": "b " * 9})):
        with pytest.raises(ValueError, match="Expected a length from 1 .* received 0"):
            make_examples([record], tokenizer, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "a", "answer": "b"}, r"here lacks columns. .*Received: \['answer', 'qu"),
        ({"prompt": "a"}, r"lacks columns"),
        ({"text": 3}, "here: expected a string in column `text`, received int: 3"),
        ({"messages": []}, "expected `messages` to be a list of objects"),
        ({"messages": "hi"}, "expected `messages` to be a list of objects"),
        ({"messages": [{"role": "user", "content": "a"}]}, "one of the role `assistant`"),
        ({"messages": [{"role": "user"}, {"role": "assistant"}]}, r"here: `messages\[0\]`"),
    ],
)
def test_bad_records(tokenizer: Tokenizer, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _example(fields, tokenizer)


def test_a_template_that_rewrites_the_question_is_refused(tokenizer: Tokenizer) -> None:
    template = "{{ messages | length }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
    other = Tokenizer(engine=tokenizer.engine, chat_template=template)
    with pytest.raises(
        ValueError, match="here: the chat template does not show where the answer begins"
    ):
        _example({"prompt": "a", "completion": "b"}, other)


def test_held_out_examples_are_chosen_once(tokenizer: Tokenizer) -> None:
    items = [Example(np.full(3, i), np.ones(3, bool)) for i in range(10)]
    kept, held = split_examples(items, 0.3, seed=1)
    assert sorted(x.token_ids[0] for x in [*kept, *held]) == list(range(10))
    assert len(held) == 3
    assert [x.token_ids[0] for x in split_examples(items, 0.3, seed=1)[1]] == [
        x.token_ids[0] for x in held
    ]
    with pytest.raises(ValueError, match="leaves something to train on"):
        split_examples(items[:1], 0.3)


lengths = st.lists(st.integers(2, 17), min_size=1, max_size=40)


@settings(deadline=None, max_examples=50)
@given(lengths, st.booleans())
def test_rows_hold_every_example_once(sizes: list[int], join: bool) -> None:
    rng = np.random.default_rng(len(sizes))
    examples = [
        Example(rng.integers(0, 99, n).astype("int32"), np.arange(n) >= n // 2) for n in sizes
    ]
    rows = pack(examples, 16, join)
    found = []
    for row in range(len(rows)):
        ids, positions, segments, labels = (
            x[row] for x in (rows.token_ids, rows.positions, rows.segment_ids, rows.labels)
        )
        assert ((positions >= 0) == (segments >= 0)).all()
        assert (labels[positions < 0] == -1).all()
        for segment in range(segments.max() + 1):
            here = segments == segment
            assert positions[here].tolist() == list(range(here.sum()))
            found.append((ids[here].tolist(), labels[here].tolist()))
    expected = [
        (e.token_ids[:-1].tolist(), np.where(e.is_target, e.token_ids, -1)[1:].tolist())
        for e in examples
    ]
    assert sorted(found) == sorted(expected)
    if join:
        total = sum(n - 1 for n in sizes)
        assert len(rows) <= max(1, 2 * total // 16 + 1)


def test_batches_are_a_function_of_their_number() -> None:
    rows = pack([Example(np.full(5, i, "int32"), np.ones(5, bool)) for i in range(7)], 4)
    batches = Batches(rows, 2, seed=3)
    stream = np.concatenate([batches.between(0, 14)[i][0]["token_ids"][:, 0] for i in range(14)])
    for turn in range(4):  # each pass holds every row once, in an order of its own
        assert sorted(stream[turn * 7 : turn * 7 + 7]) == list(range(7))
    assert stream[:7].tolist() != stream[7:14].tolist()
    later = batches.between(5, 8)
    assert len(later) == 3
    np.testing.assert_array_equal(later[1][0]["token_ids"][:, 0], stream[12:14])
    assert batches.count_tokens(0) == 8


def test_the_last_batch_is_filled_with_padding() -> None:
    rows = pack([Example(np.full(5, i, "int32"), np.ones(5, bool)) for i in range(3)], 4)
    inputs, labels, weights = Batches(rows, 2)[1]
    assert inputs["positions"].tolist() == [[0, 1, 2, 3], [-1] * 4]
    assert labels[1].tolist() == [-1] * 4
    assert weights.tolist() == [[1] * 4, [0] * 4]
    assert Batches(rows, 2).count_tokens(1) == 4
