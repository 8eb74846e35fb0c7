"""An interpreter with plain Keras and its backends, in which this library cannot be imported."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from quick import ENVIRONMENT, KEPT

BACKENDS = ("jax", "torch", "tensorflow")
TESTS = Path(__file__).resolve().parent


def stock_python() -> str:
    """Returns its path: that of FLM_STOCK_PYTHON, or where `make test` has made one."""
    path = Path(os.environ.get("FLM_STOCK_PYTHON", TESTS.parent / ".venv-stock/bin/python"))
    if not path.exists() and "CI" not in os.environ:
        pytest.skip(f"no interpreter at {path}: `make .venv-stock/installed` makes one")
    return str(path)


def _environment(backend: str) -> dict[str, str]:
    names = ["PATH", "HOME", "LANG", "TMPDIR", *map(str.upper, KEPT)]
    environment = {name: os.environ[name] for name in names if name in os.environ}
    own = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
    return environment | ENVIRONMENT | own


def run_stock(backend: str, *arguments: str, folder: str | Path = "/") -> str:
    """Returns what a script prints there.

    Args:
        backend: What Keras shall use.
        *arguments: Of the interpreter.
        folder: Where to run it.
    """
    command = [stock_python(), *arguments]
    run = subprocess.run(
        command, env=_environment(backend), cwd=folder, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


class StockKeras:
    """A process there that measures stock files, one after the other (stock_check.py).

    Args:
        backend: What Keras uses.
        log: File for what the process writes to stderr.
    """

    def __init__(self, backend: str, log: Path) -> None:
        self._log = log
        self._found: dict[str, dict[str, Any]] = {}
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [stock_python(), str(TESTS / "stock_check.py")],
                env=_environment(backend),
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def result(self, path: Path) -> dict[str, Any]:
        """Returns what `stock_check.check` finds out about a file, at the first call."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if str(path) not in self._found:
            print(path, file=self._process.stdin, flush=True)
        while str(path) not in self._found:
            line = self._process.stdout.readline()
            assert line, self._log.read_text()[-3000:]
            if line.startswith("{"):
                self._found |= json.loads(line)
        found = self._found[str(path)]
        assert "error" not in found, found["error"]
        return found

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
