"""Whatever holds a dataset -> a stream of records: files, the hub, other libraries, a function."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from glob import glob
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from functional_llm.graph.types import JSON
from functional_llm.training.record_files import FORMATS, TEXT_BYTES, FileRecords
from functional_llm.training.records import Record, RecordStream

_HUB = "hf://datasets/"
_HUB_PATH = re.compile(rf"{_HUB}([^/@]+(?:/[^/@]+)?)(?:@([^/]+))?/?(.*)")


def read_records(source: str | Path, split: str = "train") -> list[Record]:
    """Reads a dataset into memory.

    Args:
        source: Local `.jsonl`, `.json` (a list of objects), `.csv`, `.parquet` or `.txt` files (one
            running text): a path, or a pattern such as `data/*.jsonl`. Or what
            `datasets.load_dataset` takes, a hub name or a folder; or `hf://datasets/org/name`, with
            a file or a pattern after it if not all is wanted.
        split: The split of a dataset that is no file.

    Returns:
        A list with at least one record.

    Raises:
        ValueError: If a file is empty, malformed (the message names the line) or of an unknown
            format.
        FileNotFoundError: If the source is named like a file and does not exist.
        ImportError: If the `datasets` library is needed and missing.
    """
    records = list(_open(str(source), split, is_streamed=False))
    if not records:
        raise no_records(str(source))
    return records


def stream_records(source: Any, split: str = "train") -> RecordStream:
    """Returns the records of a dataset as a stream, of which no more than is read is in memory.

    Args:
        source: A path, a pattern or a name, as for `read_records`. Or an object: a
            `datasets.Dataset` or `IterableDataset`; a sequence; a function that returns an
            iterator; anything that can be iterated anew, such as a `tf.data.Dataset` or a loader of
            grain or torch. Their entries are mappings from columns to values, or texts. Or a
            RecordStream, which is returned as it is.
        split: The split of a dataset that is no file.

    Returns:
        A RecordStream. A training run that goes on reads files, sequences and a `datasets` stream
        from the place where it was; of the others it skips what it has had.

    Raises:
        ValueError: As for `read_records`; errors inside the data come when they are read. Or if
            the source can be iterated only once.
        FileNotFoundError: As for `read_records`.
        ImportError: As for `read_records`.
    """
    if isinstance(source, (str, Path)):
        return _open(str(source), split, is_streamed=True)
    return source if isinstance(source, RecordStream) else EntryRecords(source)


def no_records(name: str) -> ValueError:
    """Returns the error of a dataset that is empty."""
    return ValueError(f"{name} holds no example. Expected at least one.")


def _open(source: str, split: str, is_streamed: bool) -> RecordStream:
    text_bytes = TEXT_BYTES if is_streamed else -1
    if Path(source).is_file():
        return FileRecords([source], source, text_bytes)
    if source.startswith(_HUB):
        return _load_hub(source, split, is_streamed)
    if any(character in source for character in "*?["):
        paths = sorted(path for path in glob(source, recursive=True) if Path(path).is_file())
        if not paths:
            raise FileNotFoundError(f"Expected datasets at {source}: no file matches.")
        return FileRecords(paths, source, text_bytes)
    if Path(source).suffix in FORMATS:
        raise FileNotFoundError(f"Expected a dataset at {source}: there is no such file.")
    return _load(source, {"path": source}, split, is_streamed)


def _load_hub(source: str, split: str, is_streamed: bool) -> RecordStream:
    found = _HUB_PATH.fullmatch(source)
    if found is None:
        raise ValueError(
            "Expected hf://datasets/org/name, perhaps with @revision and a path after it, received "
            f"{source}."
        )
    names = ("path", "revision", "data_files")
    options = {key: x for key, x in zip(names, found.groups(), strict=True) if x}
    return _load(source, options, split, is_streamed)


def _load(source: str, options: JSON, split: str, is_streamed: bool) -> RecordStream:
    library = _import_datasets(source)
    try:
        dataset = library.load_dataset(**options, split=split, streaming=is_streamed)
    except Exception as error:  # the library raises errors of its own for each format and network
        raise _not_loaded(source, error) from error
    return EntryRecords(dataset, source)


def _import_datasets(source: str) -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"Reading {source} needs the `datasets` library, which is not installed. "
            "Install it: pip install datasets. JSON, CSV and text files need no library."
        ) from None
    return datasets


def _not_loaded(source: str, error: Exception) -> ValueError:
    cause = error.__cause__ or error
    return ValueError(
        f"The `datasets` library could not load {source}. It raised "
        f"{type(cause).__name__}: {cause} Expected a local file ({', '.join(FORMATS)}), or the "
        "name of a dataset on the hub that this machine can reach."
    )


class EntryRecords(RecordStream):
    """The entries of an object: a dataset of another library, a sequence, a function.

    Args:
        entries: As for `stream_records`.
        name: What it is called in messages.

    Raises:
        ValueError: If it can be iterated only once.
    """

    def __init__(self, entries: Any, name: str | None = None) -> None:
        self.entries = entries
        self.name = name or str(getattr(entries, "__qualname__", type(entries).__name__))
        if isinstance(entries, Iterator):
            raise ValueError(
                "Expected data that can be read from the beginning again, received a "
                f"{type(entries).__name__}, which is read once. Pass the function that makes it."
            )
        if isinstance(entries, Mapping):
            raise ValueError(
                f"Expected one split of a dataset, received a {type(entries).__name__} of "
                f"{list(entries)}. Pass one of them."
            )
        if not (callable(entries) or isinstance(entries, Iterable)):
            raise ValueError(
                f"Expected a path, a name, a function or something to iterate as data, received "
                f"{self.name}: {entries!r:.80}"
            )

    def read(self, state: JSON | None = None) -> Iterator[tuple[Record, JSON]]:
        state = state or {"number": 0}
        start, entries = state["number"], self.entries
        dataset = _with_own_state(entries)
        if dataset is not None:
            if "dataset" in state:
                dataset.load_state_dict(state["dataset"])
            for number, entry in enumerate(self._own_errors(dataset), start + 1):
                after = {"number": number, "dataset": dataset.state_dict()}
                yield self._record(number, entry), after
            return
        if hasattr(entries, "__len__") and hasattr(entries, "__getitem__"):
            found: Iterable[Any] = (entries[i] for i in range(start, len(entries)))
        else:
            found = islice(_iterate(entries), start, None)
        for number, entry in enumerate(self._own_errors(found), start + 1):
            yield self._record(number, entry), {"number": number}

    def _own_errors(self, entries: Iterable[Any]) -> Iterator[Any]:
        if not type(entries).__module__.startswith("datasets."):
            yield from entries
            return
        try:
            yield from entries
        except Exception as error:  # while it reads, as where it loads
            raise _not_loaded(self.name, error) from error

    def _record(self, number: int, entry: Any) -> Record:
        where = f"{self.name}, example {number}"
        value = _plain(entry)
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{where}: expected a mapping from columns to values, or a text. Received "
                f"{type(entry).__name__}: {entry!r:.80}"
            )
        return Record(where, {str(k): x for k, x in value.items() if x is not None})

    def describe(self) -> JSON:
        size = len(self.entries) if hasattr(self.entries, "__len__") else None
        return {"entries": self.name, "size": size}


def _iterate(entries: Any) -> Iterator[Any]:
    if hasattr(entries, "as_numpy_iterator"):  # of tf.data
        return iter(entries.as_numpy_iterator())
    return iter(entries() if callable(entries) else entries)


def _with_own_state(entries: Any) -> Any:
    """Returns a copy of a `datasets.IterableDataset`, if its state says where it is.

    Its `state_dict` leaves out what a shuffle buffer holds.
    """
    if not (type(entries).__module__.startswith("datasets.") and hasattr(entries, "state_dict")):
        return None
    parts = [entries._ex_iterable]
    while parts:
        part = parts.pop()
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return None
        parts += [part.ex_iterable] if hasattr(part, "ex_iterable") else []
        parts += getattr(part, "ex_iterables", ())
    return copy.deepcopy(entries)  # iterating changes it, and it may be read at two places at once


def _plain(value: Any) -> Any:
    """Returns text for bytes and lists for arrays, inside a mapping or list too."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:  # a picture, in a column that nobody reads
            return value
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value
