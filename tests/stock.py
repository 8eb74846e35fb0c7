"""An interpreter with plain Keras and its backends, in which this library cannot be imported."""

import os
import subprocess
from pathlib import Path

import pytest

BACKENDS = ("jax", "torch", "tensorflow")
TESTS = Path(__file__).resolve().parent


def stock_python() -> str:
    """Returns its path: that of FLM_STOCK_PYTHON, or where `make test` has made one."""
    path = Path(os.environ.get("FLM_STOCK_PYTHON", TESTS.parent / ".venv-stock/bin/python"))
    if not path.exists() and "CI" not in os.environ:
        pytest.skip(f"no interpreter at {path}: `make .venv-stock/installed` makes one")
    return str(path)


def run_stock(backend: str, *arguments: str, folder: str | Path = "/") -> str:
    """Returns what a script prints there.

    Args:
        backend: What Keras shall use.
        *arguments: Of the interpreter.
        folder: Where to run it.
    """
    names = ("PATH", "HOME", "LANG", "TMPDIR")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment |= {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
    command = [stock_python(), *arguments]
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout
