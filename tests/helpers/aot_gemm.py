"""Matrix products in Triton as tests/aot compiles them: the ASPP's and 1x1 convolutions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aot_harness
from aot_harness import TritonKernel

from deeplab_fast.plan.device import A100, H100, SHARED_RESERVE
from deeplab_fast.plan.gemm import FMA_FP32, MMA_16BIT, MMA_TF32, GemmConfig
from deeplab_fast.plan.taps import Branch

DEVICES = {90: H100, 80: A100}
OS8 = (Branch(256, 1, 1), *(Branch(256, 3, d) for d in (12, 24, 36)))
OS16 = (Branch(256, 1, 1), *(Branch(256, 3, d) for d in (6, 12, 18)))


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as a launch makes it.

    Attributes:
        math: arithmetic of its main loop, None where it has none.
        vector: elements of an access.
    """

    id: str
    kernel: str
    capability: int
    dtype: str
    config: GemmConfig
    constants: dict[str, object]
    math: str | None
    vector: int

    @property
    def key(self) -> str:
        return f"{self.id} sm_{self.capability}"


def other(name: str, kernel: str, capability: int, **constants: object) -> Variant:
    """A kernel without products."""
    config = GemmConfig(16, 16, 16, 4, 3, 1)
    return Variant(name, kernel, capability, "bf16", config, constants, None, 8)


def check(kernel: Any, variant: Variant, type_of: Callable[[str], str], table: str) -> TritonKernel:
    """Compile a variant within the registers and the shared memory that its occupancy assumes, to
    the products that are meant, and as the table has it."""
    config, device = variant.config, DEVICES[variant.capability]
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.register_limit is not None:
        options["maxnreg"] = config.register_limit
    compiled = aot_harness.compile_triton(
        kernel, variant.capability, variant.constants, type_of, options
    )
    got = dict(compiled.resources)
    if variant.math is not None:
        assert got["registers"] <= config.max_registers, got
        itemsize = 4 if variant.dtype == "fp32" else 2
        assert got["shared"] <= config.shared_bytes(itemsize, device.capability), got
        block = got["shared"] + SHARED_RESERVE
        assert block * config.occupancy <= device.shared, got
    if variant.math in (MMA_16BIT, MMA_TF32):
        assert ("wgmma.mma_async" in compiled.ptx) == (variant.capability == 90)
        assert ("mma.sync" in compiled.ptx) == (variant.capability == 80)
        # The innermost around a tensor-core instruction.
        products = [loop for loop in compiled.loops if any("MMA" in i for i in loop)]
        got["loop"] = min(map(len, products))
    elif variant.math == FMA_FP32:
        assert "mma" not in compiled.ptx
    aot_harness.assert_recorded(table, variant.key, got)
    return compiled


def assert_operands_are_copied(compiled: TritonKernel) -> None:
    """By 16 bytes, past the registers and the first-level cache."""
    pattern = r"cp\.async\.(c[ag])\.shared\.global \[.*?\], \[.*?\], (\w+)"
    copies = re.findall(pattern, compiled.ptx)
    assert copies and set(copies) == {("cg", "0x10")}
