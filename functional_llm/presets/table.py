"""The presets that come with the library: each alone, and all as a table that prints itself."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, ClassVar

from functional_llm.files.json_files import read_json

# Beside the package in a checkout; inside it once installed from a wheel.
_FOLDERS = [Path(__file__).parents[2] / "presets", Path(__file__).parent / "data"]


def preset_names() -> list[str]:
    """Returns the names of the presets that come with the library."""
    return sorted(path.stem for folder in _FOLDERS for path in folder.glob("*.json"))


def read_preset(name: str) -> dict[str, Any]:
    """Returns a preset: description, family, licence, number of parameters, source, config.

    Raises:
        ValueError: If there is none of that name; the message lists near names.
    """
    for folder in _FOLDERS:
        path = folder / f"{name}.json"
        if path.is_file():
            return read_json(path)
    near = difflib.get_close_matches(name, preset_names(), n=3, cutoff=0.3)
    raise ValueError(
        f"Unknown preset {name!r}. "
        + (f"Near names: {', '.join(near)}. " if near else "")
        + "functional_llm.list_presets() lists them all. A handle may also be a directory in "
        "Hugging Face layout, a .gguf or .keras file, or 'hf://org/name'."
    )


class Table:
    """Rows with named cells; prints as a table.

    Args:
        rows: Dicts.
    """

    columns: ClassVar[tuple[str, ...]]  # that are printed
    numbers: ClassVar[tuple[str, ...]] = ()  # columns that are aligned to the right
    long_columns: ClassVar[tuple[str, ...]] = ()  # that only a notebook has room for

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.rows = tuple(rows)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.rows[index]

    def cell(self, row: Mapping[str, Any], column: str) -> str:
        """Returns what is printed."""
        return str(row[column])

    def __str__(self) -> str:
        lines = [self.columns, *self._cells(self.columns)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        return "\n".join(self._align(line, widths).rstrip() for line in lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        columns = (*self.columns, *self.long_columns)
        head = "".join(f"<th>{column}</th>" for column in columns)
        lines = [f"<tr>{head}</tr>"]
        for cells in self._cells(columns):
            lines.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
        return "<table>\n" + "\n".join(lines) + "\n</table>"

    def _cells(self, columns: Sequence[str]) -> list[tuple[str, ...]]:
        return [tuple(self.cell(row, column) for column in columns) for row in self.rows]

    def _align(self, cells: tuple[str, ...], widths: list[int]) -> str:
        return "  ".join(
            cell.rjust(width) if column in self.numbers else cell.ljust(width)
            for column, cell, width in zip(self.columns, cells, widths, strict=True)
        )


class PresetTable(Table):
    """Presets, one a row; prints as a table.

    Args:
        rows: Dicts with the keys `name`, `family`, `parameters` (how many numbers the weights
            are), `context` (the longest sequence, in tokens), `licence`, `source` (where the files
            come from) and `description`.
    """

    columns = ("name", "family", "parameters", "context", "licence", "source")
    numbers = ("parameters", "context")
    long_columns = ("description",)

    def cell(self, row: Mapping[str, Any], column: str) -> str:
        """Returns what is printed."""
        return _rounded(row[column]) if column == "parameters" else super().cell(row, column)


def list_presets(family: str | None = None) -> PresetTable:
    """Returns the presets that come with the library, by series and size.

    ```python
    flm.list_presets()  # prints as a table
    [row["name"] for row in flm.list_presets("qwen3") if row["parameters"] < 2e9]
    ```

    Args:
        family: Only those of one family, as the column `family` names it.

    Raises:
        ValueError: If there is no preset of that family; the message lists the families.
    """
    rows = [_row(name) for name in preset_names()]
    families = sorted({row["family"] for row in rows})
    if family is not None and family not in families:
        raise ValueError(
            f"Expected a family that has presets, one of {', '.join(families)}; "
            f"received {family!r}."
        )
    chosen = [row for row in rows if family in (None, row["family"])]
    chosen.sort(key=lambda row: (row["name"].partition("_")[0], row["parameters"], row["name"]))
    return PresetTable(chosen)


def _row(name: str) -> dict[str, Any]:
    preset = read_preset(name)
    source = preset["source"]
    return {
        "name": name,
        "family": preset["family"],
        "parameters": preset["parameters"],
        "context": preset["config"]["max_sequence_length"],
        "licence": preset["licence"],
        "source": f"hf://{source['hub']}" if "hub" in source else source["wheel"],
        "description": preset["description"],
    }


def _rounded(count: int) -> str:
    """Three digits and a letter: 135M, 1.24B, 406B."""
    scale, letter = (1e9, "B") if count >= 999_500_000 else (1e6, "M")
    value = count / scale
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{letter}"
