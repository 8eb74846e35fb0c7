"""Memory between training steps: what the process has had once, it keeps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from functional_llm.training import keep_memory
if "keep" in sys.argv:
    assert keep_memory()
square = jax.jit(lambda x: ((x @ x.T) @ x).sum())  # with a temporary of 64 MB
x = jnp.ones((4096, 32), "float32")
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    square(x).block_until_ready()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _page_faults(repository: Path, *arguments: str, **variables: str) -> int:
    """Returns those of the last run."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment |= {"PYTHONPATH": str(repository), **variables}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(output.stdout.split()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's mallopt")
def test_a_step_takes_no_new_pages(repository: Path) -> None:
    assert _page_faults(repository) > 10_000
    assert _page_faults(repository, "keep") < 1_000


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    from functional_llm.training import keep_memory

    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert not keep_memory()
