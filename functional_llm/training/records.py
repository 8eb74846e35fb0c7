"""Datasets -> records: the entries of a file or of a dataset on the hub."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from functional_llm.files.json_files import parse_json_object
from functional_llm.graph.types import JSON

if TYPE_CHECKING:
    import datasets

FORMATS = (".json", ".jsonl", ".csv", ".parquet", ".txt")


@dataclass(frozen=True)
class Record:
    """One entry of a dataset.

    Args:
        where: Its place, for messages: `"data.jsonl, line 3"`.
        fields: Column -> value.
    """

    where: str
    fields: JSON


def read_records(source: str | Path, split: str = "train") -> list[Record]:
    """Reads a dataset.

    Args:
        source: A local `.jsonl`, `.json` (a list of objects), `.csv`, `.parquet` or `.txt` file
            (one running text), or what `datasets.load_dataset` takes: a hub name, a folder.
        split: The split of a dataset that is no single file.

    Returns:
        A list with at least one record.

    Raises:
        ValueError: If the file is empty, malformed (the message names the line) or of an unknown
            format.
        FileNotFoundError: If the source is named like a file and does not exist.
        ImportError: If the `datasets` library is needed and missing.
    """
    path = Path(source)
    if not path.is_file():
        if path.suffix in FORMATS:
            raise FileNotFoundError(f"Expected a dataset at {path}: there is no such file.")
        records = _load(str(source), lambda library: library.load_dataset(str(source), split=split))
    else:
        if path.suffix not in FORMATS:
            raise ValueError(
                f"{path}: expected a dataset file ending in {', '.join(FORMATS)}, received "
                f"{path.suffix or 'no ending'!r}. Rename or convert it."
            )
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is an empty file. Expected at least one example.")
        records = _READERS[path.suffix](path)
    if not records:
        raise ValueError(f"{source} holds no example. Expected at least one.")
    return records


def _read_lines(path: Path) -> list[Record]:
    records = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}, line {number}"
            line = _decode(raw, where)
            if line.strip():
                advice = f"Received: {line.strip():.80} Expected one JSON object a line."
                records.append(Record(where, parse_json_object(line, where, advice=advice)))
    return records


def _read_json(path: Path) -> list[Record]:
    text = _decode(path.read_bytes(), str(path))
    if text.lstrip()[:1] != "[":
        return _read_lines(path)  # many datasets are JSON lines in a `.json` file
    try:
        items = json.loads(text)
    except ValueError as error:  # says line and column
        raise ValueError(f"{path} is no valid JSON: {error}.") from None
    records = []
    for number, fields in enumerate(items, 1):
        where = f"{path}, example {number}"
        if not isinstance(fields, dict):
            kind = type(fields).__name__
            raise ValueError(f"{where}: expected a JSON object, received {kind}.")
        records.append(Record(where, fields))
    return records


def _read_text(path: Path) -> list[Record]:
    text = _decode(path.read_bytes(), str(path))
    return [Record(str(path), {"running_text": text})] if text.strip() else []


def _read_table(path: Path) -> list[Record]:
    def load(library: ModuleType) -> "datasets.Dataset":
        options: JSON = {"data_files": [str(path)], "split": "train"}
        if path.suffix == ".csv":  # cells are text: "4" is no number, and "None" may be an answer
            with path.open(encoding="utf-8-sig", newline="") as file:
                columns = next(csv.reader(file))
            options["features"] = library.Features(dict.fromkeys(columns, library.Value("string")))
            options |= {"keep_default_na": False, "na_values": [""]}
        return library.load_dataset(path.suffix[1:], **options)

    return _load(str(path), load)


def _load(source: str, load: Callable[[ModuleType], "datasets.Dataset"]) -> list[Record]:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"Reading {source} needs the `datasets` library, which is not installed. "
            "Install it: pip install datasets. JSON and text files need no library."
        ) from None
    try:
        dataset = load(datasets)
    # The library raises errors of its own for each format and network.
    except Exception as error:
        cause = error.__cause__ or error
        raise ValueError(
            f"The `datasets` library could not load {source}. It raised "
            f"{type(cause).__name__}: {cause} Expected a local file ({', '.join(FORMATS)}), or the "
            "name of a dataset on the hub that this machine can reach."
        ) from error
    return [
        Record(f"{source}, example {i}", {k: v for k, v in row.items() if v is not None})
        for i, row in enumerate(dataset, 1)
    ]


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is no valid UTF-8 (byte {error.start}). Convert the file to UTF-8."
        ) from None


_READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".txt": _read_text,
    ".csv": _read_table,
    ".parquet": _read_table,
}
