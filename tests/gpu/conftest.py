"""GPU tests are skipped, with the reason, where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deeplab_fast.testing import tf32

_FOLDER = Path(__file__).parent


def _missing() -> str:
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    return "no CUDA device is visible"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _missing()
    for item in items:
        # The hook of a folder sees the items of the whole session.
        if _FOLDER in item.path.parents:
            item.add_marker("gpu")
            if reason:
                item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))


@pytest.fixture(autouse=True)
def _exact_fp32() -> Iterator[None]:
    """References in fp32 are fp32: cuDNN otherwise rounds their operands to TF32."""
    with tf32(False):
        yield
