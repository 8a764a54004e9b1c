"""The C++ ops of the CPU under AddressSanitizer and UndefinedBehaviorSanitizer.

A build with SANITIZE=1 runs tests of the ops in a process of its own: every instruction set that
this processor has, and the kernels for AVX-512 on any; and random calls (`bench.op_fuzz`),
DEEPLAB_FAST_FUZZ=N of them. An error ends the process.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from aot_harness import ROOT

pytestmark = pytest.mark.aot

# Shapes at the edges of tiles, vectors and threads, strides, maps of nothing.
TESTS = (
    "test_batch_norm_ops.py::test_batch_stats",
    "test_batch_norm_ops.py::test_running_statistics",
    "test_batch_norm_ops.py::test_shapes",
    "test_batch_norm_ops.py::test_layouts_give_the_same_bits",
    "test_batch_norm_ops.py::test_everything_is_written",
    "test_conv_bf16.py::TestPatches::test_is_the_convolution",
    "test_conv_bf16.py::TestPatches::test_writes_its_channels_only",
    "test_conv_bf16.py::TestTiles::test_is_the_convolution",
    "test_conv_cpu.py::TestTiles::test_is_the_convolution",
    "test_conv_cpu.py::TestTiles::test_writes_its_channels_only",
    "test_conv_cpu.py::TestPixels::test_is_the_convolution",
    "test_conv_cpu.py::TestPatches::test_is_the_convolution",
    "test_conv_cpu.py::TestPatches::test_every_ending",
    "test_conv_cpu.py::TestWeightGradient::test_is_pytorchs",
    "test_conv_cpu.py::TestDepthwiseGradients::test_is_the_definition",
    "test_inverted_residual.py::TestDepthwise::test_is_the_convolution",
    "test_inverted_residual.py::TestBlocks::test_is_its_convolutions",
    "test_inverted_residual.py::test_scaled_pixels",
    "test_upsample_ops.py::TestArgmax::test_against_float64",
    "test_upsample_ops.py::TestConfusion::test_counts",
    "test_upsample_ops.py::TestSoftmaxAdd::test_against_float64",
    "test_upsample_ops.py::TestSoftmaxAdd::test_layouts",
    "test_upsample_cross_entropy.py::TestAgainstFloat64::test_shapes",
    "test_upsample_cross_entropy.py::TestAgainstFloat64::test_options",
)


def library(name: str) -> str:
    """Path of a library of the compiler's, which must be loaded before any other."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    command = [*compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"this compiler has no sanitizers: it knows no {name}")
    return path


def build(folder: Path) -> None:
    """The package in `folder`, its extension compiled with sanitizers; ninja keeps the objects."""
    environment = os.environ | {"SANITIZE": "1", "DEEPLAB_FAST_BUILD_EXT": "1", "DEBUG": "0"}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    package = folder / "deeplab_fast"
    for path in [*(ROOT / "deeplab_fast").iterdir(), ROOT / "kernels"]:
        if path.suffix != ".so" and path.name not in ("build.json", "__pycache__"):
            (package / path.name).symlink_to(path)


@pytest.mark.slow
def test_ops_under_sanitizers(tmp_path: Path) -> None:
    # Without libstdc++ beside it AddressSanitizer cannot pass on an exception.
    preloaded = f"{library('libasan.so')} {library('libstdc++.so')}"
    build(tmp_path)
    # What memory is asked for in absurd amounts is refused, as without it.
    absurd = "allocator_may_return_null=1:max_allocation_size_mb=4096"
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "LD_PRELOAD": preloaded,
        # Leaks cannot be looked for where another process traces this one, and Python has some.
        "ASAN_OPTIONS": f"detect_leaks=0:halt_on_error=1:{absurd}",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    # -s: what a sanitizer says must not end in what pytest has captured of a dead process.
    command = [
        sys.executable, "-m", "pytest", "-q", "-x", "-s", "-k", "not reference",
        "-p", "no:cacheprovider", "-p", "no:xdist", "-c", str(ROOT / "pyproject.toml"),
        *(str(ROOT / "tests" / "unit" / test) for test in TESTS),
    ]  # fmt: skip
    # Not in the checkout, whose package would come first.
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[:6000] + ran.stdout[-6000:]
    calls = os.environ.get("DEEPLAB_FAST_FUZZ", "120")
    fuzz = [sys.executable, "-m", "bench.op_fuzz", "--calls", calls]
    fuzzed = subprocess.run(fuzz, cwd=tmp_path, env=environment, capture_output=True, text=True)
    print(fuzzed.stdout)
    assert fuzzed.returncode == 0, fuzzed.stdout[-6000:] + fuzzed.stderr[-3000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed and int(passed[1]) > 300 and "skipped" not in ran.stdout
