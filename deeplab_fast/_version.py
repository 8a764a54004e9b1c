"""The version: pyproject.toml is its single source."""

import re
from pathlib import Path


def _find() -> str:
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    # A checkout is asked before the metadata, which may belong to another installed copy.
    if pyproject.is_file():
        found = re.search(r'^version = "([^"]+)"', pyproject.read_text("utf-8"), re.MULTILINE)
        if found:
            return found.group(1)
    from importlib import metadata

    try:
        return metadata.version("deeplab_fast")
    except metadata.PackageNotFoundError:
        return "0+unknown"


__version__ = _find()
