"""Files that processes share: where a user's stand, and how one is written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/deeplab_fast, or ~/.cache/deeplab_fast."""
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is invalid by the specification and to be ignored.
    base = Path(cache_home) if os.path.isabs(cache_home) else Path.home() / ".cache"
    return base / "deeplab_fast"


def is_full(error: OSError) -> bool:
    """Whether a file could not be written for want of room: on the disk, in a quota, by a limit."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(
    files: Sequence[tuple[Path, Callable[[BinaryIO], object]]], *, durable: bool = False
) -> None:
    """Writes files under temporary names beside their own, then renames them in order.

    Args:
        files: pairs of path and a function that writes the content to a binary file.
        durable: content and name are on the disk when it returns, so that a power cut leaves the
            new file or the former one.

    Raises:
        OSError: whatever writing raised; the temporary files are gone, no path is half-written.
    """
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path, _ in files]
    try:
        # Open, and so locked, until they have their names.
        with ExitStack() as opened:
            for name, (_, write) in zip(temporary, files, strict=True):
                file = opened.enter_context(open(name, "w+b"))
                # Some file systems have no locks.
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                write(file)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            for name, (path, _) in zip(temporary, files, strict=True):
                os.replace(name, path)
        for folder in {path.parent for path, _ in files} if durable else ():
            sync_folder(folder)
    finally:
        for name in temporary:
            with suppress(OSError):
                name.unlink()


def remove_left(folder: Path, before: float) -> int:
    """Removes temporary files of :func:`write_atomically` whose process was killed.

    One stays whose process runs on this machine, that somebody has locked (on a shared disk another
    machine's process, where the file system tells), or that was written to after ``before``.

    Args:
        folder: in which they lie, not below it.
        before: seconds since the epoch, of the file system's clock.

    Returns:
        Their bytes.
    """
    bytes_ = 0
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = _TEMPORARY.fullmatch(entry.name)
            with suppress(OSError, ValueError):
                if found is None or not entry.is_file(follow_symlinks=False):
                    continue
                pid, state = int(found[1]), entry.stat(follow_symlinks=False)
                if state.st_mtime >= before or (pid != os.getpid() and _runs(pid)):
                    continue
                with open(entry.path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)
                bytes_ += state.st_size
    return bytes_


_TEMPORARY = re.compile(r"\..+\.(\d{1,10})\.tmp")


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    # Another user's.
    except PermissionError:
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, where its file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, content: object) -> None:
    """Put JSON in place of a file, under a temporary name first; the folder is made.

    Raises:
        OSError: it cannot be written.
        ValueError: content has a value that JSON does not have.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's are for their owner alone; those of a shared cache are for all that may read it.
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)
