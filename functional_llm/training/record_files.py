"""Files -> records, one at a time. A place in a file is its byte, and the entries before it."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

from functional_llm.files.json_files import parse_json_object
from functional_llm.graph.types import JSON
from functional_llm.training.records import Record, RecordStream

Place: TypeAlias = tuple[int, int]  # bytes before it; lines, rows or objects before it

TEXT_BYTES = 1 << 18  # of a running text that are tokenised together
_TABLE_ROWS = 256  # of a table that are decoded together


class FileRecords(RecordStream):
    """The records of local files, one file after the other.

    Args:
        paths: `.jsonl`, `.json` (a list of objects, which is read whole; or JSON lines), `.csv`,
            `.parquet` or `.txt` files.
        name: What they are called in messages.
        text_bytes: About how much of a `.txt` file makes a record, which ends with a line; -1 for
            one record.

    Raises:
        ValueError: If a file has another ending, or there is one file, which is empty.
    """

    def __init__(
        self, paths: Sequence[str | Path], name: str | None = None, text_bytes: int = TEXT_BYTES
    ) -> None:
        self.paths = [Path(path) for path in paths]
        self.name = name or ", ".join(map(str, self.paths[:3]))
        self.text_bytes = text_bytes
        for path in self.paths:
            if path.suffix not in FORMATS:
                raise ValueError(
                    f"{path}: expected a dataset file ending in {', '.join(FORMATS)}, received "
                    f"{path.suffix or 'no ending'!r}. Rename or convert it."
                )
        if len(self.paths) == 1 and not self.paths[0].stat().st_size:
            raise ValueError(f"{self.paths[0]} is an empty file. Expected at least one example.")

    def read(self, state: JSON | None = None) -> Iterator[tuple[Record, JSON]]:
        state = state or {"file": 0, "place": (0, 0)}
        first, (offset, number) = state["file"], state["place"]
        for i, path in enumerate(self.paths[first:], first):
            for record, place in self._read_file(path, (offset, number)):
                yield record, {"file": i, "place": place}
            offset = number = 0

    def _read_file(self, path: Path, place: Place) -> Iterator[tuple[Record, Place]]:
        if path.suffix == ".txt":
            return _read_text(path, place, self.text_bytes)
        return _READERS[path.suffix](path, place)

    def describe(self) -> JSON:
        return {
            "files": [[str(path), path.stat().st_size] for path in self.paths],
            "text_bytes": self.text_bytes,
        }


def _read_lines(path: Path, place: Place) -> Iterator[tuple[Record, Place]]:
    offset, number = place
    with path.open("rb") as file:
        file.seek(offset)
        for raw in file:
            offset, number = offset + len(raw), number + 1
            where = f"{path}, line {number}"
            line = _decode(raw, where)
            if line.strip():
                advice = f"Received: {line.strip():.80} Expected one JSON object a line."
                fields = parse_json_object(line, where, advice=advice)
                yield Record(where, fields), (offset, number)


def _read_json(path: Path, place: Place) -> Iterator[tuple[Record, Place]]:
    with path.open("rb") as file:
        start = next((line for line in file if line.strip(b" \t\r\n\xef\xbb\xbf")), b"")
    if not start.strip(b" \t\r\n\xef\xbb\xbf").startswith(b"["):
        yield from _read_lines(path, place)  # many datasets are JSON lines in a `.json` file
        return
    try:
        items = json.loads(_decode(path.read_bytes(), str(path)))
    except ValueError as error:  # says line and column
        raise ValueError(f"{path} is no valid JSON: {error}.") from None
    for number, fields in enumerate(items[place[1] :], place[1] + 1):
        where = f"{path}, example {number}"
        if not isinstance(fields, dict):
            kind = type(fields).__name__
            raise ValueError(f"{where}: expected a JSON object, received {kind}.")
        yield Record(where, fields), (0, number)


def _read_text(path: Path, place: Place, text_bytes: int) -> Iterator[tuple[Record, Place]]:
    offset, number = place
    with path.open("rb") as file:
        file.seek(offset)
        while raw := b"".join(file.readlines(text_bytes)):
            offset += len(raw)
            text = _decode(raw, str(path) if number == 0 else f"{path}, part {number + 1}")
            number += 1
            if text.strip():
                fields: JSON = {"running_text": text}
                if number > 1:
                    fields["continues"] = True
                if file.peek(1):
                    fields["is_continued"] = True
                yield Record(str(path), fields), (offset, number)


class _Lines:
    """The lines of a file, and how far they were taken: a CSV entry may have several."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.offset, self.number = path, file, 0, 0

    def go_to(self, place: Place) -> None:
        self.offset, self.number = place
        self.file.seek(self.offset)

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        raw = self.file.readline()
        if not raw:
            raise StopIteration
        self.offset, self.number = self.offset + len(raw), self.number + 1
        return _decode(raw, f"{self.path}, line {self.number}")


def _read_csv(path: Path, place: Place) -> Iterator[tuple[Record, Place]]:
    """Reads cells as text: "4" is no number, and "None" may be an answer. An empty cell is none."""
    csv.field_size_limit(max(csv.field_size_limit(), 1 << 30))  # of the process; it has 128 kB
    with path.open("rb") as file:
        lines = _Lines(path, file)
        rows = csv.reader(lines, strict=True)
        try:
            columns = next((row for row in rows if row), [])
            if len(set(columns)) < len(columns):
                raise ValueError(f"{path}: expected columns of different names: {columns}.")
            if place[0]:
                lines.go_to(place)
            for cells in rows:
                if len(cells) > len(columns):
                    raise ValueError(
                        f"{path}, line {lines.number}: expected at most {len(columns)} cells, as "
                        f"the first line has, received {len(cells)}."
                    )
                fields = {key: x for key, x in zip(columns, cells, strict=False) if x}
                if cells:
                    where = f"{path}, line {lines.number}"
                    yield Record(where, fields), (lines.offset, lines.number)
        except csv.Error as error:
            raise ValueError(f"{path}, line {lines.number} is no valid CSV: {error}.") from None


def _read_parquet(path: Path, place: Place) -> Iterator[tuple[Record, Place]]:
    number = place[1]
    for row in _parquet_rows(path, number):
        number += 1
        fields = {key: x for key, x in row.items() if x is not None}
        yield Record(f"{path}, example {number}", fields), (0, number)


def _parquet_rows(path: Path, start: int) -> Iterator[JSON]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ImportError(
            f"Reading {path} needs pyarrow, which comes with the `datasets` library and is not "
            "installed. Install it: pip install datasets. JSON, CSV and text files need no library."
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if start < size:
                    for batch in file.iter_batches(_TABLE_ROWS, row_groups=[group]):
                        yield from batch.slice(start).to_pylist()
                        start = max(0, start - len(batch))
                else:
                    start -= size
    except Exception as error:  # the library raises errors of its own for each fault of a file
        raise ValueError(
            f"pyarrow could not load {path}. It raised {type(error).__name__}: {error} Expected a "
            "whole file in the format of its ending."
        ) from error


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is no valid UTF-8 (byte {error.start}). Convert the file to UTF-8."
        ) from None


_READERS: dict[str, Callable[[Path, Place], Iterator[tuple[Record, Place]]]] = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
FORMATS = (*_READERS, ".txt")
