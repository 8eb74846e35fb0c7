"""Files and folders that are replaced when the new ones are complete."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


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


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields a path beside; what is written there replaces `path` when the block ends.

    The new file is on the disk before it takes the old one's place, with the permissions of any new
    file. If anything fails, the old file stays as it was and nothing of the new one is left.

    Args:
        path: The file to replace, or to make.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        share(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def share(path: Path) -> None:
    """Gives a file the permissions of any new file; safetensors keeps all others from reading."""
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
