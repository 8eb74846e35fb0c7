"""Every fault of mutations.py makes the property tests fail that are there for it.

Not in the default run, for each fault takes a process of its own: `make mutation`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mutations import CHUNKS, INFLUENCE, LOGITS, MUTATIONS, PACKED, RAGGED, TABLE

TESTS = Path(__file__).resolve().parent
pytestmark = pytest.mark.mutation


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_is_seen(name: str) -> None:
    mutation = MUTATIONS[name]
    tests = {LOGITS, CHUNKS, RAGGED, INFLUENCE, PACKED, TABLE, *mutation.caught_by}
    chosen = f"({mutation.config}) and ({' or '.join(sorted(tests))})"
    options = ["-p", "mutations", "-p", "no:cacheprovider", "-q", "-rfE", "-k", chosen]
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(TESTS / mutation.file)],
        env={**os.environ, "FLM_MUTATION": name, "PYTHONPATH": os.pathsep.join(paths)},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    failed = set(re.findall(r"^(?:FAILED|ERROR) \S+?::(\w+)", run.stdout, re.MULTILINE))
    print(f"{name} ({mutation.config}): {', '.join(sorted(failed)) or 'nothing failed'}")
    assert set(mutation.caught_by) <= failed, run.stdout[-3000:]
