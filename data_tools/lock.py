"""One writer a folder: a second run that would write the same output stops before it touches anything."""

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"


class FolderInUse(ValueError):
    """Another run writes this folder."""


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Holds the folder's lock; the folder must exist.

    The system gives the lock up when the process ends, however it ends. The file goes with the lock; one
    that a killed run left behind is taken over.

    Raises:
        FolderInUse: Another run holds it.
    """
    if fcntl is None:
        yield
        return
    path = folder / LOCK_NAME
    handle = _lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _lock(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(handle, 200, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(handle)
            raise FolderInUse(
                f"{path.parent}: is being written by {holder}; wait for it, or choose another --out"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                os.close(handle)
                raise
            warnings.warn(f"{path}: this file system has no locks; start no second run here", stacklevel=4)
            return handle
        if _is_same(path, handle):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return handle
        os.close(handle)  # the last holder has removed the file meanwhile: there is a new one, or none


def _is_same(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
