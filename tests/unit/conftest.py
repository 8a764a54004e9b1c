"""Fixtures that run a test with every implementation there is on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import deeplab_fast as dlf
from deeplab_fast import _ext
from deeplab_fast.testing import cpu_instruction_sets

OPS = torch.ops.deeplab_fast


@pytest.fixture(params=["reference", *cpu_instruction_sets()])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with the reference and with the C++ code of every instruction set."""
    if request.param == "reference":
        with dlf.use_backend("reference"):
            yield request.param
        return
    before = OPS._cpu_instruction_set("")
    OPS._cpu_instruction_set(request.param)
    with dlf.use_backend("cpu"):
        yield request.param
    OPS._cpu_instruction_set(before)


@pytest.fixture
def compiled() -> Iterator[None]:
    """Runs the test with the C++ code that the processor gets by default."""
    if not _ext.CPU.loaded:
        pytest.skip(_ext.CPU.reason)
    with dlf.use_backend("cpu"):
        yield
