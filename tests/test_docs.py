"""The documents show code that is there."""

import ast
import re
from pathlib import Path

import pytest

import functional_llm as flm

REPOSITORY = Path(__file__).resolve().parents[1]
ADDING = REPOSITORY / "docs" / "adding_a_family.md"
README = REPOSITORY / "README.md"

# A block is opened by its language and the file that it is taken from.
BLOCKS = re.findall(
    r"^```(\w+)( \S+)?\n(.*?)^```$", ADDING.read_text(encoding="utf-8"), re.M | re.S
)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _missing_pieces(block: str, source: str) -> list[str]:
    """Returns what of a block, cut at lines of three dots, the source lacks in that order."""
    at, missing = 0, []
    for piece in re.split(r"^\s*\.\.\.\n", block, flags=re.M):
        found = _squeezed(source).find(_squeezed(piece), at)
        at = found + len(_squeezed(piece))
        if found < 0:
            missing.append(piece)
            at = 0
    return missing


@pytest.mark.parametrize(("language", "file", "block"), BLOCKS)
def test_blocks_occur_in_the_files_they_name(language: str, file: str, block: str) -> None:
    source = (REPOSITORY / file.strip()).read_text(encoding="utf-8")
    assert _missing_pieces(block, source) == []


def test_the_document_has_blocks_and_the_test_sees() -> None:
    assert len(BLOCKS) >= 6
    source = "a = 1\nb = 2\nc = 3\n"
    assert _missing_pieces("a = 1\n...\nc = 3\n", source) == []
    assert _missing_pieces("c = 3\n...\na = 1\n", source) == ["a = 1\n"]
    assert _missing_pieces("b = 3\n", source) == ["b = 3\n"]


def test_the_document_names_every_property_test() -> None:
    tree = ast.parse((REPOSITORY / "tests" / "test_properties.py").read_text(encoding="utf-8"))
    tests = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    tests = {name for name in tests if name.startswith("test_")}
    named = re.findall(r"^\| `(test_\w+)`", ADDING.read_text(encoding="utf-8"), re.M)
    assert sorted(named) == sorted(tests)


PAGES = [README, *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "notebooks").glob("*.ipynb")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_jax_is_chosen_before_keras_is_imported(path: Path) -> None:
    """Keras takes TensorFlow unless it is told otherwise, as in Colab, which has it."""
    text = path.read_text(encoding="utf-8")
    keras = re.search(r"^[\s\"]*(import|from) keras\b", text, re.M)
    chosen = re.search(r"^[\s\"]*(import functional_llm|.*KERAS_BACKEND)", text, re.M)
    assert keras is None or (chosen is not None and chosen.start() < keras.start())


@pytest.mark.parametrize("path", [ADDING, README], ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert local and [target for target in local if not (path.parent / target).exists()] == []


def test_the_readme_has_every_family() -> None:
    table = flm.list_families().to_markdown()
    assert table in README.read_text(encoding="utf-8"), f"expected in README.md:\n\n{table}"


def test_presets_in_the_readme_exist() -> None:
    text = README.read_text(encoding="utf-8")
    handles = re.findall(r'from_preset\("([^"/]+)"', text)
    assert handles and set(handles) <= set(flm.preset_names())
    families = re.findall(r'list_presets\("(\w+)"', text)
    assert families and set(families) <= {row["family"] for row in flm.list_presets()}
