"""Where the repository is, and files that are written whole or not at all."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside another, in whose place it comes at the end; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Put a text in place of a file."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def scratch() -> Path:
    """A folder for files that providers make, removed with the process that first asked for it.

    Its children share it: DEEPLAB_FAST_BENCH_SCRATCH names it to them.
    """
    name = "DEEPLAB_FAST_BENCH_SCRATCH"
    if name not in os.environ:
        os.environ[name] = tempfile.mkdtemp(prefix="deeplab_fast_bench_")
        atexit.register(shutil.rmtree, os.environ[name], ignore_errors=True)
    return Path(os.environ[name])
