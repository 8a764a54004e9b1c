"""What the CUDA kernels of the upsampling ops take of a GPU, compiled without one.

`cuda_resources.json` holds what was measured: the registers of each kernel for each architecture,
and (checked by test_cuda_on_host.py) the dynamic shared memory of common shapes. After a change of
the kernels

    DEEPLAB_FAST_RECORD_RESOURCES=1 python -m pytest tests/aot

writes the new numbers; look at what they do to the blocks that fit a multiprocessor.
"""

from __future__ import annotations

import re

import pytest
from aot_harness import REGISTERS, ROOT, CudaKernels, registers_of_block

pytestmark = pytest.mark.aot

TABLE = "cuda_resources.json"
# float and double: 2 label kernels, 2 accumulators, 4 cross entropies, finish and gather.
KERNELS = 2 * (2 + 2 + 4 + 2)


@pytest.fixture(scope="module", params=["sm_80", "sm_90a", "sm_100"])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> CudaKernels:
    folder = tmp_path_factory.mktemp(f"upsample-{request.param}")
    return CudaKernels("upsample", request.param, folder)


def test_every_kernel_is_compiled_without_a_warning(compiled: CudaKernels) -> None:
    assert [line for line in compiled.said.splitlines() if "warning" in line] == []
    kernels = {name.partition("<")[0] for name in compiled.registers}
    header = ROOT / "csrc" / "include" / "deeplab_fast" / "upsample.cuh"
    assert kernels == set(re.findall(r"(\w+_kernel)\(const", header.read_text()))
    assert len(compiled.registers) == KERNELS


def test_no_register_is_spilled(compiled: CudaKernels) -> None:
    compiled.assert_nothing_spills()


def blocks_of(kernel: str) -> tuple[int, int]:
    """(threads of a block, blocks that a multiprocessor must have room for)."""
    if "cross_entropy_kernel" in kernel:
        return 256, 2
    if kernel.startswith("upsample_") or kernel.startswith("gather_"):
        return 128, 8
    return 256, 2


def test_registers_leave_room_for_blocks(compiled: CudaKernels) -> None:
    for name, registers in compiled.registers.items():
        if "<double" in name:
            continue
        threads, blocks = blocks_of(name)
        taken = registers_of_block(registers, threads) * blocks
        assert taken <= REGISTERS, f"{name}: {registers} registers"


def test_registers_are_as_recorded(compiled: CudaKernels) -> None:
    compiled.assert_recorded(TABLE, "upsample", compiled.architecture)


def test_nothing_is_summed_by_atomics(compiled: CudaKernels) -> None:
    """Floating-point atomics would make the results depend on the order of blocks."""
    atomics = set(re.findall(r"\b(?:atom|red)\.[\w.]+", compiled.ptx))
    # They count pixels.
    assert atomics
    assert all(re.search(r"\.(u32|u64|s32)$", name) for name in atomics), atomics
