"""Files and folders that are replaced when the new ones are complete."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields an empty file beside `path`, which takes its place when the block ends.

    If the block fails, the file at `path` stays as it was and nothing else is left.

    Args:
        path: The file to write. Its folder is made if it is missing.

    Raises:
        OSError: If the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(descriptor)
    part = Path(name)
    try:
        yield part
        _publish(part, path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def replaced(folder: Path, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Yields an empty folder beside; its files move into `folder` once all of them are written.

    Files of other names that are in `folder` already stay, but for those that match `stale`. If
    anything fails, nothing of the old is lost and nothing of the new is left.

    Args:
        folder: Where the files go.
        stale: Patterns of files that mean nothing beside the new ones.

    Raises:
        OSError: If there is a file at `folder`, or it cannot be written to.
    """
    if folder.exists() and not folder.is_dir():
        raise OSError(f"Expected a folder to write to. Received: {folder}, which is a file.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OSError(
            f"Expected a folder that can be written to. Received: {folder} ({error.strerror})."
        ) from error
    try:
        yield beside
        if not folder.exists():
            beside.chmod(0o777 & ~_umask())  # temporary folders are for this user only
            os.replace(beside, folder)
            return
        old = {path for pattern in stale for path in folder.glob(pattern)}
        for path in sorted(beside.iterdir()):
            os.replace(path, folder / path.name)
            old.discard(folder / path.name)
        for path in old:
            path.unlink()
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def share(path: Path) -> None:
    """Gives a file the permissions of any new file; temporary ones are for this user only."""
    path.chmod(0o666 & ~_umask())


def _publish(part: Path, path: Path) -> None:
    share(part)
    _sync(part)
    os.replace(part, path)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir():  # some network file systems sync no folders
            raise OSError(error.errno, f"{path} could not be written to the disk") from error
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
