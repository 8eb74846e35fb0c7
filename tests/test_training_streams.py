"""Training data that are a stream: every stage goes on from any place, bit for bit."""

import csv
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from functional_llm.presets import Tokenizer
from functional_llm.training import (
    Example,
    FileRecords,
    Record,
    RecordStream,
    StreamedBatches,
    StreamedRows,
    StreamState,
    hold_out,
    interleave,
    make_examples,
    read_records,
    stream_records,
)
from tiny import save_tiny

ROWS = [{"prompt": f"question {i}", "completion": f'answer\n"{i}", Zwölf 🙂'} for i in range(11)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_preset(tiny)


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def goes_on(stream: RecordStream) -> list[Record]:
    """Returns all records, after reading on from each of them gave those that follow."""
    whole = list(stream.read())
    for k, (_, state) in enumerate(whole):
        on = stream.read(json.loads(json.dumps(state)))
        assert [x for x, _ in on] == [x for x, _ in whole[k + 1 :]], k
    assert list(stream) == [record for record, _ in whole]
    return list(stream)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:  # as Excel does
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, path, row_group_size=4)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_files_are_read_on_from_any_record(tmp_path: Path, ending: str) -> None:
    write(tmp_path / f"a.{ending}", ROWS[:6])
    write(tmp_path / f"b.{ending}", ROWS[6:])
    records = goes_on(stream_records(f"{tmp_path}/*.{ending}"))
    assert [record.fields for record in records] == ROWS
    assert records == read_records(f"{tmp_path}/*.{ending}")


def test_a_running_text_is_read_in_parts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "".join(f"The quick brown fox {i}\n" for i in range(30))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    records = goes_on(FileRecords([tmp_path / "a.txt"], text_bytes=100))
    assert len(records) > 5 and "".join(x.fields["running_text"] for x in records) == text
    tokenizer = replace(tokenizer, add_bos=True)
    examples = make_examples(records, tokenizer, 16).items
    ids = np.concatenate([x.token_ids for x in examples]).tolist()
    assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 1)
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    (whole,) = read_records(tmp_path / "a.txt")
    assert whole.fields == {"running_text": text}


def generate() -> Iterator[dict[str, Any]]:
    yield from ROWS


class Arrays:
    """As a tf.data.Dataset, whose texts are bytes and whose numbers are NumPy's."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("its tensors need TensorFlow")

    def as_numpy_iterator(self) -> Iterator[dict[str, Any]]:
        for row in ROWS:
            yield {key: value.encode() for key, value in row.items()} | {"n": np.int64(3)}


def theirs(kind: str) -> Any:
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    streamed = dataset.to_iterable_dataset(num_shards=3)
    match kind:
        case "Dataset":
            return dataset
        case "IterableDataset":
            return streamed.map(lambda row: {"n": len(row["prompt"])})
        case "shuffled":  # its own state leaves out the buffer
            return streamed.shuffle(seed=1, buffer_size=4).filter(lambda row: True)
        case _:
            parts = [streamed, dataset.to_iterable_dataset().shuffle(seed=1, buffer_size=3)]
            return datasets.interleave_datasets(parts, probabilities=[0.5, 0.5], seed=3)


@pytest.mark.parametrize("kind", ["Dataset", "IterableDataset", "shuffled", "interleaved"])
def test_streams_of_datasets_are_read_on_from_any_record(kind: str) -> None:
    records = goes_on(stream_records(theirs(kind)))
    assert [record.fields for record in records] == list(theirs(kind))


LOADER = torch.utils.data.DataLoader(ROWS, batch_size=None)
ENTRIES = {"list": ROWS, "function": generate, "tf.data": Arrays(), "torch": LOADER}


@pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES)
def test_other_entries_are_read_on_from_any_record(entries: Any) -> None:
    fields = [record.fields for record in goes_on(stream_records(entries))]
    expected = [{**row, "n": 3} for row in ROWS] if isinstance(entries, Arrays) else ROWS
    assert fields == expected
    assert [x.fields for x in stream_records(["a", "b"])] == [{"text": "a"}, {"text": "b"}]


def test_a_folder_is_streamed_by_datasets(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", ROWS)
    records = goes_on(stream_records(tmp_path / "set"))
    assert [record.fields for record in records] == ROWS


def test_one_dataset_is_read_at_two_places_at_once() -> None:
    stream = stream_records(theirs("IterableDataset"))
    first, second = stream.read(), stream.read()
    ahead = list(islice(first, 5))
    assert [x for x, _ in second] == [x for x, _ in [*ahead, *first]]


def test_names_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[dict[str, Any]] = []

    def load(**options: Any) -> list[Any]:
        asked.append(options)
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load)  # no hub can be reached
    for name in ("org/name", "hf://datasets/org/name", "hf://datasets/org/name@v1/a/*.parquet"):
        assert [x.fields for x in stream_records(name, "test")] == [{"text": "a"}]
    read_records("hf://datasets/org/name/a@b.jsonl")
    whole = {"path": "org/name", "split": "test", "streaming": True}
    assert asked == [
        whole,
        whole,
        {**whole, "revision": "v1", "data_files": "a/*.parquet"},
        {**whole, "data_files": "a@b.jsonl", "split": "train", "streaming": False},
    ]


def test_files_of_text_need_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an error
    for ending in ("jsonl", "json", "csv"):
        assert len(list(stream_records(write(tmp_path / f"a.{ending}", ROWS)))) == len(ROWS)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.parquet").write_text("a")
    assert len(list(stream_records(tmp_path / "a.txt"))) == 1
    for name in ("a.parquet", "org/name"):
        path = str(tmp_path / name) if "." in name else name
        with pytest.raises(ImportError, match=f"{name} needs .*pip install datasets"):
            list(stream_records(path))


STRATEGIES = ["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"]


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3]])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_order_is_that_of_datasets(strategy: str, weights: list[float] | None) -> None:
    import datasets

    rows = [[{"text": f"{i} {k}"} for k in range(n)] for i, n in enumerate((5, 12, 1))]
    expected = datasets.interleave_datasets(
        [datasets.Dataset.from_list(part).to_iterable_dataset() for part in rows],
        probabilities=weights,
        seed=4,
        stopping_strategy=strategy,
    )
    scaled = weights and [3 * x for x in weights]
    mixed = interleave([stream_records(x) for x in rows], scaled, 4, strategy)
    assert [record.fields for record in goes_on(mixed)] == list(expected)


def test_a_share_is_held_out() -> None:
    stream = stream_records([{"text": str(i)} for i in range(40)])
    kept, held = (goes_on(x) for x in hold_out(stream, 0.3, seed=1))
    assert sorted([*kept, *held], key=lambda x: int(x.fields["text"])) == list(stream)
    assert 5 <= len(held) <= 20
    assert [*hold_out(stream, 0.3, seed=2)[1]] != held


class Counted(RecordStream):
    """A million texts of one to twenty tokens, counted as they are read."""

    name = "counted"
    num_read = 0

    def read(self, state: Any = None) -> Iterator[tuple[Record, Any]]:
        for i in range(0 if state is None else state["i"], 10**6):
            self.num_read += 1
            yield Record(f"{i}", {"text": "x" * (i * 7 % 19 + 1)}), {"i": i + 1}

    def describe(self) -> dict[str, Any]:
        return {}


def test_no_more_is_read_than_waits(tokenizer: Tokenizer) -> None:
    records = Counted()
    rows = StreamedRows(records, tokenizer, 32, shuffle_buffer=50, open_rows=4)
    batches = StreamedBatches(rows, 3)
    assert records.num_read == 0
    given = 0
    for i in range(100):
        inputs, _, _ = batches[i]
        given += int((inputs["segment_ids"].max(1) + 1).sum())
        state = batches.state(i + 1)
        assert len(state.waiting) == 49 and len(state.open_rows) <= 4
        waiting = len(state.waiting) + sum(map(len, state.open_rows))
        assert records.num_read == given + waiting
    assert len(batches._batches) < 20 and len(batches._states) < 20
    full = np.mean([(batches[i][0]["positions"] >= 0).mean() for i in range(90, 100)])
    assert full > 0.9


def texts(rows: list[list[Example]]) -> list[list[bytes]]:
    return [[x.token_ids.tobytes() + x.is_target.tobytes() for x in row] for row in rows]


def through_a_file(state: StreamState) -> StreamState:
    facts, tensors = state.to_tensors()
    return StreamState.from_tensors(json.loads(json.dumps(facts)), tensors)


@pytest.mark.parametrize("options", [{}, {"shuffle_buffer": 0}, {"join": False}])
def test_rows_go_on_from_any_place_over_several_passes(
    tmp_path: Path, tokenizer: Tokenizer, options: dict[str, Any]
) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps. " * 12, encoding="utf-8")
    write(tmp_path / "b.jsonl", [{"text": f"text {i}" * (i % 3 + 1)} for i in range(7)])
    files = [stream_records(tmp_path / name) for name in ("a.txt", "b.jsonl")]
    mixed = interleave(files, stopping_strategy="all_exhausted_without_replacement")
    rows = StreamedRows(mixed, tokenizer, 24, **{"shuffle_buffer": 5, "open_rows": 3, **options})
    reader = rows.read()
    states, whole = [], []
    while reader.state().facts["passes"] < 3:
        states.append(through_a_file(reader.state()))
        whole.append(next(reader))
    assert len(whole) > 20
    for k in range(0, len(states), 3):
        on = rows.read(states[k])
        assert texts([next(on) for _ in range(len(whole) - k)]) == texts(whole[k:]), k
    given = [x for row in whole for x in row]
    one_pass = make_examples(mixed, tokenizer, 24).items
    if "join" in options:  # each example comes once a pass; other rows wait, across passes
        for start in (0, len(one_pass)):
            here = given[start : start + len(one_pass)]
            assert sorted(texts([here])[0]) == sorted(texts([one_pass])[0])
    assert all(sum(len(x.token_ids) - 1 for x in row) <= 24 for row in whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stream_records(x for x in "ab"), "received a generator, which is read once"),
        (lambda: stream_records(3), "Expected a path, a name, a function .* received int: 3"),
        (lambda: stream_records({"train": ["a"]}), r"one split .* a dict of \['train'\]"),
        (lambda: stream_records("hf://datasets/"), "Expected hf://datasets/org/name"),
        (lambda: stream_records("no/*.jsonl"), "Expected datasets at no/.*: no file matches"),
        (lambda: list(stream_records([1])), "list, example 1: expected a mapping from columns"),
        (lambda: interleave([]), "at least one stream"),
        (lambda: interleave([stream_records(["a"])], [1, 2]), r"for each of 1 .* received 2: \[1"),
        (lambda: interleave([stream_records(["a"])] * 2, [1, 0]), r"above 0, received 0 in \[1, 0"),
        (lambda: interleave([stream_records(["a"])] * 2, [-1, 1]), "above 0, received -1"),
        (lambda: interleave([stream_records(["a"])] * 2, [1, math.nan]), "above 0, received nan"),
        (lambda: interleave([stream_records(["a"])], stopping_strategy="x"), "received 'x'"),
        (lambda: list(interleave([stream_records(["a"]), stream_records([])])), "holds no example"),
        (lambda: hold_out(stream_records(["a"]), 1), "between 0 and 1, received 1"),
    ],
)
def test_what_cannot_be_streamed(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl, line 2 is no valid JSON"),
        ("a.csv", 'text\na\n"b\n', "a.csv, line 3 is no valid CSV: unexpected end of data"),
        ("a.csv", "text\na,b\n", "a.csv, line 2: expected at most 1 cells.*received 2"),
        ("a.csv", "text,text\na,b\n", "expected columns of different names"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "a"}\n', r"line 2 lacks columns.*Received: \['txt'\]"),
        ("a.jsonl", "\n\n", "a.jsonl holds no example"),
        ("a.jsonl", '{"text": ""}\n' * 2, "None of 2 examples has a token to learn within 8"),
    ],
)
def test_bad_streams_are_one_clear_error(
    tmp_path: Path, tokenizer: Tokenizer, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    bare = replace(tokenizer, eos_token_id=None)
    with pytest.raises(ValueError, match=message):
        StreamedBatches(StreamedRows(stream_records(tmp_path / name), bare, 8), 2)[0]
    with pytest.raises(ValueError, match="shuffle buffer of at least 0"):
        StreamedRows(stream_records(tmp_path / name), bare, 8, shuffle_buffer=-1)
