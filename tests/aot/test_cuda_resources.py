"""What the CUDA kernels of the upsampling ops take of a GPU, compiled without one.

`cuda_resources.json` holds what was measured: the registers of each kernel for each architecture,
and (checked by test_cuda_on_host.py) the dynamic shared memory of common shapes. After a change of
the kernels

    DEEPLAB_FAST_RECORD_RESOURCES=1 python -m pytest tests/aot

writes the new numbers; look at what they do to the blocks that fit a multiprocessor.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("cuda_resources.json")
RECORD = os.environ.get("DEEPLAB_FAST_RECORD_RESOURCES") == "1"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
# Of csrc/cuda, whose kernels are in the header of the same name, and how many kernels that makes.
SOURCES = {
    # float and double: 2 label kernels, 2 accumulators, 4 cross entropies, finish and gather.
    "upsample": 2 * (2 + 2 + 4 + 2),
}
# Of a multiprocessor, for every architecture from sm_80 on.
REGISTERS = 65536


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home and Path(home, "bin", "nvcc").is_file():
        return str(Path(home, "bin", "nvcc"))
    return shutil.which("nvcc")


def read_table() -> dict:
    return json.loads(TABLE.read_text()) if TABLE.is_file() else {"nvcc": "", "kernels": {}}


def record(source: str, architecture: str, registers: dict[str, int], nvcc: str) -> None:
    table = read_table()
    table["nvcc"] = nvcc
    table["kernels"].setdefault(source, {})[architecture] = registers
    temporary = TABLE.with_suffix(".tmp")
    temporary.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, TABLE)


def demangle(names: list[str]) -> list[str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    found = []
    for line in done.stdout.splitlines():
        name = line.replace("deeplab_fast::cuda::", "").removeprefix("void ")
        found.append(name.partition("(")[0])
    return found


class Compiled:
    """One run of nvcc: ptxas' report of each kernel, and the PTX."""

    def __init__(
        self, nvcc: str, release: str, source: str, architecture: str, folder: Path
    ) -> None:
        self.release, self.source, self.architecture = release, source, architecture
        command = [
            nvcc, "-cubin", f"-arch={architecture}", "-std=c++20", "-O3",
            "--expt-relaxed-constexpr", "-Xptxas", "-v", "--keep", "--keep-dir", str(folder),
            "-DDEEPLAB_FAST_WITHOUT_TORCH", "-I", str(ROOT / "csrc" / "include"),
            "-o", str(folder / "kernels.cubin"), str(ROOT / "csrc" / "cuda" / f"{source}.cu"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.warnings = [line for line in done.stderr.splitlines() if "warning" in line]
        self.ptx = "".join(path.read_text() for path in folder.glob("*.ptx"))
        entry = re.compile(
            r"Compiling entry function '(\w+)'.*?"
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
            r"Used (\d+) registers(?:.*?(\d+) bytes smem)?[^\n]*",
            re.DOTALL,
        )
        found = entry.findall(done.stderr)
        names = demangle([match[0] for match in found])
        self.registers = {n: int(m[4]) for n, m in zip(names, found, strict=True)}
        self.spilled = {n: m[1:4] for n, m in zip(names, found, strict=True)}
        self.static_shared = {n: int(m[5] or 0) for n, m in zip(names, found, strict=True)}


@pytest.fixture(
    scope="module",
    params=[(source, name) for source in SOURCES for name in ARCHITECTURES],
    ids="-".join,
)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    source, architecture = request.param
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc: CUDA_HOME is not set and nvcc is not on PATH")
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release (\d+\.\d+)", version.stdout).group(1)
    if architecture == "sm_100" and float(release) < 12.8:
        pytest.skip(f"nvcc {release} does not know sm_100")
    folder = tmp_path_factory.mktemp(f"{source}-{architecture}")
    return Compiled(nvcc, release, source, architecture, folder)


def test_every_kernel_is_compiled_without_a_warning(compiled: Compiled) -> None:
    assert compiled.warnings == []
    kernels = {name.partition("<")[0] for name in compiled.registers}
    header = ROOT / "csrc" / "include" / "deeplab_fast" / f"{compiled.source}.cuh"
    assert kernels == set(re.findall(r"(\w+_kernel)\(const", header.read_text()))
    assert len(compiled.registers) == SOURCES[compiled.source]


def test_no_register_is_spilled(compiled: Compiled) -> None:
    spilled = {n: s for n, s in compiled.spilled.items() if s != ("0", "0", "0")}
    assert spilled == {}
    assert set(compiled.static_shared.values()) == {0}


def blocks_of(kernel: str) -> tuple[int, int]:
    """(threads of a block, blocks that a multiprocessor must have room for)."""
    if "cross_entropy_kernel" in kernel:
        return 256, 2
    if kernel.startswith("upsample_") or kernel.startswith("gather_"):
        return 128, 8
    return 256, 2


def test_registers_leave_room_for_blocks(compiled: Compiled) -> None:
    for name, registers in compiled.registers.items():
        if "<double" in name:
            continue
        threads, blocks = blocks_of(name)
        # Registers are handed out to warps in units of 8 for each thread.
        taken = -(-registers // 8) * 8 * threads
        assert taken * blocks <= REGISTERS, f"{name}: {registers} registers"


def test_registers_are_as_recorded(compiled: Compiled) -> None:
    if RECORD:
        record(compiled.source, compiled.architecture, compiled.registers, compiled.release)
    table = read_table()
    if compiled.release != table["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}, this is {compiled.release}")
    assert compiled.registers == table["kernels"][compiled.source][compiled.architecture]


def test_nothing_is_summed_by_atomics(compiled: Compiled) -> None:
    """Floating-point atomics would make the results depend on the order of blocks."""
    atomics = set(re.findall(r"\b(?:atom|red)\.[\w.]+", compiled.ptx))
    # They count pixels.
    assert atomics
    assert all(re.search(r"\.(u32|u64|s32)$", name) for name in atomics), atomics
