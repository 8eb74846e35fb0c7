"""Runs quick tests at the edges of the ranges in pyproject.toml, each in its own environment.

    python tests/edges.py python3.11 python3.12 python3.13

The newest versions are tried with every Python, the lowest with the first, and those that Colab has
(`colab_versions.txt`) with the last.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEPENDENCIES: list[str] = PROJECT["dependencies"]
COLAB = ["--requirement", str(TESTS / "colab_versions.txt")]
# None of them needs torch. The last are there or not: a pattern may match nothing.
FILES = (
    *("test_versions.py", "test_structure.py", "test_composite.py", "test_tokenizers.py"),
    *("test_gguf.py", "test_safetensors.py", "test_download.py"),
    *("test_cpu_rewriter.py", "test_cpu_rules.py", "test_*_private.py"),
)
SELECTION = ["-m", "not real and (nightly or not nightly)", "-k", "hub or not test_download"]
TOOLS = [
    tool
    for tool in PROJECT["optional-dependencies"]["dev"]
    if tool.startswith(("pytest", "hypothesis"))
]


def name_of(requirement: str) -> str:
    """Returns the name of a package, as pip compares it."""
    return re.split("[<>=]", requirement)[0].lower().replace("-", "_")


def lowest_versions() -> list[str]:
    """Returns the lower ends of the dependencies' ranges, as pins."""
    return [requirement.split(",")[0].replace(">=", "==") for requirement in DEPENDENCIES]


def version_of(python: str) -> str | None:
    """Returns the version of an interpreter, `None` if it does not run: pyenv's shims may not."""
    command = [python, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def try_edge(python: str, edge: str, environment: Path) -> str:
    """Installs and tests; returns a line on what came of it."""
    ours = environment / "bin" / "python"
    if not ours.exists():
        subprocess.run([python, "-m", "venv", str(environment)], check=True)
    options = []
    if edge == "lowest":
        pins = environment / "lowest.txt"
        pins.write_text("\n".join(lowest_versions()) + "\n", encoding="utf-8")
        options = ["--constraint", str(pins)]
    project = f"{REPOSITORY}[data,export]" if edge == "colab" else str(REPOSITORY)
    pip = [str(ours), "-m", "pip"]
    install = [*pip, "install", "--quiet", "--upgrade", "--upgrade-strategy", "eager"]
    install += [*(COLAB if edge == "colab" else options), *TOOLS, "--editable", project]
    if subprocess.run(install).returncode != 0:
        return "FAILED: pip found no versions that go together"
    files = [str(path) for pattern in FILES for path in sorted(TESTS.glob(pattern))]
    test = [str(ours), "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup"]
    test += ["--no-loadscope-reorder", *SELECTION, *files]
    passed = subprocess.run(test, cwd=REPOSITORY).returncode == 0
    freeze = subprocess.run([*pip, "freeze"], capture_output=True, text=True, check=True)
    wanted = {*map(name_of, DEPENDENCIES), "jaxlib", "protobuf"}
    installed = [line for line in freeze.stdout.splitlines() if name_of(line) in wanted]
    return f"{'passed' if passed else 'FAILED'}: {' '.join(installed)}"


def main() -> None:
    """Tries every edge, and says which failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="+", help="interpreters, the oldest first")
    parser.add_argument("--environments", type=Path, default=REPOSITORY / ".venv-versions")
    parser.add_argument("--edges", nargs="+", default=["lowest", "newest", "colab"])
    arguments = parser.parse_args()
    results = []
    found = []
    for python in arguments.pythons:
        version = version_of(python)
        if version is None:
            results.append(f"{python}: skipped, there is no such interpreter")
        else:
            found.append((python, version))
    tried = [("lowest", *found[0])] if found else []
    tried += [("newest", *one) for one in found]
    tried += [("colab", *found[-1])] if found else []
    for edge, python, version in tried:
        if edge in arguments.edges:
            name = f"{edge}-{version}"
            print(f"== {name}", flush=True)
            folder = arguments.environments.absolute() / name
            results.append(f"{name}: {try_edge(python, edge, folder)}")
    print("\n".join(results))
    if not found or any("FAILED" in result for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
