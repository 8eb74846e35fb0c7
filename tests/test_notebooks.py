"""The notebooks run from top to bottom, with a tiny model; by night with the one that they name.

What they hold is what the named model gave: texts and pictures are kept (`make notebooks`).
"""

import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from tiny import save_tiny

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
HANDLE = '"smollm2_135m_instruct"'


def _read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def _code(notebook: Any) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def _run(notebook: Any, folder: Path) -> Any:
    client = nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


@pytest.mark.parametrize(
    "path",
    [pytest.param(x, marks=() if x == NOTEBOOKS[0] else pytest.mark.nightly) for x in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody has chosen JAX yet; each cell twice, as people do."""
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    notebook = _read(path)
    folder = save_tiny(tmp_path / "tiny", config="llama_multi_head_tied")
    (cell,) = [cell for cell in notebook.cells if f"handle = {HANDLE}" in cell.source]
    cell.source = cell.source.replace(HANDLE, repr(str(folder)))
    twins = [nbformat.v4.new_code_cell(source) for source in _code(notebook)]
    notebook.cells = [x for x in notebook.cells if x.cell_type == "code"]
    notebook.cells = [x for pair in zip(notebook.cells, twins, strict=True) for x in pair]
    executed = _run(notebook, tmp_path)
    assert all(cell.get("execution_count") for cell in executed.cells if cell.cell_type == "code")


@pytest.mark.real
@pytest.mark.nightly
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_say_what_they_hold(path: Path, smollm2_gguf: Path, tmp_path: Path) -> None:
    """Texts are compared; what a run measures may differ."""
    kept, executed = _read(path), _run(_read(path), tmp_path)
    for old, new in zip(kept.cells, executed.cells, strict=True):
        for was, now in zip(old.get("outputs", []), new.get("outputs", []), strict=False):
            if was.output_type == "execute_result" and was.data["text/plain"].startswith("'"):
                assert now.data["text/plain"] == was.data["text/plain"], old.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept(path: Path) -> None:
    """In order, without errors; with pictures, but small enough for a page."""
    notebook = _read(path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [x for x in outputs if x.output_type == "error" or x.get("name") == "stderr"]
    assert path.stat().st_size < 2_000_000
    assert "/work/" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "limits"), [("LoRADense", (18, 7, 10)), ("SVFDense", (17, 7, 12))]
)
def test_from_scratch_is_short(name: str, limits: tuple[int, ...]) -> None:
    """Lines of the layer, of the patch and of the way back, as in the discussion of the idea."""
    (path,) = [path for path in NOTEBOOKS if path.stem == "lora_and_svf"]
    code = _code(_read(path))
    begin = next(i for i, cell in enumerate(code) if f"class {name}" in cell)
    patch = next(cell for cell in code[begin:] if cell.startswith("def patch"))
    fold = next(cell for cell in code[begin:] if cell.startswith("def fold"))
    assert "flm." in patch and "flm." in fold
    for cell, limit in zip((code[begin], patch, fold), limits, strict=True):
        assert len([line for line in re.split(r"\n", cell) if line.strip()]) <= limit
