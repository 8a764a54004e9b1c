"""Processors whose convolution kernels were measured, and which one this is."""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

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
        convolutions, upsampling, batch_norm: the fastest instruction set of these kernels; "" where
            the C++ code's own rule holds: the widest but AVX-512.
    """

    rates: tuple[Rates, ...]
    origin: str
    convolutions: str = ""
    upsampling: str = ""
    batch_norm: str = ""


# Measured in November 2026, one thread: on 2 cores of an AMD EPYC of the third generation (family
# 25, model 1; 512 KiB of second-level cache each, 32 MiB third-level), and on 2 cores of one of the
# fourth, whose own products run hot at 52e9 and within a model at 46e9. bfloat16 on AVX2: oneDNN
# has no convolutions, and our kernels multiply in float32.
ZEN3 = Processor(
    (
        Rates("baseline", "float32", 13e9, 14e9, 37e9, 37e9, 6e-9),
        Rates("baseline", "bfloat16", 13e9, 14e9, 0.0, 0.0, 6e-9),
        Rates("avx2", "float32", 39e9, 43e9, 37e9, 37e9, 5e-9),
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
    convolutions="avx2",
    upsampling="avx512",
    batch_norm="avx2",
)


@dataclass(frozen=True)
class Cpu:
    """Which processor this is.

    Attributes:
        vendor: such as "AuthenticAMD"; the machine's architecture where it is not known.
        name: that the maker gave it.
        family, model: by cpuid; -1 where they are not known.
        flags: names of what it can do, as Linux has them.
    """

    vendor: str
    name: str
    family: int
    model: int
    flags: frozenset[str] = field(default=frozenset(), repr=False)

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
        flags = frozenset(facts.get("flags", "").split())
        vendor = facts.get("vendor_id") or platform.machine()
        return cls(vendor, name, number("cpu family"), number("model"), flags)

    @property
    def built_in(self) -> Processor | None:
        """The measured processor that this one is like, None for none."""
        if self.vendor != "AuthenticAMD" or self.family != 25:
            return None
        zen4 = 0x10 <= self.model < 0x20 or 0x60 <= self.model < 0x80 or self.model >= 0xA0
        return ZEN4 if zen4 else ZEN3

    @property
    def sets(self) -> tuple[str, ...]:
        """The instruction sets worth comparing: the widest, and AVX2 beside AVX-512."""
        if not {"avx2", "fma"} <= self.flags:
            return ("baseline",)
        wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= self.flags
        return ("avx2", "avx512") if wide else ("avx2",)
