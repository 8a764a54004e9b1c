"""Memory that a training process keeps."""

import os
import subprocess
import sys

import pytest

from deeplab_fast import cli

COUNT = """
import resource, torch
from deeplab_fast.engine.heap import keep_freed_memory

def faults():
    torch.full((40 << 18,), 1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.full((40 << 18,), 1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
print(keep_freed_memory(), before, faults())
"""


def counted(**environment: str) -> tuple[bool, int, int]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    says, before, after = done.stdout.split()
    return says == "True", int(before), int(after)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_pages_of_freed_tensors_are_used_again() -> None:
    says, before, after = counted()
    if not says:
        pytest.skip("another C library")
    # Four tensors of 40 MiB have 40,960 pages of 4 KiB; large pages are 2 MiB.
    if before < 4 * 20:
        pytest.skip("no faults are counted, or PyTorch has another allocator")
    assert after < before / 4


def test_what_the_environment_says_goes_first() -> None:
    assert not counted(MALLOC_ARENA_MAX="2")[0]


def test_only_in_a_process_that_is_the_commands_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[str] = []
    monkeypatch.setattr(cli.train, "own_process", lambda: called.append("train"))
    assert cli.main(["train"]) == 2
    assert called == []
    monkeypatch.setattr(sys, "argv", ["deeplab-fast", "train"])
    assert cli.main() == 2
    assert called == ["train"]
    monkeypatch.setattr(sys, "argv", ["deeplab-fast", "eval"])
    assert cli.main() == 2
    assert called == ["train"]
