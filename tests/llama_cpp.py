"""Parts of source distributions: llama.cpp's models and converter to GGUF; a dataset."""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from functional_llm.formats.download import cache_directory

# Of a source distribution pip asks its build system for metadata, which takes seconds and compiles
# nothing; what that build system needs may come as wheels.


def fetch_llama_cpp() -> Path:
    """Returns a folder with llama.cpp's vocabularies, conformance files, chat templates, converter.

    Raises:
        ConnectionError: If pip cannot download the package.
        ValueError: If it is another file than these tests were made for.
    """
    return _fetch(
        "llama-cpp-python==0.3.36",
        "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
        "llama_cpp_python-0.3.36/vendor/llama.cpp/",
        ("models/", "conversion/", "gguf-py/", "tests/test-chat-template.cpp"),
        "llama.cpp-and-test",
    )


def fetch_identity() -> Path:
    """Returns LLaMA-Factory's `identity.json` (Apache-2.0); raises as `fetch_llama_cpp`."""
    folder = _fetch(
        "llamafactory==0.9.5",
        "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        "llamafactory-0.9.5/data/",
        ("identity.json",),
        "llamafactory",
    )
    return folder / "identity.json"


def _fetch(requirement: str, sha256: str, root: str, parts: Sequence[str], label: str) -> Path:
    """Returns a folder in the cache with these parts; it gets its name when all of it is there."""
    cache = cache_directory()
    target = cache / f"{label}-{sha256[:16]}"
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(prefix=f"{label}-", dir=cache) as name:
        folder = Path(name)
        archive = _pip_download(requirement, folder)
        with archive.open("rb") as file:
            received = hashlib.file_digest(file, "sha256").hexdigest()
        if received != sha256:
            raise ValueError(f"Expected {archive.name} with sha256 {sha256}. Received: {received}.")
        with tarfile.open(archive) as tar:
            wanted = tuple(root + part for part in parts)
            members = [member for member in tar if member.name.startswith(wanted)]
            tar.extractall(folder, members, filter="data")
        try:
            os.rename(folder / root, target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
    return target


def _pip_download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    package = requirement.partition("==")[0]
    command += [f"--no-binary={package}", "-d", str(folder), requirement]
    result = subprocess.run(
        command, env={**os.environ, "TMPDIR": str(folder)}, text=True, capture_output=True
    )
    archives = list(folder.glob("*.tar.gz"))
    if result.returncode != 0 or len(archives) != 1:
        raise ConnectionError(f"pip downloaded {len(archives)} archives: {result.stderr[-1000:]}")
    return archives[0]
