"""Launches of the Triton kernels without a GPU: `bench.launch_stub` says what they pass through."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# `pytest` alone, unlike `python -m pytest`, does not look for bench/ in the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.launch_stub import GPUS, Gpu, Launches, pretend

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    if not os.environ.get("TRITON_INTERPRET"):
        return
    if len(mine) == len(items) and "triton" not in sys.modules:
        del os.environ["TRITON_INTERPRET"]
        return
    reason = "compiles kernels, which TRITON_INTERPRET replaces: unset it, pytest tests/launch"
    for item in mine:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Gpu:
    """The GPU of that name, which a test parametrises; else an H100."""
    return GPUS[getattr(request, "param", "H100")]


@pytest.fixture
def launches(gpu: Gpu) -> Iterator[Launches]:
    """Ops run on Triton as if their CPU tensors were on the GPU."""
    with pretend(gpu) as launches:
        yield launches
