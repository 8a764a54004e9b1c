"""Fixtures and guards that every group of tests shares."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from deeplab_fast import testing

# Their assertions say what they compared, as those of test files do.
pytest.register_assert_rewrite("aot_harness", "fast_models", "fuzz", "gpu_harness", "other_models")

# What is chosen does not depend on how busy a machine was.
os.environ["DEEPLAB_FAST_CPU_RATES"] = "0"

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """The process that hands out tests imports the modules of what is warned of in them: Lightning,
    which imports torchvision."""
    if config.getoption("numprocesses", None):
        with suppress(ImportError):
            testing.import_torchvision()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What fuzz tests tried, of a long run (without -n)."""
    if "DEEPLAB_FAST_FUZZ" in os.environ:
        import fuzz

        for line in fuzz.summary():
            terminalreporter.write_line(line)


@pytest.fixture
def shared_data() -> Path:
    """The data folder beside the repository, for tests on real photos and weights."""
    data = ROOT.parent / "shared" / "data"
    if not data.is_dir():
        pytest.skip("no shared/data folder beside the repository")
    return data


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nan_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill torch.empty, empty_like and new_empty with NaN (integers with their largest value).

    An output that a kernel does not write whole then shows in every comparison.
    """

    def poisoned(make):
        def call(*args, **kwargs):
            t = make(*args, **kwargs)
            if t.device.type == "meta" or torch.compiler.is_compiling():
                return t
            value = float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max
            return t.fill_(value)

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
