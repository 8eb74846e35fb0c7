"""Imports go downwards, importing is light, and the package raises instead of asserting."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "functional_llm"
SOURCE = Path(__file__).resolve().parents[1] / PACKAGE

# A module imports only lower ranks. A folder's rank holds for every module in it.
RANKS = {
    "family": 0,
    "structure": 0,
    "composite": 0,
    "layers": 0,
    "row_products": 0,
    "turned": 0,
    "products": 1,
    "sampling_math": 0,
    "samplers": 0,
    "tokenizers": 0,
    "selecting": 1,
    "freezing": 1,
    "rewiring": 1,
    "capturing": 1,
    "drawing": 1,
    "comparing": 1,
    "quantizing": 3,
    "fusing": 3,
    "cache": 1,
    "inputs": 2,
    "blocks": 1,
    "export": 2,
    "backbones": 2,
    "convert": 2,
    "peft": 3,
    "handles": 3,
    "generate": 3,
    "decoding": 3,
    "writing": 3,
    "training": 3,
    "preset_table": 4,
    "checkpoint": 4,
    "presets": 4,
    "": 9,  # functional_llm/__init__.py
}

# Modules of one rank may import each other inside one folder, or inside one of these families.
FAMILIES = {
    "structure": "composite",
    "sampling_math": "samplers",
    "decoding": "generate",
    "writing": "generate",
    "selecting": "rewiring",
    "freezing": "rewiring",
    "capturing": "rewiring",
    "drawing": "rewiring",
    "comparing": "rewiring",
    "checkpoint": "presets",
}


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


def find_violations(trees: dict[str, ast.Module]) -> list[str]:
    """Returns a line for every module without a rank and every import that does not go down."""
    lines = []
    for module, targets in internal_imports(trees).items():
        top = module.partition(".")[0]
        if top not in RANKS:
            lines.append(f"{PACKAGE}.{module} has no rank: give '{top}' one in {__file__}")
            continue
        for target in sorted(targets):
            other = target.partition(".")[0]
            if other not in RANKS:
                lines.append(f"{PACKAGE}.{module} imports {PACKAGE}.{target}, which has no rank")
                continue
            is_near = FAMILIES.get(top, top) == FAMILIES.get(other, other)
            if RANKS[other] < RANKS[top] or (RANKS[other] == RANKS[top] and is_near):
                continue
            lines.append(
                f"{PACKAGE}.{module} [{RANKS[top]}] imports {PACKAGE}.{target} [{RANKS[other]}]: "
                "expected a lower rank, or the same inside one folder"
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


def test_imports_go_downwards() -> None:
    assert "\n".join(find_violations(read_modules(SOURCE))) == ""


def test_imports_have_no_cycle() -> None:
    assert find_cycle(internal_imports(read_modules(SOURCE))) == []


def test_families_name_ranked_modules() -> None:
    assert set(FAMILIES) | set(FAMILIES.values()) <= set(RANKS)


@pytest.mark.parametrize(
    ("module", "code", "expected"),
    [
        ("layers", "def f():\n    import functional_llm.cache", "[0] imports"),
        ("layers", "from functional_llm import presets", "functional_llm.presets [4]"),
        ("layers", "import functional_llm", "functional_llm. [9]"),
        ("layers", "from functional_llm import composite", "or the same inside one folder"),
        ("blocks.mlp", "from ..generate import x", "functional_llm.generate [3]"),
        ("blocks.mlp", "if TYPE_CHECKING:\n    from .. import cache", "functional_llm.cache [1]"),
        ("convert.table", "importlib.import_module('functional_llm.generate')", "generate [3]"),
        ("convert.table", "from functional_llm.backbones.llama import x", "backbones.llama [2]"),
        ("sampling", "import jax", "functional_llm.sampling has no rank: give 'sampling' one"),
        ("blocks.mlp", "from . import norm\nfrom .norm import x\nfrom ..layers import y", ""),
        ("samplers", "from functional_llm.sampling_math import x", ""),
        ("samplers", "from functional_llm.tokenizers import x", "or the same inside one folder"),
        ("tokenizers.text", "from functional_llm.tokenizers import stream", ""),
        ("", "from functional_llm.presets import x\nfrom . import samplers", ""),
    ],
)
def test_the_test_sees(module: str, code: str, expected: str) -> None:
    names = ["", *RANKS, "tokenizers.stream", "blocks.norm", "backbones.llama", "convert.table"]
    trees = {name: ast.parse("") for name in names} | {module: ast.parse(code)}
    found = find_violations(trees)
    assert bool(found) == bool(expected)
    assert expected in "\n".join(found)


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
