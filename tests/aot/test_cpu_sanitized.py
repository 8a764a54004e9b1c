"""The CPU convolution and batch norm under AddressSanitizer and UndefinedBehaviorSanitizer.

The kernels and the code that cuts maps into tiles, or into rows, are free of torch;
`cpu_sanitized/` compiles them into a program of their own, runs shapes at the edges and compares
with the definition.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent / "cpu_sanitized"
# Optimised, it takes three times as long to compile.
FLAGS = ["-O0", "-g", "-std=c++20", "-pthread", "-fno-omit-frame-pointer", "-Wno-psabi"]


def compile_program(program: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Compiles the sources on two processors; the result is the linker's, or of what failed."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, *FLAGS, *flags, f"-I{ROOT / 'csrc' / 'include'}"]

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)

    sources = [*HERE.glob("*.cpp"), ROOT / "csrc" / "cpu" / "conv_avx2.cpp"]
    objects = [program.with_name(f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(2) as pool:
        compiled = pool.map(lambda s, o: call("-c", s, "-o", o), sources, objects)
        failed = [done for done in compiled if done.returncode]
    return failed[0] if failed else call(*objects, "-o", program)


@pytest.mark.slow
def test_edges_under_sanitizers(tmp_path: Path) -> None:
    program = tmp_path / "kernels"
    done = compile_program(program, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    if done.returncode and "sanitize" in done.stderr:
        pytest.skip(f"this compiler has no sanitizers: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    # Leaks cannot be looked for where another process traces this one.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    environment.pop("LD_PRELOAD", None)
    ran = subprocess.run([str(program)], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert {"wide", "batch_norm_wide"} <= set(ran.stdout.split())
