"""Imports go downwards, importing is light, and the package raises instead of asserting."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "functional_llm"
SOURCE = Path(__file__).resolve().parents[1] / PACKAGE

# The rooms of the package, from the bottom up. What a room may import, its `__init__` says.
ROOMS = (
    "files",
    "graph",
    "xla",
    "tokenizers",
    "kernels",
    "layers",
    "blocks",
    "backbones",
    "formats",
    "stock",
    "edits",
    "peft",
    "generation",
    "training",
    "presets",
    "sharding",
    "evaluation",
    "commands",
)
ON_TOP = ("", "__main__", "names")  # offer what all rooms have


def read_modules(source: Path) -> dict[str, ast.Module]:
    """Returns the syntax tree of every module, keyed by its dotted name below the package."""
    trees = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


def absolute(node: ast.ImportFrom, module: str, folders: set[str]) -> str:
    """Returns the dotted name that `from x import ...` names, relative ones resolved."""
    if node.level == 0:
        return node.module or ""
    here = [PACKAGE, *module.split(".")] if module else [PACKAGE]
    up = node.level - (module in folders)  # a package's first dot is itself
    return ".".join([*here[: len(here) - up], *([node.module] if node.module else [])])


def named_imports(tree: ast.Module, module: str, names: set[str]) -> Iterator[str]:
    """Yields every dotted name that is imported anywhere in the file, in functions too."""
    folders = {"", *(name.rpartition(".")[0] for name in names)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, module, folders)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                is_module = inner.removeprefix(f"{PACKAGE}.") in names
                yield inner if base.partition(".")[0] == PACKAGE and is_module else base
        elif isinstance(node, ast.Call) and node.args:
            function, first = node.func, node.args[0]
            called = function.attr if isinstance(function, ast.Attribute) else ""
            called = function.id if isinstance(function, ast.Name) else called
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield str(first.value)


def internal_imports(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Returns the modules of the package that each module imports."""
    edges: dict[str, set[str]] = {}
    for module, tree in trees.items():
        targets = {
            name.removeprefix(PACKAGE).removeprefix(".")
            for name in named_imports(tree, module, set(trees))
            if name.partition(".")[0] == PACKAGE
        }
        edges[module] = targets - {module}
    return edges


def allowed_imports(room: str, docstring: str) -> set[str]:
    """Returns the rooms that a room's docstring names as those it may import."""
    (text,) = re.findall(r"^May import: (.*?)\.$", docstring, re.M | re.S)
    text = " ".join(text.split())
    if text == "no other room":
        return set()
    if text == "every room above":
        return set(ROOMS[: ROOMS.index(room)])
    return set(text.split(", "))


def read_allowed(source: Path) -> dict[str, set[str]]:
    """Returns room -> the rooms it may import."""
    docstrings = {
        room: ast.get_docstring(ast.parse((source / room / "__init__.py").read_text("utf-8"))) or ""
        for room in ROOMS
    }
    return {room: allowed_imports(room, text) for room, text in docstrings.items()}


def find_violations(trees: dict[str, ast.Module], allowed: dict[str, set[str]]) -> list[str]:
    """Returns a line for every import that a room may not make."""
    lines = []
    for module, targets in internal_imports(trees).items():
        room = module.partition(".")[0]
        if room in ON_TOP:
            continue
        if room not in allowed:
            lines.append(f"{PACKAGE}.{module}: expected a module in one of the rooms {ROOMS}")
            continue
        for target in sorted(targets):
            other = target.partition(".")[0]
            if other != room and other not in allowed[room]:
                lines.append(
                    f"{PACKAGE}.{module} imports {PACKAGE}.{target}: expected only "
                    f"{sorted(allowed[room])}, as {room}/__init__.py says"
                )
    return lines


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    """Returns a path that comes back to where it began, or nothing."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(edges.get(module, ())):
            cycle = visit(target, [*path, module])
            if cycle:
                return cycle
        done.add(module)
        return []

    return next((cycle for cycle in (visit(module, []) for module in edges) if cycle), [])


def test_rooms_are_all_there_and_few() -> None:
    entries = {path.name for path in SOURCE.iterdir() if path.name != "__pycache__"}
    assert entries == {*ROOMS, "__init__.py", "__main__.py", "names.py", "py.typed"}
    assert len(ROOMS) <= 18


def test_rooms_may_only_import_rooms_above_them() -> None:
    for room, allowed in read_allowed(SOURCE).items():
        assert allowed <= set(ROOMS[: ROOMS.index(room)]), room


def test_imports_are_those_that_rooms_allow() -> None:
    violations = find_violations(read_modules(SOURCE), read_allowed(SOURCE))
    assert "\n".join(violations) == ""


def test_rooms_name_no_import_that_nobody_needs() -> None:
    used: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module, targets in internal_imports(read_modules(SOURCE)).items():
        room = module.partition(".")[0]
        if room not in ON_TOP:
            used[room] |= {target.partition(".")[0] for target in targets} - {room}
    allowed = read_allowed(SOURCE)
    del allowed["presets"], allowed["commands"]  # say "every room above"
    assert allowed == {room: used[room] for room in allowed}


def test_the_readme_shows_the_rooms_in_their_order() -> None:
    text = (SOURCE.parent / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^  (\w+)/ +\S", text[text.index("functional_llm/\n") :], re.M)
    assert tuple(shown) == ROOMS


def test_engines_of_formats_name_no_family() -> None:
    edges = internal_imports(read_modules(SOURCE))
    named = {
        (module, target)
        for module, targets in edges.items()
        if module.partition(".")[0] == "formats"
        for target in targets
        if target.startswith("backbones")
    }
    values = {
        f"backbones.{name}" for name in ("family", "keras_hub.column", "transforms", "wrapper")
    }
    assert {target for _, target in named} == values


def test_imports_have_no_cycle() -> None:
    assert find_cycle(internal_imports(read_modules(SOURCE))) == []


@pytest.mark.parametrize(
    ("module", "code", "expected"),
    [
        (
            "layers.a",
            "def f():\n    import functional_llm.blocks.norm",
            "blocks.norm: expected",
        ),
        ("layers.a", "from functional_llm import presets", "functional_llm.presets: expected only"),
        ("layers.a", "import functional_llm", "functional_llm.: expected only []"),
        ("blocks.mlp", "from ..generation import x", "functional_llm.generation: expected only"),
        ("blocks.mlp", "if TYPE_CHECKING:\n    from .. import files", "functional_llm.files"),
        (
            "formats.table",
            "importlib.import_module('functional_llm.generation.text')",
            "generation.text: expected only ['graph']",
        ),
        ("formats.table", "from functional_llm.graph import x", ""),
        (
            "sampling",
            "import jax",
            "functional_llm.sampling: expected a module in",
        ),
        ("blocks.mlp", "from . import norm\nfrom .norm import x\nfrom ..layers import y", ""),
        ("", "from functional_llm.presets.backbone import x\nfrom . import samplers", ""),
    ],
)
def test_the_test_sees(module: str, code: str, expected: str) -> None:
    allowed: dict[str, set[str]] = {room: set() for room in ROOMS}
    allowed |= {"blocks": {"layers"}, "formats": {"graph"}}
    names = ["", *ROOMS, "blocks.norm", "backbones.llama", "formats.table"]
    trees = {name: ast.parse("") for name in names} | {module: ast.parse(code)}
    found = find_violations(trees, allowed)
    assert bool(found) == bool(expected)
    assert expected in "\n".join(found)


def test_the_test_reads_what_rooms_allow() -> None:
    assert allowed_imports("layers", "X.\n\nMay import: no other room.\n\nOffers: x.") == set()
    assert allowed_imports("xla", "X.\n\nMay import: every room above.") == {"files", "graph"}
    assert allowed_imports("blocks", "May import: graph,\nlayers.\n") == {"graph", "layers"}


def test_the_test_sees_cycles() -> None:
    codes = {"blocks.a": "from . import b", "blocks.b": "def f():\n    from .a import x"}
    edges = internal_imports({name: ast.parse(code) for name, code in codes.items()})
    assert find_cycle(edges) == ["blocks.a", "blocks.b", "blocks.a"]


def test_the_package_does_not_assert() -> None:
    found = [
        f"{PACKAGE}.{module}:{node.lineno}"
        for module, tree in read_modules(SOURCE).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def test_importing_is_light() -> None:
    heavy = ("tensorflow", "torch", "transformers", "keras_hub", "datasets")
    code = (
        f"import sys, {PACKAGE}; "
        f"print(*[name for name in {heavy!r} if name in sys.modules], sep=',')"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    environment.pop("KERAS_BACKEND", None)  # JAX is the default
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
