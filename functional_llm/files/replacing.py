"""Files and folders that are written beside, synced, and put in place when they are complete."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from functional_llm.files.processes import is_first


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields an empty file beside `path`, which takes its place when the block ends.

    If the block fails, the file at `path` stays as it was and nothing else is left. Of several
    processes the first one writes; what others write is thrown away.

    Args:
        path: The file to write. Its folder is made if it is missing.

    Raises:
        OSError: If the folder cannot be written to.
    """
    if not is_first():
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch, path.name)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        begin = f".{path.name}."
        descriptor, name = tempfile.mkstemp(prefix=begin, suffix=".part", dir=path.parent)
    except OSError as error:
        raise _not_writable(path.parent, error) from error
    os.close(descriptor)
    part = Path(name)
    try:
        yield part
        _publish(part, path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: Path, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Yields an empty folder beside; its files move into `folder` when the block ends.

    Other files that are in `folder` already stay, except those that match `stale`. If the block
    fails, nothing of the old is lost and nothing of the new is left. Of several processes the first
    one writes; what others write is thrown away.

    Args:
        folder: Where the files go. It is made if it is missing.
        stale: Patterns of files that mean nothing beside the new ones.

    Raises:
        OSError: If there is a file at `folder`, or it cannot be written to.
    """
    if not is_first():
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    if folder.exists() and not folder.is_dir():
        raise OSError(f"Expected a folder to write to. Received: {folder}, which is a file.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise _not_writable(folder, error) from error
    try:
        yield beside
        old = {path for pattern in stale for path in folder.glob(pattern)}
        files = sorted(beside.iterdir())
        for path in files:
            _sync(path)
        if not folder.exists():
            beside.chmod(0o777 & ~_umask())  # temporary folders are for this user only
            os.replace(beside, folder)
        else:
            for path in files:
                target = folder / path.name
                if target.is_dir():  # a folder takes the place of an empty one only
                    os.replace(target, beside / f"{path.name}.old")
                os.replace(path, target)
                old.discard(target)
            for path in old:
                path.unlink()
        _sync(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_writable(folder: Path, *sizes: int) -> None:
    """Checks that files can be written to a folder, which need not be there; leaves nothing.

    Args:
        folder: The folder.
        *sizes: Bytes of each file, if they are known.

    Raises:
        OSError: If they cannot: for lack of permission or of room.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        with ExitStack() as files:
            for size in sizes or (1 << 16,):
                file = files.enter_context(tempfile.TemporaryFile(dir=place))
                if hasattr(os, "posix_fallocate"):  # takes the room, and writes nothing
                    os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise _not_writable(folder, error, sizes) from error


def share(path: Path) -> None:
    """Gives a file the permissions of any new file; temporary ones are for this user only."""
    path.chmod(0o666 & ~_umask())


def _not_writable(folder: Path, error: OSError, sizes: Sequence[int] = ()) -> OSError:
    room = f", with room for {sum(sizes) / 1e6:.1f} MB" if sizes else ""
    return OSError(
        f"Expected a folder that can be written to{room}. Received: {folder} ({error.strerror})."
    )


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
