"""What the CUDA kernels of the ASPP take of a GPU, compiled by nvcc without one.

`aspp_cuda_resources.json` holds the registers of each kernel for each architecture and the shared
memory of each row of the table of tiles. After a change of the kernels

    DEEPLAB_FAST_RECORD_RESOURCES=1 python -m pytest tests/aot/test_aspp_cuda_resources.py

writes the new numbers; look at what they do to the blocks that fit a multiprocessor.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from aot_harness import (
    REGISTERS,
    ROOT,
    CudaKernels,
    assert_shared_recorded,
    registers_of_block,
)

pytestmark = pytest.mark.aot

TABLE = "aspp_cuda_resources.json"
# Files of csrc/cuda by what they are compiled for; 10.0 is what a Blackwell GPU makes of the PTX
# that ships.
SOURCES = {"sm_80": "aspp", "sm_90a": "aspp_sm90", "sm_100": "aspp"}
# Shared memory of a block and of a multiprocessor, which keeps 1 KB of each block for itself.
SHARED = {80: (163 * 1024, 164 * 1024), 90: (227 * 1024, 228 * 1024)}
# Of the smallest device with these kernels, sm_86.
LEAST_SHARED = 99 * 1024


@pytest.fixture(scope="module", params=SOURCES)
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> CudaKernels:
    folder = tmp_path_factory.mktemp(request.param)
    return CudaKernels(SOURCES[request.param], request.param, folder)


class Row:
    """A row of the table of tiles, read off its source."""

    def __init__(self, text: str) -> None:
        numbers = [int(n) for n in text.split(",")]
        self.architecture, self.block_m, self.block_n, warps_m, warps_n, self.stages = numbers[:6]
        self.cluster, self.occupancy = numbers[6:]
        loaders = 1 if self.architecture == 90 else 0
        width = 128 if self.architecture == 90 else 32
        self.threads = width * (warps_m * warps_n + loaders)
        self.accumulators = (
            self.block_m // self.cluster * self.block_n // (width * warps_m * warps_n)
        )
        # 64 channels of 2 bytes.
        self.shared = self.stages * (self.block_m // self.cluster + self.block_n) * 128
        if self.architecture == 90:
            self.shared += 1024 + 16 * self.stages


def rows() -> list[Row]:
    source = (ROOT / "csrc" / "include" / "deeplab_fast" / "aspp_tile_table.h").read_text()
    found = re.findall(r"^    \{(\d+(?:, \d+){7})\},$", source, re.MULTILINE)
    return [Row(text) for text in found]


def row_of(kernel: str) -> Row:
    return rows()[int(re.search(r", (\d+)>", kernel).group(1))]


def main_kernels(names) -> list[str]:
    return [name for name in names if re.match(r"aspp_sm\d+_kernel", name)]


def test_every_kernel_is_compiled_without_complaint(compiled: CudaKernels) -> None:
    # ptxas says so where it runs wgmma one after the other, or ignores setmaxnreg.
    assert not re.findall(r"warning|Performance|ignored|C75\d\d", compiled.said)
    architecture = 90 if compiled.architecture == "sm_90a" else 80
    expected = {i for i, row in enumerate(rows()) if row.architecture == architecture}
    for kernel in (f"aspp_sm{architecture}_kernel", "aspp_sum_kernel"):
        found = [name for name in compiled.registers if name.startswith(kernel)]
        types = {name.partition("<")[2].partition(",")[0] for name in found}
        assert types == {"Half", "Bfloat16"}
        assert {int(n.rpartition(", ")[2].rstrip(">")) for n in found} == expected


def test_no_register_is_spilled(compiled: CudaKernels) -> None:
    compiled.assert_nothing_spills()


def test_blocks_fit_a_multiprocessor(compiled: CudaKernels) -> None:
    for name in main_kernels(compiled.registers):
        row = row_of(name)
        taken = registers_of_block(compiled.registers[name], row.threads)
        assert taken * row.occupancy <= REGISTERS, name
        block, multiprocessor = SHARED[row.architecture]
        assert row.shared <= block, name
        assert (row.shared + 1024) * row.occupancy <= multiprocessor, name


def test_registers_are_as_recorded(compiled: CudaKernels) -> None:
    assert_shared_recorded(TABLE, {f"row {i}": row.shared for i, row in enumerate(rows())})
    compiled.assert_recorded(TABLE, compiled.architecture)


def test_instructions_are_those_meant(compiled: CudaKernels) -> None:
    every = compiled.instructions()
    assert set(every) == set(compiled.registers)
    for name, found in every.items():
        # No array lies in local memory, nothing is summed by atomics.
        assert not [i for i in found if re.match(r"LDL|STL|RED\b|ATOM", i)], name
    for name in main_kernels(every):
        found, row = every[name], row_of(name)
        dtype = "BF16" if "Bfloat16" in name else "F16"

        def count(pattern: str, found: Counter[str] = found) -> int:
            return sum(n for i, n in found.items() if re.fullmatch(pattern, i))

        # Operands by 16 bytes past the first-level cache, results by 16 bytes.
        assert count(r"LDGSTS\..*128") and count(r"LDGSTS.*") == count(r"LDGSTS.*BYPASS.*128")
        assert count(r"STG\.E\.128")
        if row.architecture == 90:
            columns = row.block_n // (row.threads // 128 - 1) * row.block_m // row.cluster // 64
            suffix = "" if dtype == "F16" else r"\.BF16"
            assert count(r"HGMMA.*") == count(rf"HGMMA\.64x{columns}x16\.F32{suffix}") > 0
            assert count("HMMA.*") == 0
            multicast = count(r"UTMALDG\.2D\.MULTICAST")
            assert count(r"UTMALDG.*") == (multicast or count(r"UTMALDG\.2D")) > 0
            assert (multicast > 0) == (row.cluster > 1)
            assert count(r"ARRIVES\.LDGSTSBAR.*") and count(r"SYNCS\.PHASECHK.*TRYWAIT")
            assert count(r"USETMAXREG.*") == 2
            assert count(r"FENCE\.VIEW\.ASYNC.*")
            assert bool(count(r"UCGABAR.*")) == (row.cluster > 1)
        else:
            suffix = "" if dtype == "F16" else r"\.BF16"
            assert count(r"HMMA.*") == count(rf"HMMA\.16816\.F32{suffix}")
            # A chunk of 64 channels once: its products, and the operands of 16x16.
            assert count(r"HMMA.*") == row.accumulators // 4 * 4
            assert count(r"LDSM\.16\.M88\.4") == count(r"LDSM.*") > 0


@pytest.mark.parametrize("variant", ["nofence", "acquire_cluster"])
def test_a_variant_has_one_thing_otherwise(variant: str, tmp_path: Path) -> None:
    flag = f"-DDEEPLAB_FAST_SM90_{variant.upper()}"
    compiled = CudaKernels("aspp_sm90", "sm_90a", tmp_path, flag)
    assert not re.findall(r"warning|Performance|ignored|C75\d\d", compiled.said)
    assert set(compiled.spilled.values()) == {("0", "0", "0")}
    every = compiled.instructions()
    for name in main_kernels(every):
        found, pair = every[name], row_of(name).cluster > 1
        fences = sum(n for i, n in found.items() if i.startswith("FENCE.VIEW.ASYNC"))
        # One follows the initialisation of barriers; the others come before products.
        assert (fences == 1) == (variant == "nofence"), name
        # The two are those of cluster_sync.
        acquires = found["CCTL.IVALL"] - 2 * pair
        assert (acquires > 0) == (pair and variant == "acquire_cluster"), name


def test_one_row_at_least_fits_the_smallest_device() -> None:
    assert any(row.architecture == 80 and row.shared <= LEAST_SHARED for row in rows())


def test_rows_divide_into_fragments() -> None:
    assert len(rows()) == 7
    for row in rows():
        # 16 rows or 64 of them a warp or warpgroup, four blocks of 8 columns for a 16-byte store.
        assert row.block_m // row.cluster % 64 == 0 and row.block_n % 128 == 0
        assert row.accumulators <= 128
        assert 2 <= row.stages
