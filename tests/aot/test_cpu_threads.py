"""The thread teams of the C++ convolutions under ThreadSanitizer, and the same with races planted.

OpenMP's threads wait in a library that ThreadSanitizer does not see, so `teams.cpp` runs the
kernels' headers, which are free of torch, in threads of the standard library.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from aot_harness import ROOT

pytestmark = [pytest.mark.aot, pytest.mark.slow]

FLAGS = [
    "-std=c++20",
    "-O1",
    "-g",
    "-fsanitize=thread",
    "-ffp-contract=off",
    "-Wno-psabi",
    "-Wno-tsan",
]
HEADERS = ROOT / "csrc" / "include"
# What makes a race: the header, an order that matters, without it.
PLANTED = {
    "a stage begins before the last one is seen": (
        "conv_run.h",
        "stages_[stage].done.fetch_add(1, std::memory_order_release)",
        "stages_[stage].done.fetch_add(1, std::memory_order_relaxed)",
    ),
    "a kept workspace is taken without its last writes": (
        "workspace.h",
        "place.exchange(nullptr, std::memory_order_acquire)",
        "place.exchange(nullptr, std::memory_order_relaxed)",
    ),
}


def _compiler() -> list[str]:
    found = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(found[0]) is None:
        pytest.skip("no C++ compiler")
    return found


def _compile(*arguments: str) -> None:
    done = subprocess.run([*_compiler(), *FLAGS, *arguments], capture_output=True, text=True)
    if "cannot find" in done.stderr and "tsan" in done.stderr:
        pytest.skip("this compiler has no ThreadSanitizer")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels, compiled."""
    path = tmp_path_factory.mktemp("teams") / "kernels.o"
    source = ROOT / "csrc" / "cpu" / "conv_baseline.cpp"
    _compile(f"-I{HEADERS}", "-c", str(source), "-o", str(path))
    return path


def _build(kernels: Path, folder: Path, headers: Path) -> Path:
    program = folder / "teams"
    _compile(
        f"-I{headers}", str(Path(__file__).with_name("teams.cpp")), str(kernels), "-o", str(program)
    )
    return program


def _run(program: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
    return subprocess.run(
        [str(program)], env=environment, capture_output=True, text=True, timeout=120
    )


def test_no_race(kernels: Path, tmp_path: Path) -> None:
    ran = _run(_build(kernels, tmp_path, HEADERS))
    assert ran.returncode == 0, ran.stdout + ran.stderr[:6000]
    assert "0 of other bits" in ran.stdout


@pytest.mark.parametrize("change", PLANTED.values(), ids=PLANTED)
def test_a_planted_race_is_found(
    kernels: Path, tmp_path: Path, change: tuple[str, str, str]
) -> None:
    name, right, wrong = change
    shutil.copytree(HEADERS / "deeplab_fast", tmp_path / "include" / "deeplab_fast")
    header = tmp_path / "include" / "deeplab_fast" / name
    text = header.read_text()
    assert text.count(right) == 1
    header.write_text(text.replace(right, wrong))
    program = _build(kernels, tmp_path, tmp_path / "include")
    # Whether threads meet so depends on when they run: of 20 runs 17 found the workspace's race.
    ran = _run(program)
    for _ in range(40):
        if ran.returncode:
            break
        ran = _run(program)
    assert ran.returncode == 66 and "ThreadSanitizer: data race" in ran.stderr, ran.stderr[:3000]
