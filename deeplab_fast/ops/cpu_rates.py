"""How fast one thread of this processor runs the kernels, which the cost model of `_cpu_forms`
reckons with, and which instruction set the C++ code takes.

    built-in   processors that were measured: `cpu_processors`
    probed     others, at the first plan: 0.1 s, kept in $XDG_CACHE_HOME/deeplab_fast/cpu_rates.json
               (~/.cache by default)
    nearest    where nothing may be probed, those of the nearest that was measured

`DEEPLAB_FAST_CPU_RATES` names another file; 0 leaves it unread and nothing probed.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from pathlib import Path

import torch

from .. import _ext
from ..dispatch import limits
from ..dispatch.files import cache_folder
from . import _cpu_probe
from .cpu_processors import DTYPES, SETS, ZEN3, ZEN4, Cpu, Processor, Rates

ENVIRONMENT_VARIABLE = "DEEPLAB_FAST_CPU_RATES"
# Of kernels in C++, each with an instruction set of its own.
FAMILIES = ("convolutions", "upsampling", "batch_norm")

_lock = threading.Lock()
_chosen: Processor | None = None


def path() -> Path | None:
    """The file of probed rates; None where it is switched off."""
    named = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if named == "0":
        return None
    return Path(named).expanduser() if named else cache_folder() / "cpu_rates.json"


def processor() -> Processor:
    """What is known of this processor, or of the nearest one."""
    cpu = Cpu.here()
    if known := cpu.built_in:
        return known
    file = path()
    compiled = not limits.extension(_ext.CPU, "_cpu_suggest_set")
    if file is None or not compiled or torch.compiler.is_compiling():
        return _nearest("avx512" in cpu.sets)
    with _lock:
        return _probed(file, cpu)


def rates(dtype: str = "float32") -> Rates:
    """The rates for maps of a dtype, by the instruction set that the convolutions use now.

    Raises:
        ValueError: of another dtype than `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"rates: dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    return _row(choose_sets(), instruction_set(), dtype)


def choose_sets() -> Processor:
    """Make the fastest instruction sets of this processor those of the C++ code.

    They hold where neither DEEPLAB_FAST_CPU_SET nor a call names another.
    """
    global _chosen
    known = processor()
    if known is not _chosen and not limits.extension(_ext.CPU, "_cpu_suggest_set"):
        suggest = torch.ops.deeplab_fast._cpu_suggest_set
        for family in FAMILIES:
            name = getattr(known, family)
            if name in Cpu.here().sets:
                suggest(family, name)
        _chosen = known
    return known


def instruction_set() -> str:
    """The instruction set of the C++ convolutions, "baseline" where they are not compiled."""
    # An extension of older sources does not tell.
    current = getattr(_ext.CPU.module, "conv_instruction_set", None)
    name: str = "baseline" if current is None else current()
    return name


@cache
def _nearest(wide: bool) -> Processor:
    known = ZEN4 if wide else ZEN3
    return Processor(known.rates, f"taken to be as on another: {known.origin}")


@cache
def _probed(file: Path, cpu: Cpu) -> Processor:
    return _cpu_probe.kept(file, cpu) or _nearest("avx512" in cpu.sets)


@cache
def _row(known: Processor, name: str, dtype: str) -> Rates:
    # Of a set that was not measured, those of the next smaller one, or of the smallest there is.
    names = (*SETS[SETS.index(name) :: -1], *SETS)
    rows = {(row.instruction_set, row.dtype): row for row in known.rates}
    return next(rows[each, dtype] for each in names if (each, dtype) in rows)
