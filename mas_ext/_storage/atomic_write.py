"""Replacing a file atomically: a reader finds the old content or the new, at any time.

That holds if the writer is killed, or the power fails. The next writer removes what a killed one
leaves behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: what a killed writer leaves behind stays there
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".partial"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to, which replaces ``path`` when the block ends without an error.

    After an error ``path`` is as it was. If several write at a time, the last one wins.
    """
    target = Path(path).resolve()  # a link stays a link
    _remove_abandoned(target)
    temporary, file = _opened(target)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)  # while it is locked: an unlocked one could be removed
        _sync_folder(target.parent)
    except BaseException:
        _remove(temporary)
        raise


def remove(path: str | os.PathLike[str]) -> None:
    """Removes a file, if it is there, and what killed writers left behind."""
    target = Path(path).resolve()
    _remove(target)
    _remove_abandoned(target)


def _opened(target: Path) -> tuple[Path, BinaryIO]:
    """A new file beside ``target``, locked for as long as it is open."""
    while True:
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}{_SUFFIX}")
        file = open(temporary, "x+b")  # noqa: SIM115  (the caller closes it)
        if not _lock(file, wait=True) or os.fstat(file.fileno()).st_nlink:
            return temporary, file
        file.close()  # another writer removed it before it was locked


def _remove_abandoned(target: Path) -> None:
    """Removes files without a lock: a lock ends with its process, so their writers were killed."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{32}}{re.escape(_SUFFIX)}")
    with contextlib.suppress(OSError):  # a folder that cannot be listed can still be written to
        for entry in [entry for entry in os.scandir(target.parent) if name.fullmatch(entry.name)]:
            with contextlib.suppress(OSError), open(entry.path, "r+b") as file:
                if _lock(file, wait=False):
                    os.unlink(entry.path)


def _lock(file: BinaryIO, wait: bool) -> bool:
    """Whether the lock was taken. Not every file system has locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _sync_folder(folder: Path) -> None:
    """Makes the new name survive a power failure, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
