"""Tests in Triton's interpreter, in a process of their own.

Triton reads TRITON_INTERPRET when a kernel is decorated, so one process either interprets its
kernels or compiles them. `make test-interpret` sets the variable.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
TRUE = ("1", "true", "on", "y", "yes")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    if os.environ.get("TRITON_INTERPRET", "").lower() in TRUE:
        return
    if len(mine) == len(items) and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
        return
    reason = "needs a process of its own: TRITON_INTERPRET=1 pytest tests/interpret"
    for item in mine:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _quiet_numpy():
    """The interpreter computes with numpy, which warns where a GPU gives inf or NaN."""
    with np.errstate(all="ignore"):
        yield
