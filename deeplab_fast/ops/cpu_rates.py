"""How fast one thread of this processor runs the convolution kernels: what the cost model of
`_cpu_forms` reckons with.

Rates are kept by processor, instruction set of our kernels and dtype of the maps. Those of
processors that were measured stand here; others take those of the nearest one.
"""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from .. import _ext

SETS = ("baseline", "avx2", "avx512")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Rates:
    """Of one thread, with maps of one dtype.

    Attributes:
        instruction_set: of our kernels: "baseline", "avx2" or "avx512".
        dtype: of the maps: "float32" or "bfloat16".
        multiply: multiply-adds a second of the products of tiles.
        pixels: the same of our 1x1 convolution.
        onednn_1x1, onednn_3x3: the same of oneDNN's convolutions, which skip padded taps. 0 where
            there is none.
        line_seconds: of a transform, for each cache line of 16 channels that it reads or writes.
    """

    instruction_set: str
    dtype: str
    multiply: float
    pixels: float
    onednn_1x1: float
    onednn_3x3: float
    line_seconds: float


@dataclass(frozen=True)
class Processor:
    """What is known of a processor.

    Attributes:
        rates: a row for each instruction set and dtype that was measured.
        origin: where they come from, in words.
    """

    rates: tuple[Rates, ...]
    origin: str


# Measured in November 2026, one thread: on 2 cores of an AMD EPYC of the third generation (family
# 25, model 1; 512 KiB of second-level cache each, 32 MiB third-level), and on 2 cores of one of the
# fourth, whose own products run hot at 52e9 and within a model at 46e9. bfloat16 on AVX2: oneDNN
# has no convolutions, and our kernels multiply in float32.
ZEN3 = Processor(
    (
        Rates("baseline", "float32", 13e9, 14e9, 37e9, 37e9, 6e-9),
        Rates("baseline", "bfloat16", 13e9, 14e9, 0.0, 0.0, 6e-9),
        Rates("avx2", "float32", 39e9, 40e9, 37e9, 37e9, 5e-9),
        Rates("avx2", "bfloat16", 39e9, 40e9, 0.0, 0.0, 5e-9),
    ),
    "measured on an AMD EPYC of the third generation (Zen 3)",
)
ZEN4 = Processor(
    (
        Rates("baseline", "float32", 15e9, 16e9, 54e9, 54e9, 5e-9),
        Rates("baseline", "bfloat16", 15e9, 16e9, 90e9, 108e9, 5e-9),
        Rates("avx2", "float32", 46e9, 45e9, 53e9, 54e9, 4.3e-9),
        Rates("avx2", "bfloat16", 46e9, 45e9, 90e9, 108e9, 4.3e-9),
        Rates("avx512", "float32", 46e9, 45e9, 53e9, 54e9, 4.3e-9),
        Rates("avx512", "bfloat16", 46e9, 45e9, 90e9, 108e9, 4.3e-9),
    ),
    "measured on an AMD EPYC of the fourth generation (Zen 4)",
)


@dataclass(frozen=True)
class Cpu:
    """Which processor this is.

    Attributes:
        vendor: such as "AuthenticAMD"; the machine's architecture where it is not known.
        name: that the maker gave it.
        family, model: by cpuid; -1 where they are not known.
    """

    vendor: str
    name: str
    family: int
    model: int

    @classmethod
    @cache
    def here(cls) -> Cpu:
        """The one of this process."""
        text = ""
        with suppress(OSError):
            text = Path("/proc/cpuinfo").read_text("utf-8", "replace").partition("\n\n")[0]
        facts = dict(re.findall(r"^(.+?)\s*:\s*(.*?)\s*$", text, re.MULTILINE))

        def number(name: str) -> int:
            value = facts.get(name, "")
            return int(value) if value.isdecimal() else -1

        name = facts.get("model name") or platform.processor() or platform.machine()
        vendor = facts.get("vendor_id") or platform.machine()
        return cls(vendor, name, number("cpu family"), number("model"))

    @property
    def built_in(self) -> Processor | None:
        """The measured processor that this one is like, None for none."""
        if self.vendor != "AuthenticAMD" or self.family != 25:
            return None
        zen4 = 0x10 <= self.model < 0x20 or 0x60 <= self.model < 0x80 or self.model >= 0xA0
        return ZEN4 if zen4 else ZEN3


def processor() -> Processor:
    """What is known of this processor, or of the nearest one."""
    if known := Cpu.here().built_in:
        return known
    nearest = ZEN4 if torch.backends.cpu.get_cpu_capability() == "AVX512" else ZEN3
    return Processor(nearest.rates, f"taken to be as on another: {nearest.origin}")


def rates(dtype: str = "float32") -> Rates:
    """The rates for maps of a dtype, by the instruction set that the convolutions use now.

    Raises:
        ValueError: of another dtype than `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"rates: dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    return _row(processor(), instruction_set(), dtype)


def instruction_set() -> str:
    """The instruction set of the C++ convolutions, "baseline" where they are not compiled."""
    if not _ext.CPU.loaded:
        return "baseline"
    name: str = torch.ops.deeplab_fast._cpu_instruction_set("")
    return name


@cache
def _row(known: Processor, name: str, dtype: str) -> Rates:
    # Of a set that was not measured, those of the next smaller one.
    names = SETS[SETS.index(name) :: -1]
    rows = {(row.instruction_set, row.dtype): row for row in known.rates}
    return next(rows[each, dtype] for each in names if (each, dtype) in rows)
