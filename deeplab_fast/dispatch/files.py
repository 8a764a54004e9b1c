"""Files that processes share: where a user's stand, and how one is written."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/deeplab_fast, or ~/.cache/deeplab_fast."""
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is invalid by the specification and to be ignored.
    base = Path(cache_home) if os.path.isabs(cache_home) else Path.home() / ".cache"
    return base / "deeplab_fast"


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
